"""Continues prompts by sampling from a decoder with a key/value cache."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ConfigError
from moe.inference.sampling import PLAIN, Sampling, check_sampling
from moe.scaling.hardware import memory_bytes

_CHUNK = 16  # new tokens of each row between two looks at what is there


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    end_id: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    pad_to: int = 0,
) -> list[np.ndarray]:
    """Continues each prompt until `end_id`, or for at most `max_new_tokens` tokens.

    A prompt is an array of at least one token id. The result holds its new ids, without `end_id`.
    Shorter prompts are padded to `pad_to` tokens, so that batches of prompts share a program.
    It depends on the variables, the prompt, the sampling, the seed and the prompt's place in
    `prompts`. The other prompts change its logits only within float tolerance. Raises ConfigError
    for options or prompts that make no sense, and for a cache that does not fit in memory.
    """
    chunks = stream(
        model,
        variables,
        prompts,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        seed=seed,
        sampling=sampling,
        pad_to=pad_to,
    )
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def stream(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    end_id: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    pad_to: int = 0,
) -> Iterator[list[np.ndarray]]:
    """Yields the next few new ids of each prompt while they are sampled.

    All parts of a prompt, one after another, are what `generate` returns for it. A prompt whose
    end has come has empty parts until all have ended. The arguments and errors are those of
    `generate`, and the errors are raised by the call itself.
    """
    check_sampling(sampling, max_new_tokens)
    if not 0 <= seed < 2**32:  # JAX would take its lowest 32 bits, which are another seed
        raise ConfigError(f"seed={seed} is out of range: set it to at least 0 and less than 2**32")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths_B) or lengths_B.min() < 1:
        raise ConfigError(
            f"prompts have {lengths_B.tolist()} tokens: "
            "give at least one prompt, each of one token or more"
        )
    check_tokens(prompts, model.config.vocab_size)
    length = max(int(lengths_B.max()), pad_to)
    check_cache_memory(model, len(prompts), length, max_new_tokens)
    padded = [np.pad(prompt, (0, length - len(prompt))) for prompt in prompts]
    return _stream(
        _Loop(model.without_jitter(), max_new_tokens, end_id, sampling),
        variables,
        np.stack(padded, dtype=np.int32),
        lengths_B,
        jax.random.key(seed),
    )


def check_tokens(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises ConfigError for a token that the model cannot embed."""
    tokens = np.concatenate(prompts)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ConfigError(
            f"prompts hold the token {wrong[0]}, and vocab_size={vocab_size}: "
            f"give tokens from 0 to {vocab_size - 1}"
        )


def check_cache_memory(model: nn.Module, batch_size: int, length: int, max_new_tokens: int) -> None:
    """Raises ConfigError if the key/value cache does not fit in the memory of a device.

    For a CPU this is the memory of the whole machine.
    """
    slots = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(batch_size, 1)))
    slot_bytes = sum(x.size * x.dtype.itemsize for x in slots)
    memory = memory_bytes(jax.local_devices()[0])
    # Each token is written into the cache in place, so a program holds the cache only once.
    needed, most = (length + max_new_tokens) * slot_bytes, max(memory // slot_bytes - length, 1)
    if needed > memory:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} takes {needed / 2**30:.1f} GiB of key/value cache, "
            f"and there are {memory / 2**30:.1f} GiB of memory: "
            f"set max_new_tokens to less than {most}, or give fewer prompts"
        )


class _Loop(NamedTuple):
    """Holds what the loop over new tokens is compiled for."""

    model: nn.Module
    max_new_tokens: int
    end_id: int
    sampling: Sampling


class _Progress(NamedTuple):
    """Holds what the loop over new tokens carries from one token to the next."""

    index: jax.Array  # how many new tokens are written
    token_B: jax.Array  # the next token of each row, which is not written yet
    cache: Any


def _stream(
    loop: _Loop, variables: Any, prompts_BT: np.ndarray, lengths_B: np.ndarray, key: jax.Array
) -> Iterator[list[np.ndarray]]:
    """Yields the new tokens of each row, a chunk at a time, until each row has ended."""
    progress = _read_prompts(loop, variables, prompts_BT, lengths_B, key)
    is_unfinished_B = np.ones(len(lengths_B), bool)
    for first in range(0, loop.max_new_tokens, _CHUNK):
        progress, new_BT = _extend(loop, variables, progress, lengths_B, key)
        rows = [_before_end(row_T, loop.end_id) for row_T in np.asarray(new_BT)]
        rows = [row[: loop.max_new_tokens - first] for row in rows]
        yield rows
        is_unfinished_B &= [len(row) == _CHUNK for row in rows]
        if not is_unfinished_B.any():
            return


