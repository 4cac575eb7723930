"""Trains 1, 4, 16 and 64 experts at three sizes, at equal FLOPs per token, for a routed law.

A token goes through one expert, which is as wide as the feed-forward part of the dense model. So
more experts add parameters, and no FLOPs but the router's. One expert is the dense model itself.
All runs train on the same 3M bytes of Python's standard library. The learning rate follows the
dense model's size, as in isoflop_tiny.

Command:  python -m launch.sweep --sweep=configs/sweeps/sparsity_tiny.py
          --workdir=runs/sparsity_tiny --jobs=2
Hardware: 2 CPU cores.
Time:     19 minutes, beside other work.
Result:   16 experts are best at each size, by 8.2 %, 3.6 % and 1.2 % of the dense model's loss
          (docs/scaling_laws.md, docs/scaling_laws/sparsity_tiny.csv).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.sweeps import isoflop_tiny
from moe.config import RunConfig
from moe.scaling.experiments.ladders import sparsity_ladder
from moe.scaling.experiments.sweep import Point

TOKENS = 3e6


def get_config() -> ConfigDict:
    config = isoflop_tiny.get_config()
    config.model.moe.update(balance_weight=0.01, balance_scope="batch")
    return config


def get_sweep() -> Iterator[Point]:
    return sparsity_ladder(
        RunConfig.from_config_dict(get_config()),
        widths=(32, 64, 96),
        expansions=(1, 4, 16, 64),
        tokens=TOKENS,
        learning_rate_factor=isoflop_tiny.LEARNING_RATE_FACTOR,
    )
