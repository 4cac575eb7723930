"""Attention as plain functions of arrays, to be imported from here.

    output = flash_attention(q, k, v, causal=True, q_segment_ids=ids, kv_segment_ids=ids)

`attention_forward` and `attention_backward` are its two halves, for those that merge the attention
of several ranges of keys themselves.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention import cudnn
from moe.kernels.attention.choice import (
    Call,
    Implementation,
    Name,
    choose,
    describe,
    obstacle,
    supported,
    why_not,
)
from moe.kernels.attention.decode import decode_attention
from moe.kernels.attention.masks import Options, Window
from moe.kernels.settings import own_settings

__all__ = [
    "Implementation",
    "attention_backward",
    "attention_forward",
    "choose",
    "decode_attention",
    "flash_attention",
    "round_output",
    "sinks_gradient",
    "sum_rows",
    "supported",
    "why_not",
]


# Where a pass of an implementation is in a file of another name.
FILES = {("backward", "hopper"): "hopper_backward", ("forward", "hopper_fused"): "hopper"}


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Name | Implementation | None = None,
) -> Any:
    """softmax(scale q kᵀ) v over the keys that each query sees: [B, T, N, H] in the dtype of the
    queries (H is that of `v_BSKH`).

    N is a multiple of K: query head n reads key/value head n // (N / K). `causal` leaves out keys
    after the query, and `window`, (left, right), those more than so far before or after it, None
    being no limit; positions are counted from the offsets, which may be traced. Segment ids,
    integers [B, T] and [B, S], leave out keys of another id. `softcap` c > 0 makes scores s into c
    tanh(s / c) (Gemma 2). `sinks` [N] are logits that take part in the softmax and carry no value
    (gpt-oss). `scale` is 1 / sqrt(H) where it is None.

    With `return_lse` the result is (output, lse): the log-sum-exp of each query's logits, sinks
    included, [B, T, N] in float32, or float64 for float64. A query that sees nothing has output 0
    and lse of minus infinity, or its sink. Differentiable once, in reverse mode, in q, k, v and
    sinks, by way of output and lse. "reference" has second derivatives, too, and "blockwise" has
    them in forward over reverse mode (jax.hessian). Raises ValueError for arguments that do not
    agree.

    A key that is masked for a query may be NaN or infinite: the outputs of queries that do not see
    it do not change. A value may not, nor any number in the backward pass: a weight of 0 times NaN
    is NaN, and reaches the queries of all blocks that meet the block it is in.

    Implementations: "blockwise", in plain JAX; "tpu", Pallas kernels for TPUs, interpreted on a
    CPU; "hopper" and "cudnn", on NVIDIA GPUs; "hopper_fused", "hopper" with gradients of q that are
    summed in no fixed order; "reference". `choose` gives the fastest on a chip, with its blocks.
    None takes the TPU's kernels on TPUs, and blockwise elsewhere. Raises NotImplementedError for
    one that cannot do the call. For jax.export the batch may be symbolic with "blockwise", and any
    dimension with "reference".
    """
    call = describe(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        window=window,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_offset=q_offset,
        kv_offset=kv_offset,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        return_lse=return_lse,
    )
    implementation = able_implementation(implementation, call)
    if (
        implementation is not None
        and Implementation.of(implementation, call.options).name == "cudnn"
    ):
        return cudnn.attend(call.options, q_BTNH, k_BSKH, v_BSKH)
    arrays = q_BTNH, k_BSKH, v_BSKH, sinks, q_segment_ids, kv_segment_ids
    shift = jnp.asarray(q_offset, jnp.int32) - jnp.asarray(kv_offset, jnp.int32)
    output, lse = _attend(implementation, call.options, *arrays, shift)
    return (output, lse) if return_lse else output


def able_implementation(
    implementation: Name | Implementation | None, call: Call
) -> Name | Implementation | None:
    """Returns who does a call; None leaves it to the platform. Raises NotImplementedError for one
    that cannot do it.
    """
    if implementation is None and obstacle("tpu", call):
        implementation = "blockwise"
    if implementation is not None:
        name = implementation.name if isinstance(implementation, Implementation) else implementation
        if reason := obstacle(name, call):
            able = next(other for other in ("blockwise", "reference") if not obstacle(other, call))
            raise NotImplementedError(
                f"{name!r} cannot do this attention, for {reason}: {able!r} can"
            )
    return implementation


def attention_forward(
    implementation: Name | Implementation | None, options: Options, *arrays: Any
) -> tuple[jax.Array, jax.Array]:
    """(output, lse) of q, k, v, sinks, the ids of queries and of keys (any of the three None), and
    the shift, an int32.

    With `options.partial` the output is not rounded to the inputs' dtype, nor are the gradients of
    `attention_backward`, which are to be merged with others: float32, or float64 for float64. Only
    the Hopper kernels round these gradients, for want of shared memory; they give the output with
    twice the digits of its dtype.
    """
    return _run("forward", implementation, options, arrays)


def attention_backward(
    implementation: Name | Implementation | None,
    options: Options,
    *arrays: Any,
    lse_BTN: jax.Array,
    g_BTNH: jax.Array,
    row_sums_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, of the arrays that `attention_forward` took, for the gradient
    `g_BTNH` of the output.

    `lse_BTN` may be of more keys than these: so a ring adds up what each range of keys contributes.
    `row_sums_BTN` is each query's sum over H of output times `g_BTNH` (of all keys, too), less the
    gradient of its lse: see `sum_rows`.
    """
    return _run("backward", implementation, options, (*arrays, lse_BTN, g_BTNH, row_sums_BTN))


