"""Trains three sizes on five numbers of tokens each, from one stable phase for each size.

The learning rate stays at its peak until a run's last fifth, in which it falls. Runs of one size
differ in nothing else, so each forks the longest one where its own decay begins: five numbers of
tokens cost the longest run and a fifth of each of the others.

Command:  python -m launch.sweep --sweep=configs/sweeps/tokens_tiny.py --workdir=runs/tokens_tiny
          --jobs=2
Hardware: 2 CPU cores.
Time, result: not measured yet.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.sweeps import isoflop_tiny
from moe.config import RunConfig
from moe.scaling.experiments.ladders import token_ladder
from moe.scaling.experiments.sweep import Point


def get_config() -> ConfigDict:
    config = isoflop_tiny.get_config()
    config.optimizer.update(schedule="wsd", final_learning_rate_fraction=0.0)
    return config


def get_sweep() -> Iterator[Point]:
    return token_ladder(
        RunConfig.from_config_dict(get_config()),
        widths=(48, 64, 96),
        tokens=(0.5e6, 1e6, 2e6, 4e6, 8e6),
        learning_rate_factor=isoflop_tiny.LEARNING_RATE_FACTOR / 2,
    )
