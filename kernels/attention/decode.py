"""Computes attention of a few queries to a key/value cache ("flash decoding", Dao et al. 2023).

One query does little arithmetic for each key that it reads, and one row has too few heads to occupy
a chip's cores. So the slots of the cache are cut into blocks, and a step of the loop takes several
neighbouring blocks at once, one for each split. Each split has an online softmax (O, m, l) of its
own, and the splits are merged at the end. Blocks that are neighbours in the cache belong to
different splits, so no split is idle while the prefix is short, and the loop stops where the
longest row ends.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention.blockwise import matmul, sum_dtype
from moe.kernels.attention.inputs import Inputs, Options, Window, check_inputs, make_options
from moe.kernels.settings import own_settings

BLOCK = 64  # the slots that one split takes in one step
# The least number of splits, if the cache is long enough. With fewer, the cost of starting a step
# would outweigh its work.
SPLITS = 4
# About how many steps read a full cache; a short cache takes fewer. So a longer cache has more
# splits, not more steps.
STEPS = 16


class LayerCache(NamedTuple):
    """The keys and values of several layers, of which one is read."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    layer: jax.Array


class SoftmaxState(NamedTuple):
    """The online softmax of each split: [B, P, K, R], and H for the output.

    P counts the splits, and R the positions of all heads that share a key.
    """

    output: jax.Array
    running_max: jax.Array
    denominator: jax.Array


