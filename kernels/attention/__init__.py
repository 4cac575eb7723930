"""Attention as plain functions of arrays, to be imported from here.

    output = flash_attention(q, k, v, causal=True, q_segment_ids=ids, kv_segment_ids=ids)

`attention_forward` and `attention_backward` are its two halves, for those that merge the attention of several ranges of keys themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe.kernels.attention import blockwise, reference, tpu
from moe.kernels.attention.causal import causal_attention
from moe.kernels.attention.masks import Options, span

__all__ = ["attention_backward", "attention_forward", "causal_attention", "flash_attention"]

Implementation = Literal["reference", "blockwise", "tpu"]
DTYPES = ("bfloat16", "float16", "float32", "float64")


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """softmax(scale q kᵀ) v over the keys that each query sees: [B, T, N, H] in the dtype of the queries (H is that of `v_BSKH`).

    N is a multiple of K: query head n reads key/value head n // (N / K). `causal` leaves out keys after the query, and `window`, (left,
    right), those more than so far before or after it; positions are counted from the offsets, which may be traced. Segment ids, integers
    [B, T] and [B, S], leave out keys of another id. `softcap` c makes scores s into c tanh(s / c) (Gemma 2). `sinks` [N] are logits that
    take part in the softmax and carry no value (gpt-oss). `scale` is 1 / sqrt(H) where it is None.

    With `return_lse` the result is (output, lse): the log-sum-exp of each query's logits, sinks included, [B, T, N] in float32, or float64
    for float64. A query that sees nothing has output 0 and lse of minus infinity, or its sink. Differentiable once, in reverse mode, in q,
    k, v and sinks, by way of output and lse. Raises ValueError for arguments that do not agree.

    Implementations: "blockwise", in plain JAX and the automatic choice; "tpu", Pallas kernels for TPUs, interpreted on a CPU; "reference".
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH, sinks, q_segment_ids, kv_segment_ids)
    check(*arrays, window)
    options = Options(*span(causal, window), softcap, q_BTNH.shape[-1] ** -0.5 if scale is None else scale)
    shift = jnp.asarray(q_offset, jnp.int32) - jnp.asarray(kv_offset, jnp.int32)
    output, lse = _attend(implementation or "blockwise", options, *arrays, shift)
    return (output, lse) if return_lse else output


def attention_forward(implementation: Implementation, options: Options, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """(output, lse) of q, k, v, sinks, the ids of queries and of keys (any of the three None), and the shift, an int32."""
    if implementation == "tpu":
        return jax.lax.platform_dependent(*arrays, **_tpu_and_cpu(tpu.forward, options))
    return {"reference": reference, "blockwise": blockwise}[implementation].forward(options, *arrays)


def attention_backward(
    implementation: Implementation, options: Options, *arrays: Any, lse_BTN: jax.Array, g_BTNH: jax.Array, row_sums_BTN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, of the arrays that `attention_forward` took, for the gradient `g_BTNH` of the output.

    `lse_BTN` may be of more keys than these: so a ring adds up what each range of keys contributes. `row_sums_BTN` is each query's sum over
    H of output times `g_BTNH` (of all keys, too), less the gradient of its lse.
    """
    arrays = (*arrays, lse_BTN, g_BTNH, row_sums_BTN)
    if implementation == "tpu":
        return jax.lax.platform_dependent(*arrays, **_tpu_and_cpu(tpu.backward, options))
    return {"reference": reference, "blockwise": blockwise}[implementation].backward(options, *arrays)


def _tpu_and_cpu(kernel: Callable[..., Any], options: Options) -> dict[str, Callable[..., Any]]:
    return {"tpu": functools.partial(kernel, options), "cpu": functools.partial(kernel, options, interpret=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation: Implementation, options: Options, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    return attention_forward(implementation, options, *arrays)


def _forward(implementation: Implementation, options: Options, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    output, lse = attention_forward(implementation, options, *arrays)
    return (output, lse), (arrays, output, lse)


def _backward(
    implementation: Implementation, options: Options, residuals: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    arrays, output, lse_BTN = residuals
    g_BTNH, g_lse_BTN = gradients
    row_sums_BTN = jnp.sum(output.astype(lse_BTN.dtype) * g_BTNH.astype(lse_BTN.dtype), axis=-1) - g_lse_BTN
    of_qkv = attention_backward(implementation, options, *arrays, lse_BTN=lse_BTN, g_BTNH=g_BTNH, row_sums_BTN=row_sums_BTN)
    sinks = arrays[3]
    if sinks is None:
        return *of_qkv, None, None, None, None
    # A sink's probability times the gradient of its logit, which has no value to add to it.
    of_sinks = -jnp.sum(jnp.exp(sinks - jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0)) * row_sums_BTN, axis=(0, 1))
    return *of_qkv, of_sinks.astype(sinks.dtype), None, None, None


_attend.defvjp(_forward, _backward)


def check(q: Any, k: Any, v: Any, sinks: Any, q_ids: Any, kv_ids: Any, window: tuple[int, int] | None) -> None:
    """Raises ValueError, in one line with both shapes, for arrays that do not make an attention."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [B, T, N, H], [B, S, K, H] and [B, S, K, H]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must have the same batch (B) and head width (H)")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must have the same batch, length and heads (B, S, K)")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape} has {q.shape[2]} heads, which are no multiple of the {k.shape[2]} of k {k.shape}")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must have one dtype of {', '.join(DTYPES)}")
    if window is not None and min(window) < 0:
        raise ValueError(f"window={window} must be two distances (left, right) of 0 or more")
    if (q_ids is None) != (kv_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    if q_ids is not None and (q_ids.shape != q.shape[:2] or kv_ids.shape != k.shape[:2]):
        raise ValueError(f"q_segment_ids {q_ids.shape} and kv_segment_ids {kv_ids.shape} must be {q.shape[:2]} and {k.shape[:2]}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks {sinks.shape} must be {q.shape[2:3]}, one for each head of q {q.shape}")
