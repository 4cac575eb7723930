"""Sampling from a decoder with a key/value cache."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ConfigError
from moe.config.checks import LARGEST_FLOAT, SMALLEST_FLOAT
from moe.scaling.hardware import memory_bytes


class Sampling(NamedTuple):
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k 0 and top_p 1 leave
    every token in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


PLAIN = Sampling()  # draws from the model's own distribution


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    end_id: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
) -> list[np.ndarray]:
    """Continues each prompt (token ids, at least one) until `end_id`, which is left out, or
    `max_new_tokens`.

    A prompt's continuation depends on (variables, prompt, sampling, seed, its place in `prompts`),
    and on the other prompts by float tolerance alone.
    """
    check_sampling(sampling, max_new_tokens)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths_B) or lengths_B.min() < 1:
        raise ConfigError(
            f"prompts have {lengths_B.tolist()} tokens: give at least one prompt, each of one token or more"
        )
    check_tokens(prompts, model.config.vocab_size)
    check_memory(model, len(prompts), int(lengths_B.max()), max_new_tokens)
    tokens_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    key = jax.random.key(seed)
    new_BT = np.asarray(
        _generate(
            model.without_jitter(),
            max_new_tokens,
            end_id,
            sampling,
            variables,
            tokens_BT,
            lengths_B,
            key,
        )
    )
    return [_until(row, end_id) for row in new_BT]


def check_sampling(sampling: Sampling, max_new_tokens: int) -> None:
    """Raises ConfigError where a sampling option makes no sense."""
    if sampling.temperature and not SMALLEST_FLOAT <= sampling.temperature <= LARGEST_FLOAT:
        raise ConfigError(
            f"temperature={sampling.temperature} is out of range: set it to 0 (the likeliest token), or from {SMALLEST_FLOAT:.7g} to "
            f"{LARGEST_FLOAT:.7g}"
        )
    if sampling.top_k < 0:
        raise ConfigError(
            f"top_k={sampling.top_k} is negative: set it to a number of tokens, or 0 for all"
        )
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p} is out of range: set it above 0 and up to 1")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not positive: set it to 1 or more")


def check_tokens(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises ConfigError for a token that the model has no embedding of."""
    tokens = np.concatenate(prompts)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ConfigError(
            f"prompts hold the token {wrong[0]}, and vocab_size={vocab_size}: give tokens from 0 to {vocab_size - 1}"
        )


def check_memory(model: nn.Module, batch_size: int, length: int, max_new_tokens: int) -> None:
    """Raises ConfigError where the key/value cache cannot fit in a device's memory, or, for a CPU,
    in the machine's.
    """
    slot = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(batch_size, 1)))
    slot_bytes = sum(
        x.size * x.dtype.itemsize for x in slot
    )  # each token is written in place: programs hold one cache
    memory = memory_bytes(jax.local_devices()[0])
    needed, most = (length + max_new_tokens) * slot_bytes, max(memory // slot_bytes - length, 1)
    if needed > memory:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} takes {needed / 2**30:.1f} GiB of key/value cache, and there are {memory / 2**30:.1f} GiB of "
            f"memory: set max_new_tokens to less than {most}, or give fewer prompts"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: nn.Module,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
    variables: Any,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
) -> jax.Array:
    batch_size, length = prompts_BT.shape
    is_prompt_BT = (
        jnp.arange(length, dtype=jnp.int32)[None] < lengths_B[:, None]
    )  # padding takes no expert's room
    cache = model.init_cache(batch_size, length + max_new_tokens)
    hidden_BTD, cache = _forward(
        model,
        variables,
        {"tokens": prompts_BT, "segment_ids": is_prompt_BT.astype(jnp.int32)},
        cache,
    )
    first_B = _draw(
        model,
        variables,
        hidden_BTD[jnp.arange(batch_size), lengths_B - 1],
        key,
        lengths_B,
        sampling,
    )

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        index, token_B, _, _ = carry
        return (index < max_new_tokens) & jnp.any(token_B != end_id)

    def extend(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, token_B, new_BT, cache = carry
        new_BT = new_BT.at[:, index].set(token_B)
        hidden_BTD, cache = _forward(
            model,
            variables,
            {"tokens": token_B[:, None], "positions": (lengths_B + index)[:, None]},
            cache,
        )
        next_B = _draw(model, variables, hidden_BTD[:, 0], key, lengths_B + index + 1, sampling)
        return index + 1, jnp.where(token_B == end_id, end_id, next_B), new_BT, cache

    new_BT = jnp.full((batch_size, max_new_tokens), end_id, jnp.int32)
    return jax.lax.while_loop(unfinished, extend, (jnp.int32(0), first_B, new_BT, cache))[2]


def _forward(
    model: nn.Module, variables: Any, batch: dict[str, jax.Array], cache: Any
) -> tuple[jax.Array, Any]:
    output = model.apply(variables, batch, cache)
    return output.hidden, output.cache


def _draw(
    model: nn.Module,
    variables: Any,
    hidden_BD: jax.Array,
    key: jax.Array,
    positions_B: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """The token at each row's position; its randomness is a function of (seed, row, position)
    alone.
    """
    logits_BV = model.apply(variables, hidden_BD[:, None], method="unembed")[:, 0]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    rows_B = jnp.arange(positions_B.shape[0])
    keys_B = jax.vmap(
        lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
    )(rows_B, positions_B)
    # The largest becomes 0, which no temperature makes infinite.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = keep_likeliest(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_likeliest(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits with -inf outside the `top_k` largest (0: all) and outside the nucleus of mass `top_p`
    (Holtzman et al. 2020, eq. 2-3).

    Tokens are kept by rank: of equal logits the one with the lower id comes first.
    """
    if not top_k and top_p == 1:
        return logits_BV
    size = logits_BV.shape[-1]
    sorted_BK, ids_BK = jax.lax.top_k(logits_BV, min(top_k or size, size))
    probs_BK = jax.nn.softmax(sorted_BK, axis=-1)
    mass_before_BK = jnp.cumsum(probs_BK, axis=-1) - probs_BK
    # The nucleus ends with the token whose mass reaches top_p. Sums of rounded probabilities miss a
    # mass that is exactly top_p by some 1e-7 of it. The first token stays even if float32 makes 0
    # of top_p.
    is_inside_BK = (mass_before_BK <= top_p * (1 - 1e-6)) | (top_p == 1)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return (
        jnp.full_like(logits_BV, -jnp.inf)
        .at[rows_B1, ids_BK]
        .set(jnp.where(is_inside_BK, sorted_BK, -jnp.inf))
    )


def _until(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
    ends = np.flatnonzero(tokens_T == end_id)
    return tokens_T[: ends[0]] if len(ends) else tokens_T
