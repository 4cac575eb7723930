"""Defines span corruption: a decoder writes the spans that an encoder's text lacks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe.config import ModelConfig, RunConfig
from moe.config.objectives import SENTINELS
from moe.cross_entropy import Unembedding
from moe.data.objectives.span_corruption import corrupt_spans
from moe.data.rows import Rows, Transform
from moe.data.tokenizers import make_tokenizer
from moe.losses import Sums
from moe.model.transformer import EncoderDecoder
from moe.tasks.language_modelling import DIMS as DECODER_DIMS
from moe.tasks.language_modelling import counts as decoder_counts
from moe.tasks.language_modelling import language_modelling, next_token_loss, no_score
from moe.tasks.language_modelling import prepare_rows as prepare_text
from moe.tasks.language_modelling import random_rows as random_text
from moe.tasks.task import Batch, Task

_ENCODER_FIELDS = ("tokens", "segment_ids", "positions")
DIMS = DECODER_DIMS | {f"encoder_{name}": DECODER_DIMS[name] for name in _ENCODER_FIELDS}


def span_corruption(config: RunConfig) -> Task:
    """Returns the task of an encoder and a decoder that restores hidden spans of its text.

    Both have `config.model`'s layers. A row of the encoder has `data.sequence_length` tokens, and
    the rows are prepared with as many tokens more as the spans hide.
    """
    ids = np.zeros((1, 1), np.int32)
    return language_modelling(config)._replace(
        model=make_model,
        dims=DIMS,
        init_batch={"tokens": ids, "encoder_tokens": ids},
        rows=prepare_rows,
        random_rows=random_rows,
        loss=loss(config.train.loss_chunk),
        counts=counts,
        score=no_score,
        special_tokens=SENTINELS,
        transform=transform,
    )


def make_model(config: ModelConfig) -> EncoderDecoder:
    """Makes the encoder and the decoder, which have the same config."""
    return EncoderDecoder(config, config)


def prepare_rows(config: RunConfig, split: str) -> Rows:
    """Opens a split's packed rows, whose length is that before the spans are hidden."""
    tokens = config.corrupted_row.tokens
    return prepare_text(with_sequence_length(config, tokens), split)


def transform(config: RunConfig) -> Transform:
    """Returns the function that hides spans of a prepared row."""
    tokenizer = make_tokenizer(config.data, SENTINELS)
    ids = [tokenizer.special_ids[name] for name in SENTINELS]
    return functools.partial(
        corrupt_spans,
        counts=config.corrupted_row,
        sentinel_ids=np.array(ids, np.int32),
        end_id=tokenizer.boundary_id,
    )


def loss(chunk: int) -> Callable[[Any, Unembedding, Batch], Sums]:
    """Makes the loss function, which is that of language modelling over the decoder's targets."""
    next_token = next_token_loss(chunk)
    return lambda output, unembedding, batch: next_token(output, unembedding, batch) | counts(batch)


def counts(batch: Batch) -> Sums:
    """Counts a batch's targets, and the tokens of a layer.

    Each stack has as many sparse layers as the other, so the mean of both over encoder and decoder
    gives every token of every layer the same weight in the routers' losses.
    """
    decoder = decoder_counts(batch)
    encoder_tokens = jnp.sum(batch["encoder_segment_ids"] > 0, dtype=jnp.float32)
    return decoder | {"tokens": (decoder["tokens"] + encoder_tokens) / 2}


def random_rows(config: RunConfig, num_rows: int) -> dict[str, np.ndarray]:
    """Makes rows of random tokens for encoder and decoder, each of one document."""
    inputs, targets = (
        random_text(with_sequence_length(config, length), num_rows) for length in config.row_lengths
    )
    return targets | {f"encoder_{name}": inputs[name] for name in _ENCODER_FIELDS}


def with_sequence_length(config: RunConfig, length: int) -> RunConfig:
    """Returns the config of a decoder whose rows have so many tokens."""
    data = dataclasses.replace(config.data, sequence_length=length)
    return dataclasses.replace(config, task="language_modelling", data=data)
