"""Defines fill in the middle: a decoder writes the middle of a text after what surrounds it."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe import losses
from moe.config import RunConfig
from moe.config.objectives import MIDDLE_TOKENS
from moe.cross_entropy import Unembedding, cross_entropy_sums
from moe.data.objectives.fill_in_the_middle import MiddleIds, move_middles, prompt
from moe.data.rows import Transform
from moe.data.tokenizers import Tokenizer, make_tokenizer
from moe.losses import Sums
from moe.model.stack import Output
from moe.tasks.language_modelling import DIMS as TEXT_DIMS
from moe.tasks.language_modelling import counts, language_modelling, no_score
from moe.tasks.language_modelling import random_rows as random_text
from moe.tasks.task import Batch, Task

DIMS = TEXT_DIMS | {"in_middle": "BT"}


def fill_in_the_middle(config: RunConfig) -> Task:
    """Returns the task of a decoder that also learns to fill in the middle of a document.

    Every token is a target, those of prefix and suffix too, as in section 3 of Bavarian et al.
    2022. The loss of the middles is a metric of its own. Rows hold other tokens than the text, so
    their loss says nothing of its bits per byte.
    """
    return language_modelling(config)._replace(
        dims=DIMS,
        random_rows=random_rows,
        loss=loss(config.train.loss_chunk),
        metrics=metrics,
        score=no_score,
        special_tokens=MIDDLE_TOKENS,
        transform=transform,
    )


def transform(config: RunConfig) -> Transform:
    """Returns the function that moves the middles of a prepared row's documents."""
    ids = middle_ids(make_tokenizer(config.data, MIDDLE_TOKENS))
    return functools.partial(move_middles, rate=config.data.middle_rate, ids=ids)


def middle_ids(tokenizer: Tokenizer) -> MiddleIds:
    """Returns the ids of the task's special tokens, and of a document's end."""
    ids = (tokenizer.special_ids[name] for name in MIDDLE_TOKENS)
    return MiddleIds(*ids, end=tokenizer.boundary_id)


def middle_prompt(config: RunConfig, prefix: str, suffix: str) -> np.ndarray:
    """Returns the tokens after which a run's model writes what stands between two texts."""
    tokenizer = make_tokenizer(config.data, MIDDLE_TOKENS)
    ids = middle_ids(tokenizer)
    parts = prompt(tokenizer.encode(prefix), tokenizer.encode(suffix), ids)
    return np.concatenate([[ids.end], parts])  # a document begins with a boundary


def loss(chunk: int) -> Callable[[Any, Unembedding, Batch], Sums]:
    """Makes the loss function, which also sums over the middles alone."""

    def sums(output: Output, unembedding: Unembedding, batch: Batch) -> Sums:
        total, middle = cross_entropy_sums(
            output.hidden,
            unembedding,
            batch["targets"],
            batch["loss_mask"],
            (batch["in_middle"],),
            chunk,
        )
        return {
            "loss": total,
            "middle_loss": middle,
            "middle_targets": jnp.sum(batch["in_middle"], dtype=jnp.float32),
            "router": losses.in_layer_order(output.stats),
            **counts(batch),
        }

    return sums


def metrics(sums: Sums) -> dict[str, Any]:
    """Returns the loss per target, that per target of a middle, and the routers' statistics."""
    middle = losses.mean(sums["middle_loss"], sums["middle_targets"])
    return losses.metrics(sums) | {"middle_loss": middle}


def random_rows(config: RunConfig, num_rows: int) -> dict[str, np.ndarray]:
    """Makes rows of random tokens, whose second half counts as a middle."""
    rows = random_text(config, num_rows)
    length = config.data.sequence_length
    in_middle = np.broadcast_to(np.arange(length) >= length // 2, (num_rows, length))
    return rows | {"in_middle": in_middle}
