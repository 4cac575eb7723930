"""Computes how likely a decoder finds the ends of sequences of tokens."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe.inference.generate import check_tokens
from moe.parallel.mesh import global_batch

_SHORTEST = 32  # shorter sequences are padded to this length
_CHUNK = 256  # positions whose logits exist at the same time
_DIMS = {"tokens": "BT", "segment_ids": "BT", "targets": "BT", "is_scored": "BT"}


class Part(NamedTuple):
    """Holds a sequence of tokens, of which those from `start` on are scored."""

    tokens: np.ndarray
    start: int  # at least 1, as a token is predicted from those before it


class Score(NamedTuple):
    """Says how likely the scored tokens are, given those before them."""

    log_prob: float  # the sum of their logarithms' probabilities, in nats
    is_greedy: bool  # whether each of them is the likeliest at its place


def padded_length(length: int) -> int:
    """Returns the power of two to which a sequence is padded, so that few programs are compiled."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def score_parts(
    model: nn.Module,
    variables: Any,
    parts: Sequence[Part],
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[int, Score]]:
    """Yields the number and the score of each part, the longest parts first.

    `batch_size` sequences of similar lengths are scored at once. The devices of `mesh` share them,
    as they share the variables. Raises ConfigError for tokens that the model does not know.
    """
    if parts:
        check_tokens([part.tokens for part in parts], model.config.vocab_size)
    order = sorted(range(len(parts)), key=lambda number: -len(parts[number].tokens))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        fields = _fields([parts[number] for number in numbers], batch_size)
        with jax.set_mesh(mesh):
            batch = global_batch(fields, mesh, batch_size, _DIMS)
            log_probs_B, is_greedy_B = _score(model.without_jitter(), variables, batch)
        scores = zip(np.asarray(log_probs_B), np.asarray(is_greedy_B), strict=True)
        for number, (log_prob, is_greedy) in zip(numbers, scores, strict=False):
            yield number, Score(float(log_prob), bool(is_greedy))


def _fields(parts: Sequence[Part], batch_size: int) -> dict[str, np.ndarray]:
    """Returns the batch of some parts, which empty rows fill up."""
    # The last token of a sequence is only a target.
    length = padded_length(max(len(part.tokens) for part in parts) - 1)
    tokens, segment_ids, targets = np.zeros((3, batch_size, length), np.int32)
    is_scored = np.zeros((batch_size, length), bool)
    for row, part in enumerate(parts):
        end = len(part.tokens) - 1
        tokens[row, :end], targets[row, :end] = part.tokens[:-1], part.tokens[1:]
        segment_ids[row, :end] = 1
        is_scored[row, part.start - 1 : end] = True
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "targets": targets,
        "is_scored": is_scored,
    }


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: nn.Module, variables: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each row's scored tokens [B], and whether they are greedy."""
    inputs = {name: batch[name] for name in ("tokens", "segment_ids")}
    output = cast(Any, model.apply(variables, inputs))  # Flax does not know its type
    chunk = min(_CHUNK, batch["tokens"].shape[1])

    def add_chunk(sums: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, None]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
        logits = cast(jax.Array, model.apply(variables, cut(output.hidden), method="unembed"))
        log_probs_BTV = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        targets_BT, is_scored_BT = cut(batch["targets"]), cut(batch["is_scored"])
        log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
        is_likeliest_BT = jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets_BT
        log_prob_B = sums[0] + jnp.sum(jnp.where(is_scored_BT, log_probs_BT, 0.0), axis=1)
        return (log_prob_B, sums[1] & jnp.all(is_likeliest_BT | ~is_scored_BT, axis=1)), None

    rows = batch["tokens"].shape[0]
    start = jnp.zeros(rows, jnp.float32), jnp.ones(rows, bool)
    starts = jnp.arange(0, batch["tokens"].shape[1], chunk)
    return jax.lax.scan(add_chunk, start, starts)[0]