def decode_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Returns softmax(scale q kᵀ) v over slots 0 to positions_BT[b, t] of a cache: [B, T, N, H].

    A slot is a position. N is a multiple of K. The result has the dtype of `q_BTNH`, and the H of
    `v_BSKH`. `window` (left, right), `softcap`, `sinks` [N] and `scale` are those of
    `flash_attention` with causal=True. With `layer` the caches are those of several layers, [L, B,
    S, K, H], of which one is read: a loop over layers can carry them all and copy none.

    A query at position -1 sees nothing, and gives zeros; one beyond the cache, at position S or
    more, gives NaN. Slots that no query of a row sees may hold anything, NaN too; where a row has
    several queries, NaN in a value that one of them sees reaches the others. Sums are float32.
    There is no gradient in reverse mode: the function is for inference alone. Raises ValueError for
    shapes that do not agree, and for more queries than slots.
    """
    k_LBSKH, v_LBSKH = (k_BSKH[None], v_BSKH[None]) if layer is None else (k_BSKH, v_BSKH)
    k, v = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (k_LBSKH, v_LBSKH))
    # Only shapes and dtypes are checked.
    check_inputs(Inputs(q_BTNH, cast(Any, k), cast(Any, v), sinks))
    options = make_options(q_BTNH.shape[3], True, window, softcap, scale)
    _check_cache(q_BTNH, k_LBSKH, positions_BT, layer)
    positions_BT = jnp.asarray(positions_BT, jnp.int32)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    sinks = None if sinks is None else jnp.asarray(sinks, sum_dtype(q_BTNH))
    cache = LayerCache(k_LBSKH, v_LBSKH, layer)
    with own_settings(q_BTNH.dtype):
        return _attend(options, q_BTNH, cache, positions_BT, sinks)


def _check_cache(
    q_BTNH: jax.Array, k_LBSKH: jax.Array, positions_BT: jax.Array, layer: jax.Array | int | None
) -> None:
    """Raises ValueError, in one line, for positions or a layer that the cache does not have."""
    (layers, _, slots), length = k_LBSKH.shape[:3], q_BTNH.shape[1]
    if positions_BT.shape != q_BTNH.shape[:2]:
        raise ValueError(
            f"positions {positions_BT.shape} must be {q_BTNH.shape[:2]}, "
            f"one for each query of q {q_BTNH.shape}"
        )
    if positions_BT.dtype.kind not in "iu":
        raise ValueError(f"positions {positions_BT.dtype} must be integers")
    if length > slots:
        raise ValueError(
            f"q {q_BTNH.shape} has {length} queries a row and the cache {slots} slots: "
            "make the cache longer"
        )
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise ValueError(
            f"layer={layer} must be at least 0 and less than {layers}, the layers of the cache"
        )


def _attend(
    options: Options,
    q_BTNH: jax.Array,
    cache: LayerCache,
    positions_BT: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    (batch, length, heads, _), (slots, kv_heads) = q_BTNH.shape, cache.k_LBSKH.shape[2:4]
    block = min(BLOCK, slots)
    splits = min(max(SPLITS, slots // (BLOCK * STEPS)), slots // block)
    # R counts the positions of all heads that share a key, so that one matmul takes them all.
    q_BKRH = _by_kv_head(q_BTNH, kv_heads)
    positions_B11R1 = jnp.repeat(positions_BT, heads // kv_heads, axis=1)[:, None, None, :, None]

    def take_step(step: jax.Array, state: SoftmaxState) -> SoftmaxState:
        return _take_step(options, q_BKRH, cache, positions_B11R1, splits, step, state)

    shape, dtype = (batch, splits, *q_BKRH.shape[1:3]), sum_dtype(q_BTNH)
    state = SoftmaxState(
        jnp.zeros((*shape, cache.v_LBSKH.shape[4]), dtype),
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
    )
    first, end = _steps(positions_BT, options.left, slots, splits * block)
    state = jax.lax.fori_loop(first, end, take_step, state)
    output = _merge(state, _sinks_by_row(sinks, kv_heads, length, dtype))
    groups = output.reshape(batch, kv_heads, length, -1, output.shape[-1])
    output = jnp.moveaxis(groups, 2, 1).reshape(batch, length, heads, -1).astype(q_BTNH.dtype)
    return jnp.where((positions_BT < slots)[..., None, None], output, jnp.nan)


def _take_step(
    options: Options,
    q_BKRH: jax.Array,
    cache: LayerCache,
    positions_B11R1: jax.Array,
    splits: int,
    step: jax.Array,
    state: SoftmaxState,
) -> SoftmaxState:
    """Adds one block of slots to the online softmax of each split."""
    batch, slots = q_BKRH.shape[0], cache.k_LBSKH.shape[2]
    block = min(BLOCK, slots)
    stride = splits * block
    # If the stride does not divide the cache, the last step begins at an earlier slot than
    # step * stride. The slots that the step before has already taken are masked below.
    start = jnp.minimum(step * stride, slots - stride)
    keys, values = (
        _slice(x, cache.layer, start, stride).reshape(batch, splits, block, *x.shape[3:])
        for x in (cache.k_LBSKH, cache.v_LBSKH)
    )
    logits = matmul("bkrh,bpskh->bpkrs", q_BKRH, keys) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    slot = (start + jnp.arange(stride)).reshape(1, splits, 1, 1, block)
    mask = (slot <= positions_B11R1) & (slot >= step * stride)
    if options.left is not None:
        mask = mask & (slot >= positions_B11R1 - options.left)
    logits = jnp.where(mask, logits, -jnp.inf)
    # A weight of 0 times NaN would be NaN, and slots that were not written yet may hold it.
    values = jnp.where(jnp.any(mask, axis=(2, 3))[..., None, None], values, 0)
    # m_new = max(m, rowmax(S)). It is minus infinity where nothing is visible yet; with 0 in its
    # place all weights are exp(-inf) = 0 instead of NaN.
    new_max = jnp.maximum(state.running_max, jnp.max(logits, axis=-1))
    base = _finite(new_max)
    # P = exp(S - m_new); O and l, summed relative to m, are rescaled by exp(m - m_new).
    weights, rescale = jnp.exp(logits - base[..., None]), jnp.exp(state.running_max - base)
    product = matmul("bpkrs,bpskh->bpkrh", weights.astype(values.dtype), values)
    output = state.output * rescale[..., None] + product
    denominator = state.denominator * rescale + jnp.sum(weights, axis=-1)
    return SoftmaxState(output, new_max, denominator)


def _steps(
    positions_BT: jax.Array, left: int | None, slots: int, stride: int
) -> tuple[jax.Array | int, jax.Array]:
    """Returns the first step that a query needs, and one past the last."""
    end = jnp.minimum(jnp.max(positions_BT), slots - 1) // stride + 1
    if left is None:
        return 0, end
    # The query at the lowest position has the window that begins first.
    return jnp.maximum(jnp.min(positions_BT) - left, 0) // stride, end


def _slice(x_LBSKH: jax.Array, layer: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `size` slots of a layer, without touching the others.

    If a step does something to the whole cache, XLA does it once, before the loop. On a CPU it
    would convert a whole bfloat16 cache there, so a barrier ties the cache to the step. On a TPU
    the barrier would cost a copy.
    """

    def plain(x: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        _, batch, _, *rest = x.shape
        zero = jnp.int32(0)
        sizes = (1, batch, size, *rest)
        return jax.lax.dynamic_slice(x, (layer, zero, start, zero, zero), sizes)[0]

    tied = lambda *arrays: plain(*jax.lax.optimization_barrier(arrays))
    return jax.lax.platform_dependent(x_LBSKH, layer, start, cpu=tied, default=plain)


def _merge(state: SoftmaxState, sinks: jax.Array) -> jax.Array:
    """Returns [B, K, R, H], merged from the splits P and the sinks [K, R], which have no value."""
    # m of all splits and the sink. Each split's O and l are rescaled to it, and added up.
    base = _finite(jnp.maximum(jnp.max(state.running_max, axis=1), sinks))
    rescale = jnp.exp(state.running_max - base[:, None])
    denominator = jnp.sum(state.denominator * rescale, axis=1) + jnp.exp(sinks - base)
    output = jnp.sum(state.output * rescale[..., None], axis=1)
    return output / jnp.where(denominator > 0, denominator, 1.0)[..., None]


def _sinks_by_row(
    sinks_N: jax.Array | None, kv_heads: int, length: int, dtype: np.dtype
) -> jax.Array:
    """Returns the sink of each row [K, R], minus infinity where there are none."""
    if sinks_N is None:
        return jnp.full((kv_heads, 1), -jnp.inf, dtype)
    return jnp.tile(sinks_N.astype(dtype).reshape(kv_heads, -1), length)


def _by_kv_head(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Turns [B, T, N, H] into [B, K, R, H]."""
    batch, length, _, width = q_BTNH.shape
    groups = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    return jnp.moveaxis(groups, 1, 2).reshape(batch, kv_heads, -1, width)


def _finite(x: jax.Array) -> jax.Array:
    """Replaces infinities with 0, so that a difference from them is not NaN."""
    return jnp.where(jnp.isfinite(x), x, 0.0)
