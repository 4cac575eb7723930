"""Asks what requests are worth to a model of conversations, and what padding costs.

asked        chat_tiny: functions of the standard library follow their names and docstrings.
unasked      The same functions follow empty requests.
padded       As asked, with one conversation in a row instead of as many as fit.

Command:  python -m launch.compare --sweep=configs/experiments/requests.py --workdir=runs/requests
          One variant alone: python -m launch.train
          --config=configs/experiments/requests.py:unasked --workdir=runs/unasked
Hardware: 2 CPU cores.
Time:     16 min for asked and unasked at once, while other work took the cores.
Result:   nats per byte of held-out functions, one seed: unasked 1.375, and asked 0.928, which is
          33 % less. After 500 steps unasked is still ahead, 1.544 to 1.588: the model learns late
          to look back at the request. padded has not been trained to the end.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import chat_tiny
from moe.scaling.experiments.sweep import Point, repeat

SEEDS = (0, 1, 2)

VARIANTS: dict[str, dict[str, Any]] = {
    "asked": {},
    "unasked": {"data.dataset": "stdlib_functions/without_request"},
    # Twice the rows have about as many conversations.
    "padded": {"data.packing": "pad", "data.sequence_length": 448, "train.batch_size": 32},
}


def get_config(variant: str = "asked") -> ConfigDict:
    config = chat_tiny.get_config()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config


def get_sweep() -> Iterator[Point]:
    return repeat((Point(name, fields) for name, fields in VARIANTS.items()), SEEDS)
