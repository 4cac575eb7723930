"""Attention of one or a few queries to a key/value cache, split over the sequence ("flash
decoding", Dao et al. 2023).

A query alone has next to nothing to do for each key that is read, and the heads of one row are too
few for a chip's cores. So the slots are cut into blocks, and a step of the loop meets several
neighbouring ones at once, one to each split. A split has an online softmax of its own, and
log-sum-exp's arithmetic merges them at the end. As the splits take turns along the sequence, none
is idle while the prefix is short, and the loop ends with the longest row.
"""

import jax
import jax.numpy as jnp

from moe.kernels.attention.blockwise import matmul, sum_dtype
from moe.kernels.attention.choice import check, make_options
from moe.kernels.attention.masks import Options, Window
from moe.kernels.settings import own_settings

BLOCK = 64  # slots that one split meets in one step
# at least, where there are slots for them: a smaller step would be too little for what it costs to
# start one
SPLITS = 4
STEPS = 16  # at most, or one more: a longer cache has more splits, and a step reads this part of it


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
    """softmax(scale q kᵀ) v over the slots 0 to positions_BT[b, t] of a cache, for each query (b,
    t): [B, T, N, H], q's dtype.

    Slots are positions. N is a multiple of K, and H of the result that of `v_BSKH`. `window` (left,
    right), `softcap`, `sinks` [N] and `scale` are those of `flash_attention`, with causal=True:
    nothing to the right is seen. A query at position -1 sees nothing, and gives zeros; one beyond
    the cache, at position S or more, gives NaN. Sums are float32; beside the results, memory holds
    the logits of a step, those of S / 16 slots. With `layer` the caches are those of several
    layers, [L, B, S, K, H], of which that one's is read: so a loop over layers can carry them all
    and copy none.

    Slots that no query of a row sees may hold anything, NaN too; where a row has several queries,
    NaN in a value that one of them sees reaches the others. For inference alone: it has no gradient
    in reverse mode. Raises ValueError for shapes that do not agree, and for more queries than
    slots.
    """
    k_LBSKH, v_LBSKH = (k_BSKH[None], v_BSKH[None]) if layer is None else (k_BSKH, v_BSKH)
    check(
        q_BTNH,
        *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (k_LBSKH, v_LBSKH)),
        sinks,
        None,
        None,
        window,
        softcap,
        scale,
    )
    _check_cache(q_BTNH, k_LBSKH, positions_BT, layer)
    positions_BT, layer = (
        jnp.asarray(positions_BT, jnp.int32),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
    )
    sinks = None if sinks is None else jnp.asarray(sinks, sum_dtype(q_BTNH))
    with own_settings(q_BTNH.dtype):
        return _attend(
            make_options(q_BTNH, True, window, softcap, scale),
            q_BTNH,
            k_LBSKH,
            v_LBSKH,
            positions_BT,
            layer,
            sinks,
        )


def _check_cache(
    q_BTNH: jax.Array, k_LBSKH: jax.Array, positions_BT: jax.Array, layer: jax.Array | int | None
) -> None:
    """Raises ValueError, in one line, for what a cache cannot hold or does not have."""
    (layers, _, slots), length = k_LBSKH.shape[:3], q_BTNH.shape[1]
    if positions_BT.shape != q_BTNH.shape[:2]:
        raise ValueError(
            f"positions {positions_BT.shape} must be {q_BTNH.shape[:2]}, one for each query of q {q_BTNH.shape}"
        )
    if positions_BT.dtype.kind not in "iu":
        raise ValueError(f"positions {positions_BT.dtype} must be integers")
    if length > slots:
        raise ValueError(
            f"q {q_BTNH.shape} has {length} queries a row and the cache {slots} slots: make the cache longer"
        )
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise ValueError(
            f"layer={layer} must be at least 0 and less than {layers}, the layers of the cache"
        )


