"""Trains dense models of several sizes at each of four budgets of FLOPs, for a first scaling law.

The text is Python's standard library, in bytes. Every budget's best size should lie within its
range: at 4e12 FLOPs it is between the widths 48 and 96, and it grows with the budget. Shapes,
learning rates, batches and warm-ups follow the rules of moe/scaling/experiments/shapes.py, with a
factor on the learning rate that a few runs have shown. These are losses by learning rate, with
beta2=0.95 at 1e12 FLOPs, and below with 0.99 at 4e12:

    width 32   0.0106: 1.653, 0.0212: 1.626                  the rule: 0.0176
    width 48   0.0082: 1.647, 0.0165: 1.630, 0.0274: 1.647   the rule: 0.0137
    width 64   0.0069: 1.651, 0.0138: 1.674                  the rule: 0.0095
               0.0138: 1.656, with beta2=0.99

    width 40   0.0153: 1.486, 0.02: 1.492                    the rule: 0.0153
    width 48   0.0165: 1.452                                 the rule: 0.0137
    width 64   0.009: 1.455, 0.0116: 1.444                   the rule: 0.0116
    width 96   0.005: 1.460                                  the rule: 0.0049

Small batches need a beta2 of more than 0.95, as Porian et al. 2024 found. Each run is evaluated on
the whole validation split, so that all of them predict the same 0.42M bytes. Seeds 1 and 2 of one
run show the seed's noise.

Command:  python -m launch.sweep --sweep=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny
          --jobs=2
Hardware: 2 CPU cores.
Time:     99 minutes, beside other work.
Result:   a law fitted to the three smaller budgets predicts the largest one's losses to 0.42 %
          (docs/scaling_laws.md, docs/scaling_laws/isoflop_tiny.csv).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from moe.config import RunConfig
from moe.scaling.experiments.ladders import iso_flop_ladder
from moe.scaling.experiments.sweep import Point, repeat

WIDTHS = {
    4e12: (40, 48, 64, 80, 96),
    8e12: (40, 48, 64, 80, 96, 112),
    15e12: (48, 64, 80, 96, 112),
    30e12: (64, 80, 96, 112, 128),
}
LEARNING_RATE_FACTOR = 0.25


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=2, model_dim=64, feed_forward_dim=168, num_heads=4, num_kv_heads=4, head_dim=16
    )
    config.model.compute_dtype = "float32"  # CPUs have no faster arithmetic than this
    config.model.scan_layers = False  # a loop over so few layers costs a CPU more than it saves
    config.data.sequence_length = 128
    config.optimizer.beta2 = 0.99
    config.train.update(keep_last=1, loss_chunk=128)
    config.tracking.tensorboard = False
    return config


def get_sweep() -> Iterator[Point]:
    base = RunConfig.from_config_dict(get_config())
    yield from iso_flop_ladder(base, WIDTHS, LEARNING_RATE_FACTOR)
    (middle,) = iso_flop_ladder(base, {4e12: (64,)}, LEARNING_RATE_FACTOR)
    yield from repeat([middle._replace(name="noise")], (1, 2))