@functools.partial(jax.jit, static_argnums=0)
def _read_prompts(
    loop: _Loop, variables: Any, prompts_BT: jax.Array, lengths_B: jax.Array, key: jax.Array
) -> _Progress:
    """Returns the first new token of each row, and a cache with the prompts' keys and values."""
    batch_size, length = prompts_BT.shape
    # Padding is in segment 0, so that it takes no room at the experts.
    is_prompt_BT = jnp.arange(length, dtype=jnp.int32)[None] < lengths_B[:, None]
    batch = {"tokens": prompts_BT, "segment_ids": is_prompt_BT.astype(jnp.int32)}
    cache = loop.model.init_cache(batch_size, length + loop.max_new_tokens)
    hidden_BTD, cache = _forward(loop.model, variables, batch, cache)
    last_BD = hidden_BTD[jnp.arange(batch_size), lengths_B - 1]
    first_B = _sample(loop.model, variables, last_BD, key, lengths_B, loop.sampling)
    return _Progress(jnp.int32(0), first_B, cache)


# The cache is donated: each chunk writes into the memory of the one before.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    loop: _Loop, variables: Any, progress: _Progress, lengths_B: jax.Array, key: jax.Array
) -> tuple[_Progress, jax.Array]:
    """Returns the progress and the new tokens [B, _CHUNK], with end_id where none is written."""
    model, max_new_tokens, end_id, sampling = loop
    first = progress.index
    end = jnp.minimum(first + _CHUNK, max_new_tokens)

    def is_unfinished(carried: tuple[_Progress, jax.Array]) -> jax.Array:
        progress, _ = carried
        return (progress.index < end) & jnp.any(progress.token_B != end_id)

    def extend(carried: tuple[_Progress, jax.Array]) -> tuple[_Progress, jax.Array]:
        (index, token_B, cache), new_BT = carried
        new_BT = new_BT.at[:, index - first].set(token_B)
        position_B = lengths_B + index
        batch = {"tokens": token_B[:, None], "positions": position_B[:, None]}
        hidden_BTD, cache = _forward(model, variables, batch, cache)
        next_B = _sample(model, variables, hidden_BTD[:, 0], key, position_B + 1, sampling)
        # A row that has ended stays at its end while others go on.
        next_B = jnp.where(token_B == end_id, end_id, next_B)
        return _Progress(index + 1, next_B, cache), new_BT

    new_BT = jnp.full((len(lengths_B), _CHUNK), end_id, jnp.int32)
    return jax.lax.while_loop(is_unfinished, extend, (progress, new_BT))


def _forward(
    model: nn.Module, variables: Any, batch: dict[str, jax.Array], cache: Any
) -> tuple[jax.Array, Any]:
    """Returns the hidden states of a batch, and the cache with its keys and values."""
    output = cast(Any, model.apply(variables, batch, cache))  # Flax does not know its type
    return output.hidden, output.cache


def _sample(
    model: nn.Module,
    variables: Any,
    hidden_BD: jax.Array,
    key: jax.Array,
    position_B: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """Samples the token at each row's position from the hidden state before it.

    Its random numbers depend only on the seed, the row and the position.
    """
    logits_B1V = model.apply(variables, hidden_BD[:, None], method="unembed")
    logits_BV = cast(jax.Array, logits_B1V)[:, 0]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    rows_B = jnp.arange(position_B.shape[0])
    fold_in = jax.random.fold_in
    keys_B = jax.vmap(lambda row, position: fold_in(fold_in(key, row), position))(
        rows_B, position_B
    )
    # The largest logit becomes 0, which stays finite however low the temperature is.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = keep_likeliest(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_likeliest(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Returns the logits, with -inf for tokens that must not be sampled.

    First the `top_k` tokens with the largest logits are kept, or all if `top_k` is 0. Their softmax
    gives their probabilities. Then their nucleus is kept: as few tokens as possible, the most
    probable ones, whose probabilities add up to `top_p` (Holtzman et al. 2020, eq. 2-3). Among
    tokens with equal logits, those with lower ids come first.
    """
    if not top_k and top_p == 1:
        return logits_BV
    vocab_size = logits_BV.shape[-1]
    # Here the suffix K stands for the tokens that are left, in the order of their logits.
    sorted_BK, ids_BK = jax.lax.top_k(logits_BV, min(top_k or vocab_size, vocab_size))
    probs_BK = jax.nn.softmax(sorted_BK, axis=-1)
    mass_before_BK = jnp.cumsum(probs_BK, axis=-1) - probs_BK
    # The nucleus ends with the token whose mass reaches top_p. Rounded probabilities can miss
    # top_p by about 1e-7 where the exact ones reach it, so the comparison has a margin. With "<="
    # the first token is inside even if float32 turns top_p into 0.
    is_inside_BK = (mass_before_BK <= top_p * (1 - 1e-6)) | (top_p == 1)
    likeliest_BK = jnp.where(is_inside_BK, sorted_BK, -jnp.inf)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.full_like(logits_BV, -jnp.inf).at[rows_B1, ids_BK].set(likeliest_BK)


def _before_end(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
    """Returns the tokens before the first `end_id`."""
    ends = np.flatnonzero(tokens_T == end_id)
    return tokens_T[: ends[0]] if len(ends) else tokens_T
