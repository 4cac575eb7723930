"""Provides attention as plain functions of arrays.

    output = flash_attention(q, k, v, causal=True, q_segment_ids=ids, kv_segment_ids=ids)

`attention_forward` and `attention_backward` are its two passes, for callers that merge the
attention of several ranges of keys themselves.

The output of `flash_attention` has the dtype of the arrays, and the head width of the values. Its
lse is the log-sum-exp of each query's logits, sinks included, in float32, or float64 for float64
arrays. A query that sees nothing has output 0 and an lse of minus infinity, or of its sink.

Implementations (`table.py`) are "blockwise", in plain JAX; "tpu", Pallas kernels for TPUs,
interpreted on a CPU; "hopper" and "cudnn", on NVIDIA GPUs; "hopper_fused", which is "hopper" with
gradients of q that are summed in no fixed order; and "reference". `choose` names the fastest on a
chip, with its blocks.

All can be differentiated once, in reverse mode, with respect to q, k, v and sinks. Gradients come
from the output and from the lse. "reference" has second derivatives, too, and "blockwise" has them
in forward over reverse mode (jax.hessian). For jax.export the batch may be symbolic with
"blockwise", and any dimension with "reference".

In the forward pass a masked key may be NaN or infinite: the outputs of queries that do not see it
do not change. A masked value must be finite, and in the backward pass every number must be: a
weight of 0 times NaN is NaN, and reaches the queries of all blocks that visit the value's block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe.kernels.attention.choice import (
    Choice,
    as_choice,
    choose,
    obstacle,
    supported,
    why_not,
    with_blocks,
)
from moe.kernels.attention.decode import decode_attention
from moe.kernels.attention.inputs import (
    Gradients,
    Inputs,
    Options,
    Request,
    Window,
    check_inputs,
    make_options,
    make_request,
)
from moe.kernels.attention.table import IMPLEMENTATIONS, Implementation
from moe.kernels.settings import own_settings

__all__ = [
    "IMPLEMENTATIONS",
    "RESIDUALS",
    "Choice",
    "Gradients",
    "Implementation",
    "Inputs",
    "Options",
    "attention_backward",
    "attention_forward",
    "choose",
    "compute_delta",
    "decode_attention",
    "flash_attention",
    "name_residuals",
    "round_output",
    "sinks_gradient",
    "supported",
    "why_not",
]

RESIDUALS = "attention residuals"  # the name of what the backward pass needs of the forward pass


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
    implementation: str | Choice | None = None,
) -> Any:
    """Returns softmax(scale q kᵀ) v over the keys that each query sees: [B, T, N, H].

    N is a multiple of K: query head n reads key/value head n // (N / K). Raises ValueError for
    arguments that do not agree, and NotImplementedError where `implementation` cannot do the call.

    causal: a query sees no key after its own position.
    window: (left, right), how many keys before and after itself a query sees; None is no limit.
    q_segment_ids, kv_segment_ids: integers [B, T] and [B, S]; a query sees keys of its own id.
    q_offset, kv_offset: the positions of the first query and the first key; they may be traced.
    softcap: c > 0 turns each score s into c tanh(s / c) (Gemma 2).
    sinks: logits [N] that take part in the softmax and carry no value (gpt-oss).
    scale: what scores are multiplied with; None is 1 / sqrt(H).
    return_lse: whether to return (output, lse), with each query's log-sum-exp [B, T, N].
    implementation: a name or a `Choice`; None is "tpu" on TPUs if it can, else "blockwise".
    """
    inputs = Inputs(q_BTNH, k_BSKH, v_BSKH, sinks, q_segment_ids, kv_segment_ids)
    check_inputs(inputs)
    options = make_options(q_BTNH.shape[3], causal, window, softcap, scale)
    request = make_request(inputs, options, (q_offset, kv_offset), return_lse)
    choice = able_choice(implementation, request)
    shift = jnp.asarray(q_offset, jnp.int32) - jnp.asarray(kv_offset, jnp.int32)
    output, lse = _attend_or_forward(choice, options, inputs._replace(shift=shift))
    return (output, lse) if return_lse else output


def _attend_or_forward(choice: Choice | None, options: Options, inputs: Inputs) -> Any:
    """Returns output and lse.

    If an implementation has no backward pass, JAX differentiates its forward pass.
    """
    if choice is not None and IMPLEMENTATIONS[choice.name].backward is None:
        return IMPLEMENTATIONS[choice.name].forward(options, inputs)
    return _attend(choice, options, inputs)


def able_choice(implementation: str | Choice | None, request: Request) -> Choice | None:
    """Returns the choice that computes a request, or None if the platform is to choose.

    Raises NotImplementedError for an implementation that cannot compute the request.
    """
    if implementation is None and not obstacle("tpu", request):
        return None
    choice = as_choice(implementation or "blockwise")
    if reason := obstacle(choice.name, request):
        able = next(name for name in ("blockwise", "reference") if not obstacle(name, request))
        raise NotImplementedError(
            f"{choice.name!r} cannot do this attention, for {reason}: {able!r} can"
        )
    return choice


def attention_forward(
    implementation: str | Choice | None, options: Options, inputs: Inputs
) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, N, H] and log-sum-exp [B, T, N].

    With `options.partial` the caller merges the results with others, so they are not rounded to the
    inputs' dtype: this output, and the gradients of `attention_backward`, are float32, or float64
    for float64. The Hopper kernels have no shared memory left for float32. They round gradients
    even then, and return an output with twice the digits of the inputs' dtype.
    """
    return _run("forward", implementation, options, (inputs,))


