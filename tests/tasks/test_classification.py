"""A second task, trained by the same `fit`: the worked example of how to add one.

Each row is a text of lower-case letters with the words CAT and DOG in it, and its label says which
of them comes first. Both labels have the same bytes, so a model has to read their order.
"""

import contextlib
import dataclasses
import functools
import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import losses
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.cross_entropy import Unembedding
from moe.data.rows import Rows
from moe.model.layers import einsum
from moe.model.transformer import Encoder
from moe.parameters import parameter
from moe.tasks import Task
from moe.training import trainer
from moe.training.trainer import fit, load_run
from moe.workdir.tracking import read_metrics

WORDS = (b"CAT", b"DOG")
NUM_CLASSES = 2
NUM_ROWS = {"train": 2048, "validation": 500}


class Classifier(nn.Module):
    """An encoder whose mean hidden state is mapped to a logit for each class."""

    config: ModelConfig

    def setup(self) -> None:
        width = self.config.model_dim
        self.encoder = Encoder(self.config)
        self.head_DV = parameter(
            self, "head", "DV", (width, NUM_CLASSES), kind="unembedding", fan_in=width
        )

    def __call__(self, batch):
        return self.encoder(batch)

    def unembedding(self):
        """Returns the weight that makes the logits of the classes."""
        return Unembedding(self.head_DV)


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """The rows of one split, which are all in memory."""

    fields: dict[str, np.ndarray]
    sha256: str

    def __len__(self) -> int:
        return len(self.fields["label"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: field[index] for name, field in self.fields.items()}


def make_rows(config: RunConfig, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Makes texts of 12 to T letters. What follows a text in its row is padding, segment 0."""
    rng = np.random.default_rng(seed)
    length = config.data.sequence_length
    tokens = rng.integers(ord("a"), ord("z") + 1, (num_rows, length)).astype(np.int32)
    label = rng.integers(0, NUM_CLASSES, num_rows).astype(np.int32)
    text_length = rng.integers(12, length + 1, num_rows)
    for row in range(num_rows):
        first = rng.integers(0, text_length[row] - 6 + 1)
        second = rng.integers(first + 3, text_length[row] - 3 + 1)
        for word, start in ((WORDS[label[row]], first), (WORDS[1 - label[row]], second)):
            tokens[row, start : start + 3] = list(word)
    is_text = np.arange(length) < text_length[:, None]
    return {
        "tokens": np.where(is_text, tokens, 0),
        "segment_ids": is_text.astype(np.int32),
        "label": label,
    }


@functools.cache
def open_rows(config: RunConfig, split: str) -> LabelledRows:
    fields = make_rows(config, NUM_ROWS[split], seed=list(NUM_ROWS).index(split))
    sha256 = hashlib.sha256(b"".join(field.tobytes() for field in fields.values())).hexdigest()
    return LabelledRows(fields, sha256)


def counts(batch):
    """A row of zeros, which evaluation fills its last batch up with, has no text and no label."""
    is_text_BT = batch["segment_ids"] > 0
    return {
        "targets": jnp.sum(jnp.any(is_text_BT, axis=1), dtype=jnp.float32),
        "tokens": jnp.sum(is_text_BT, dtype=jnp.float32),
    }


def loss(output, unembedding, batch):
    """Sums the cross-entropy of the labels and the number of rows that are classified right."""
    is_text_BT1 = (batch["segment_ids"] > 0)[..., None]
    has_label_B = jnp.any(is_text_BT1, axis=(1, 2))
    summed_BD = jnp.sum(jnp.where(is_text_BT1, output.hidden, 0), axis=1, dtype=jnp.float32)
    mean_BD = losses.mean(summed_BD, jnp.sum(is_text_BT1, axis=1))
    logits_BV = einsum("BD,DV->BV", mean_BD, unembedding.weight, jnp.float32)
    log_probabilities_BV = jax.nn.log_softmax(logits_BV)
    is_label_BV = jax.nn.one_hot(batch["label"], NUM_CLASSES, dtype=bool)
    losses_B = -jnp.sum(jnp.where(is_label_BV, log_probabilities_BV, 0), axis=1)
    is_right_B = jnp.argmax(logits_BV, axis=1) == batch["label"]
    return {
        "loss": jnp.sum(jnp.where(has_label_B, losses_B, 0)),
        "right": jnp.sum(has_label_B & is_right_B, dtype=jnp.float32),
        "router": losses.in_layer_order(output.stats),
        **counts(batch),
    }


def metrics(sums):
    return losses.metrics(sums) | {"accuracy": losses.mean(sums["right"], sums["targets"])}


def score(sums, rows: Rows) -> dict[str, float]:
    return {"labelled_fraction": float(sums["targets"]) / len(rows)}


TASK = Task(
    model=Classifier,
    dims={"tokens": "BT", "segment_ids": "BT", "label": "B"},
    init_batch={"tokens": np.zeros((1, 1), np.int32)},
    rows=open_rows,
    random_rows=lambda config, num_rows: make_rows(config, num_rows, config.seed),
    loss=loss,
    counts=counts,
    metrics=metrics,
    score=score,
)

CONFIG = RunConfig(
    task="custom",
    model=ModelConfig(
        vocab_size=128,
        num_layers=2,
        model_dim=32,
        feed_forward_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        rope_base=100.0,
        compute_dtype="float32",
    ),
    data=DataConfig(sequence_length=24),
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.0),
    train=TrainConfig(steps=60, batch_size=32, log_every=10, eval_every=30, checkpoint_every=20),
    tracking=TrackingConfig(tensorboard=False),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a run that was interrupted at step 10 and resumed, and its last validation."""
    workdir = tmp_path_factory.mktemp("classification")
    asked = []

    @contextlib.contextmanager
    def signal_at_step_10():
        yield lambda: asked.append(None) or len(asked) >= 10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "catch_signals", signal_at_step_10)
        with pytest.raises(trainer.Interrupted, match="stopped at step 10"):
            fit(CONFIG, workdir, jax.devices()[:1], task=TASK)
    return workdir, fit(CONFIG, workdir, jax.devices()[:1], task=TASK)


def bag_of_bytes(fields: dict[str, np.ndarray]) -> np.ndarray:
    """Returns how often each byte stands in each row, and a 1 for the bias."""
    bags = [np.bincount(tokens, minlength=128) for tokens in fields["tokens"]]
    return np.concatenate([np.array(bags, np.float64), np.ones((len(bags), 1))], axis=1)


def logistic_regression_accuracy() -> float:
    """Returns the validation accuracy of logistic regression on a bag of bytes."""
    train, validation = (open_rows(CONFIG, split).fields for split in NUM_ROWS)
    features, weights = bag_of_bytes(train), np.zeros(129)
    for _ in range(200):
        probabilities = 1 / (1 + np.exp(-features @ weights))
        weights -= 0.05 * features.T @ (probabilities - train["label"]) / len(features)
    return float(np.mean((bag_of_bytes(validation) @ weights > 0) == validation["label"]))


@pytest.mark.slow
def test_the_encoder_learns_what_a_bag_of_bytes_cannot(trained):
    _, validation = trained
    assert validation["validation/accuracy"] >= 0.9
    assert logistic_regression_accuracy() < 0.7


def test_a_run_of_the_task_has_its_metrics_and_scores(trained):
    workdir, validation = trained
    assert set(validation) == {
        f"validation/{name}" for name in ("loss", "accuracy", "labelled_fraction")
    }
    # The rows that fill up the last batch, of 500 rows in batches of 32, were not counted.
    assert validation["validation/labelled_fraction"] == 1.0
    steps = [line["step"] for line in read_metrics(workdir) if "train/accuracy" in line]
    assert steps == [10, 20, 30, 40, 50, 60]


def test_a_checkpoint_is_read_with_its_task(trained):
    workdir, _ = trained
    with pytest.raises(ConfigError, match="needs a Task from the program that trains the run"):
        load_run(workdir)
    _, program, variables, step = load_run(workdir, task=TASK)
    assert step == 60 and isinstance(program.model, Classifier)
    assert variables["params"]["head"].shape == (32, NUM_CLASSES)
