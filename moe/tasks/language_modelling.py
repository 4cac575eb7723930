"""Defines language modelling, which predicts each token of a text from those before it."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe import losses
from moe.config import RunConfig
from moe.cross_entropy import Unembedding, check_mask, cross_entropy_sum
from moe.data.rows import Rows
from moe.losses import Sums
from moe.model.stack import Output
from moe.model.transformer import Transformer
from moe.scaling.flops import run_training_flops
from moe.tasks.task import Batch, Task

DIMS: dict[str, str] = {
    "tokens": "BT",
    "targets": "BT",
    "loss_mask": "BT",
    "segment_ids": "BT",
    "positions": "BT",
}


def language_modelling(config: RunConfig) -> Task:
    """Returns the task of a decoder that predicts the next token of packed documents."""
    return Task(
        model=Transformer,
        dims=DIMS,
        init_batch={"tokens": np.zeros((1, 1), np.int32)},
        rows=prepare_rows,
        random_rows=random_rows,
        loss=next_token_loss(config.train.loss_chunk),
        counts=counts,
        metrics=losses.metrics,
        score=score,
        training_flops=run_training_flops,
    )


def prepare_rows(config: RunConfig, split: str) -> Rows:
    """Opens a split's packed rows, and prepares them first if they do not exist yet."""
    # Preparing data needs the packages of the extra `run`. The loss alone needs none of them.
    from moe.data.prepare import open_split

    return open_split(config.data, split)


def random_rows(config: RunConfig, num_rows: int) -> dict[str, np.ndarray]:
    """Makes rows of random tokens. Each row is one document, without padding."""
    shape = (num_rows, config.data.sequence_length)
    generator = np.random.default_rng(config.seed)
    return {
        "tokens": generator.integers(0, config.model.vocab_size, shape, np.int32),
        "targets": generator.integers(0, config.model.vocab_size, shape, np.int32),
        "loss_mask": np.ones(shape, bool),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }


def next_token_loss(chunk: int) -> Callable[[Any, Unembedding, Batch], Sums]:
    """Makes the loss function, which computes the logits of `chunk` positions at a time."""

    def loss(output: Output, unembedding: Unembedding, batch: Batch) -> Sums:
        total = cross_entropy_sum(
            output.hidden, unembedding, batch["targets"], batch["loss_mask"], chunk
        )
        return {"loss": total, "router": losses.in_layer_order(output.stats), **counts(batch)}

    return loss


def counts(batch: Batch) -> Sums:
    """Counts a batch's targets and its tokens without padding.

    They are known from the batch alone, so that each microbatch can be weighted by its share of
    the whole batch. Without `segment_ids` there is no padding, as for a model. Raises TypeError for
    a `loss_mask` that is not bool.
    """
    mask_BT = batch["loss_mask"]
    check_mask("loss_mask", mask_BT)
    is_text = batch["segment_ids"] > 0 if "segment_ids" in batch else jnp.ones_like(mask_BT)
    return {
        "targets": jnp.sum(mask_BT, dtype=jnp.float32),
        "tokens": jnp.sum(is_text, dtype=jnp.float32),
    }


def score(sums: Sums, rows: Any) -> dict[str, float]:
    """Returns an evaluation's bits per byte, if the rows know their bytes."""
    if not rows.num_bytes:
        return {}
    loss = float(losses.mean(sums["loss"], sums["targets"]))
    return {"bits_per_byte": bits_per_byte(loss, rows.num_targets, rows.num_bytes)}


def no_score(sums: Sums, rows: Any) -> dict[str, float]:
    """Returns nothing: a loss on parts of a text, or on other tokens, says no bits per byte."""
    return {}


def bits_per_byte(nats_per_target: float, num_targets: int, num_bytes: int) -> float:
    """Converts a mean loss to bits per byte of text, which does not depend on the tokenizer."""
    return nats_per_target * num_targets / num_bytes / math.log(2)