def attention_backward(
    implementation: str | Choice | None,
    options: Options,
    inputs: Inputs,
    *,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
) -> Gradients:
    """Returns the gradients of q, k and v, given the gradient `dout_BTNH` of the output.

    `lse_BTN` may be the log-sum-exp over more keys than these: that is how a ring adds up what each
    range of keys contributes. `delta_BTN` is each query's rowsum(dout * output) over the same keys
    as `lse_BTN`, less the gradient of its lse: see `compute_delta`.
    """
    return _run("backward", implementation, options, (inputs, lse_BTN, dout_BTNH, delta_BTN))


def round_output(output: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Returns the output in `dtype`, and the remainder that rounding took from it, or None.

    The remainder has `dtype`, too; it is None where nothing is rounded. `compute_delta` needs both.
    The rest of a model saves the rounded output in any case. To save the remainder beside it takes
    half of the memory that the float32 output would take.
    """
    if output.dtype == dtype:
        return output, None
    # XLA may leave out a conversion to `dtype` and back, but it never leaves out this operation.
    # The exponent keeps its 8 bits, since with fewer the small numbers of float16 would become 0.
    rounded = jax.lax.reduce_precision(
        output, exponent_bits=8, mantissa_bits=jnp.finfo(dtype).nmant
    )
    return output.astype(dtype), (output - rounded).astype(dtype)


def name_residuals(
    output: jax.Array, remainder: jax.Array | None, lse: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Names what the backward pass needs beside the inputs, so that jax.checkpoint can keep it.

    A policy that keeps arrays of the name `RESIDUALS` computes attention once.
    """
    name = functools.partial(checkpoint_name, name=RESIDUALS)
    return name(output), None if remainder is None else name(remainder), name(lse)


def compute_delta(
    output: jax.Array, remainder: jax.Array | None, dout: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns rowsum(dout * output) of each query: D of the FlashAttention papers.

    This is delta if the lse has no gradient. Otherwise the caller subtracts that gradient from it.

    The sum over H is taken in `dtype`, from what `round_output` returned. The backward pass
    computes dS = P * (dP - delta). Where a query sees few keys, dP and delta are nearly equal, and
    the rounding of the output would be as large as their difference.
    """
    exact = output.astype(dtype)
    if remainder is not None:
        exact += remainder.astype(dtype)
    return jnp.sum(exact * dout.astype(dtype), axis=-1)


def sinks_gradient(sinks_N: jax.Array | None, lse: jax.Array, delta: jax.Array) -> jax.Array | None:
    """Returns the gradient of the sinks, given lse and delta [..., N].

    A sink has no value, so its dP is 0 and dS = P * (dP - delta) becomes -P * delta.
    """
    if sinks_N is None:
        return None
    logits = sinks_N.astype(lse.dtype)
    with own_settings(lse.dtype):
        probs = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0))
        gradient = -jnp.sum(probs * delta, axis=tuple(range(lse.ndim - 1)))
    return gradient.astype(sinks_N.dtype)


def _run(
    which: Literal["forward", "backward"],
    implementation: str | Choice | None,
    options: Options,
    arrays: tuple[Any, ...],
) -> Any:
    """Runs one pass; `arrays` are the inputs, and in the backward pass lse, dout and delta."""
    choice = None if implementation is None else as_choice(implementation)
    inputs, rows = arrays[0], arrays[1:]
    with own_settings(inputs.q_BTNH.dtype):
        return _run_on_platform(which, choice, options, (_canonical(inputs), *rows))


def _canonical(inputs: Inputs) -> Inputs:
    """Casts sinks, ids and shift to the dtypes that all implementations know.

    In a process with 64-bit types a caller may pass them as float64 and int64.
    """
    sinks_dtype = np.promote_types(inputs.q_BTNH.dtype, np.float32)
    cast = lambda x, dtype: None if x is None else jnp.asarray(x, dtype)
    return inputs._replace(
        sinks_N=cast(inputs.sinks_N, sinks_dtype),
        q_segment_ids_BT=cast(inputs.q_segment_ids_BT, jnp.int32),
        kv_segment_ids_BS=cast(inputs.kv_segment_ids_BS, jnp.int32),
        shift=jnp.asarray(inputs.shift, jnp.int32),
    )


def _run_on_platform(
    which: Literal["forward", "backward"],
    choice: Choice | None,
    options: Options,
    arrays: tuple[Any, ...],
) -> Any:
    """Runs one pass; without a choice the platform decides when the program is lowered.

    A program may be lowered for a platform that is not attached, so the attached one is not asked.
    """
    if choice is None:
        tpu, blockwise = (_pass(which, Choice(name), options) for name in ("tpu", "blockwise"))
        return jax.lax.platform_dependent(*arrays, tpu=tpu, default=blockwise)
    if IMPLEMENTATIONS[choice.name].interpretable:
        compiled = _pass(which, choice, options, interpret=False)
        interpreted = _pass(which, choice, options, interpret=True)
        return jax.lax.platform_dependent(*arrays, tpu=compiled, cpu=interpreted)
    return _pass(which, choice, options)(*arrays)


def _pass(
    which: Literal["forward", "backward"], choice: Choice, options: Options, **static: Any
) -> Callable[..., Any]:
    """Returns the forward or the backward pass of a choice as a function of arrays."""
    row, blocks = IMPLEMENTATIONS[choice.name], with_blocks(choice, options).blocks
    function = row.forward if which == "forward" else row.backward
    if function is None:
        raise NotImplementedError(f"{choice.name!r} has no backward pass to be called by itself")
    if blocks is not None:
        static["blocks"] = blocks
    return functools.partial(function, options, **static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice | None, options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    return attention_forward(choice, options, inputs)


def _attend_forward(
    choice: Choice | None, options: Options, inputs: Inputs
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    # Not rounded yet, since the backward pass needs delta of the exact output.
    exact = dataclasses.replace(options, partial=True)
    output, lse = attention_forward(choice, exact, inputs)
    saved = name_residuals(*round_output(output, inputs.q_BTNH.dtype), lse)
    output, _, lse = saved
    return (output, lse), (inputs, *saved)


def _attend_backward(
    choice: Choice | None,
    options: Options,
    residuals: tuple[Any, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Inputs]:
    inputs, output, remainder, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    delta_BTN = compute_delta(output, remainder, dout_BTNH, lse_BTN.dtype) - dlse_BTN
    gradients = attention_backward(
        choice, options, inputs, lse_BTN=lse_BTN, dout_BTNH=dout_BTNH, delta_BTN=delta_BTN
    )
    dsinks_N = sinks_gradient(inputs.sinks_N, lse_BTN, delta_BTN)
    # The ids and the shift are integers: their gradients are None.
    return (Inputs(*gradients, dsinks_N, None, None, None),)  # pyright: ignore[reportArgumentType] JAX takes None for no gradient


_attend.defvjp(_attend_forward, _attend_backward)