def round_output(output: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """The output in `dtype`, and what rounding took from it, in `dtype` too, or None if nothing.

    `sum_rows` needs both. They take half of the memory that the float32 output would take beside
    the rounded one, which the rest of a model keeps in any case.
    """
    if output.dtype == dtype:
        return output, None
    # XLA may leave out a conversion to `dtype` and back, but it never leaves out this operation.
    # The exponent keeps its 8 bits, since with fewer the small numbers of float16 would become 0.
    rounded = jax.lax.reduce_precision(
        output, exponent_bits=8, mantissa_bits=jnp.finfo(dtype).nmant
    )
    return output.astype(dtype), (output - rounded).astype(dtype)


def sum_rows(
    output: jax.Array, lost: jax.Array | None, g: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Each query's sum over H of output times `g`, taken in `dtype` from what `round_output`
    returned.

    The backward pass subtracts it from the products of `g` and the values. With few keys these
    differ little, and the sum of a rounded output would be off by as much as they differ.
    """
    whole = output.astype(dtype) if lost is None else output.astype(dtype) + lost.astype(dtype)
    return jnp.sum(whole * g.astype(dtype), axis=-1)


def sinks_gradient(
    sinks_N: jax.Array | None, lse: jax.Array, row_sums: jax.Array
) -> jax.Array | None:
    """A sink's probability times the gradient of its logit, which has no value to add to it; of lse
    and row sums [..., N].
    """
    if sinks_N is None:
        return None
    logits = sinks_N.astype(lse.dtype)
    with own_settings(lse.dtype):
        probs = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0))
        gradient = -jnp.sum(probs * row_sums, axis=tuple(range(lse.ndim - 1)))
    return gradient.astype(sinks_N.dtype)


def _run(
    which: str,
    implementation: Name | Implementation | None,
    options: Options,
    arrays: tuple[Any, ...],
) -> Any:
    """One pass. The platform is asked for when the program is lowered, so that it may be another
    than the one at hand.
    """
    q, k, v, sinks, *ids_and_shift = arrays[:7]
    # In the dtypes that all implementations know: of a process with 64-bit types they may come in
    # these.
    sinks = None if sinks is None else jnp.asarray(sinks, np.promote_types(q.dtype, np.float32))
    ids_and_shift = (None if x is None else jnp.asarray(x, jnp.int32) for x in ids_and_shift)
    with own_settings(q.dtype):
        return _run_on_platform(
            which, implementation, options, (q, k, v, sinks, *ids_and_shift, *arrays[7:])
        )


def _run_on_platform(
    which: str,
    implementation: Name | Implementation | None,
    options: Options,
    arrays: tuple[Any, ...],
) -> Any:
    if implementation is None:
        tpu, blockwise = (
            _function(which, Implementation.of(name, options), options)
            for name in ("tpu", "blockwise")
        )
        return jax.lax.platform_dependent(*arrays, tpu=tpu, default=blockwise)
    implementation = Implementation.of(implementation, options)
    if implementation.name == "tpu":
        tpu, cpu = (
            _function(which, implementation, options, interpret=interpret)
            for interpret in (False, True)
        )
        return jax.lax.platform_dependent(*arrays, tpu=tpu, cpu=cpu)
    return _function(which, implementation, options)(*arrays)


def _function(which: str, implementation: Implementation, options: Options, **keywords: Any) -> Any:
    """`forward` or `backward` of an implementation, whose file is imported only now: Pallas takes a
    second.
    """
    name = FILES.get((which, implementation.name), implementation.name)
    module = importlib.import_module(f"moe.kernels.attention.{name}")
    blocks = {} if implementation.blocks is None else {"blocks": implementation.blocks}
    function = functools.partial(getattr(module, which), options, **blocks, **keywords)
    return (
        function
        if implementation.name in ("blockwise", "reference")
        else _differentiable_once(implementation.name, function)
    )


def _differentiable_once(name: Name, kernel: Any) -> Any:
    """Makes a kernel say so where it is to be differentiated: Pallas would fail without a word."""

    # Not the kernel itself, which may write to references, where a custom_jvp knows of none.
    @jax.custom_jvp
    def guard(*arrays: Any) -> Any:
        return arrays

    @guard.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name!r} attention has no second derivatives: take implementation='reference', or 'blockwise' for forward over reverse mode"
        )

    return lambda *arrays: kernel(*guard(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    implementation: Name | Implementation | None, options: Options, *arrays: Any
) -> tuple[jax.Array, jax.Array]:
    return attention_forward(implementation, options, *arrays)


def _forward(
    implementation: Name | Implementation | None, options: Options, *arrays: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    output, lse = attention_forward(
        implementation, dataclasses.replace(options, partial=True), *arrays
    )
    output, lost = round_output(output, arrays[0].dtype)
    return (output, lse), (arrays, output, lost, lse)


def _backward(
    implementation: Name | Implementation | None,
    options: Options,
    residuals: tuple[Any, ...],
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[Any, ...]:
    arrays, output, lost, lse_BTN = residuals
    g_BTNH, g_lse_BTN = gradients
    row_sums_BTN = sum_rows(output, lost, g_BTNH, lse_BTN.dtype) - g_lse_BTN
    of_qkv = attention_backward(
        implementation, options, *arrays, lse_BTN=lse_BTN, g_BTNH=g_BTNH, row_sums_BTN=row_sums_BTN
    )
    return *of_qkv, sinks_gradient(arrays[3], lse_BTN, row_sums_BTN), None, None, None


_attend.defvjp(_forward, _backward)