def _attend(
    options: Options,
    q_BTNH: jax.Array,
    k_LBSKH: jax.Array,
    v_LBSKH: jax.Array,
    positions_BT: jax.Array,
    layer: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    (batch, length, heads, _), (slots, kv_heads) = q_BTNH.shape, k_LBSKH.shape[2:4]
    block = min(BLOCK, slots)
    splits = min(max(SPLITS, slots // (BLOCK * STEPS)), slots // block)
    stride, left, softcap = splits * block, options.left, options.softcap
    q_BKRH = _by_kv_head(
        q_BTNH, kv_heads
    )  # R: each position of each head that shares the key, so that one matmul takes them all
    positions_B11R1 = jnp.repeat(positions_BT, heads // kv_heads, axis=1)[:, None, None, :, None]

    def meet(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        output, highest, total = carry
        start = jnp.minimum(
            step * stride, slots - stride
        )  # the last step of a cache of other lengths looks back
        keys, values = (
            _slice(x, layer, start, stride).reshape(batch, splits, block, *x.shape[3:])
            for x in (k_LBSKH, v_LBSKH)
        )
        logits = matmul("bkrh,bpskh->bpkrs", q_BKRH, keys) * options.scale
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        at = (start + jnp.arange(stride)).reshape(1, splits, 1, 1, block)
        seen = (at <= positions_B11R1) & (at >= step * stride)
        seen = seen if left is None else seen & (at >= positions_B11R1 - left)
        logits = jnp.where(seen, logits, -jnp.inf)
        # A weight of 0 times NaN would be NaN, and slots that were not written yet may hold it.
        values = jnp.where(jnp.any(seen, axis=(2, 3))[..., None, None], values, 0)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        base = _finite(new_highest)  # nothing is seen yet: all weights are zero
        weights, kept = jnp.exp(logits - base[..., None]), jnp.exp(highest - base)
        product = matmul("bpkrs,bpskh->bpkrh", weights.astype(values.dtype), values)
        return (
            output * kept[..., None] + product,
            new_highest,
            total * kept + jnp.sum(weights, axis=-1),
        )

    shape, dtype = (batch, splits, *q_BKRH.shape[1:3]), sum_dtype(q_BTNH)
    carry = (
        jnp.zeros((*shape, v_LBSKH.shape[4]), dtype),
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
    )
    carry = jax.lax.fori_loop(*_steps(positions_BT, left, slots, stride), meet, carry)
    output = _merge(*carry, _sinks_by_row(sinks, kv_heads, length, dtype))
    groups = output.reshape(batch, kv_heads, length, -1, output.shape[-1])
    output = jnp.moveaxis(groups, 2, 1).reshape(batch, length, heads, -1).astype(q_BTNH.dtype)
    return jnp.where((positions_BT < slots)[..., None, None], output, jnp.nan)


def _steps(
    positions_BT: jax.Array, left: int | None, slots: int, stride: int
) -> tuple[jax.Array | int, jax.Array]:
    """The first step that some query needs, and one past the last."""
    end = jnp.minimum(jnp.max(positions_BT), slots - 1) // stride + 1
    return 0 if left is None else jnp.maximum(jnp.min(positions_BT) - left, 0) // stride, end


def _slice(x_LBSKH: jax.Array, layer: jax.Array | int, start: jax.Array, size: int) -> jax.Array:
    """A layer's slots `start` and on, and nothing done to the others.

    XLA takes what it does to the whole cache in each step out of the loop. On a CPU that would be a
    conversion of all of bfloat16, unless the cache is tied to the step; on a TPU being tied costs a
    copy.
    """

    def plain(x: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        _, batch, _, *rest = x.shape
        zero = jnp.int32(0)
        return jax.lax.dynamic_slice(x, (layer, zero, start, zero, zero), (1, batch, size, *rest))[
            0
        ]

    tied = lambda *arrays: plain(*jax.lax.optimization_barrier(arrays))
    return jax.lax.platform_dependent(x_LBSKH, layer, start, cpu=tied, default=plain)


def _merge(output: jax.Array, highest: jax.Array, total: jax.Array, sinks: jax.Array) -> jax.Array:
    """One attention [B, K, R, H] of those of the splits [B, P, K, R, H] and of the sinks [K, R],
    which carry no value.
    """
    base = _finite(jnp.maximum(jnp.max(highest, axis=1), sinks))
    share = jnp.exp(highest - base[:, None])
    total = jnp.sum(total * share, axis=1) + jnp.exp(sinks - base)
    return jnp.sum(output * share[..., None], axis=1) / jnp.where(total > 0, total, 1.0)[..., None]


def _sinks_by_row(
    sinks_N: jax.Array | None, kv_heads: int, length: int, dtype: jnp.dtype
) -> jax.Array:
    if sinks_N is None:
        return jnp.full((kv_heads, 1), -jnp.inf, dtype)
    return jnp.tile(sinks_N.astype(dtype).reshape(kv_heads, -1), length)


def _by_kv_head(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    batch, length, _, width = q_BTNH.shape
    groups = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    return jnp.moveaxis(groups, 1, 2).reshape(batch, kv_heads, -1, width)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)
