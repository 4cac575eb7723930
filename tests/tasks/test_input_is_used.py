"""A model that sees its input predicts what is hidden better than the same model without it.

`python -m tests.tasks.test_input_is_used` prints the table of docs/data/objectives.md. With names
of configs it prints only their rows.
"""

import dataclasses
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe.config import RunConfig
from moe.data.rows import Transform
from moe.tasks import make_task
from moe.training.trainer import fit

# Smaller than the configs, so that the six runs take minutes together.
SMALL = {
    "model": {
        "num_layers": 2,
        "model_dim": 64,
        "feed_forward_dim": 176,
        "num_heads": 2,
        "num_kv_heads": 2,
    },
    "data": {"sequence_length": 64},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20},
    "train": {"batch_size": 16, "log_every": 50, "eval_batches": 40},
    "tracking": {"tensorboard": False},
}
Fields = dict[str, np.ndarray]


def without_tokens(batch: Fields) -> Fields:
    """Hides all tokens of an encoder of masked tokens."""
    return batch | {"tokens": np.where(batch["segment_ids"] > 0, 256, 0).astype(np.int32)}


def without_encoder(batch: Fields) -> Fields:
    """Hides all tokens of the encoder of span corruption."""
    return batch | {"encoder_tokens": np.zeros_like(batch["encoder_tokens"])}


def without_context(batch: Fields) -> Fields:
    """Hides all but the middles, which are the only targets then."""
    is_middle = np.concatenate([[False], batch["in_middle"][:-1]])
    tokens = np.where(is_middle, batch["tokens"], 0).astype(np.int32)
    return batch | {"tokens": tokens, "loss_mask": batch["in_middle"]}


# The config, the metric of the hidden tokens, what takes the input away, and the number of steps.
# A decoder learns late to read what its encoder has read.
TASKS: dict[str, tuple[str, Callable[[Fields], Fields], int]] = {
    "masked_tiny": ("validation/loss", without_tokens, 600),
    "span_corruption_tiny": ("validation/loss", without_encoder, 5000),
    "fill_in_the_middle_tiny": ("validation/middle_loss", without_context, 600),
}


def trained_loss(name: str, sees_input: bool, workdir: str, **data: object) -> float:
    """Trains a small model of a config's task, and returns its loss on the hidden tokens."""
    metric, hide, steps = TASKS[name]
    values = importlib.import_module(f"configs.{name}").get_config()
    for group, fields in SMALL.items():
        values[group].update(fields)
    values.train.update(steps=steps, eval_every=steps, checkpoint_every=steps)
    values.data.update(data)
    config = RunConfig.from_config_dict(values)
    seeing = make_task(config)

    def blind_transform(config: RunConfig) -> Transform:
        transform = seeing.transform(config)
        return lambda row, key: hide(transform(row, key))

    task = seeing if sees_input else seeing._replace(transform=blind_transform)
    return fit(dataclasses.replace(config, task="custom"), workdir, task=task)[metric]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TASKS)
def test_the_input_lowers_the_loss_by_a_tenth(name, tmp_path, data_directory):
    train = functools.partial(trained_loss, name, directory=data_directory)
    seeing, blind = train(True, str(tmp_path / "seeing")), train(False, str(tmp_path / "blind"))
    assert seeing < 0.9 * blind


def main() -> None:
    print("| config | with its input | without it | less loss |\n| --- | --- | --- | --- |")
    for name in sys.argv[1:] or TASKS:
        with tempfile.TemporaryDirectory() as directory:
            seeing, blind = (
                trained_loss(name, sees, str(Path(directory, str(sees)))) for sees in (True, False)
            )
        print(f"| `{name}` | {seeing:.3f} | {blind:.3f} | {1 - seeing / blind:.0%} |")


if __name__ == "__main__":
    main()
