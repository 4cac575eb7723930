"""Computes attention's gradients on TPUs by FlashAttention-2's backward pass, in two kernels.

Dao 2023, algorithm 2, computes all gradients in one loop and adds to dq from many programs. Here
one kernel sums dq over the blocks of keys, and another dk and dv over the blocks of queries, so
that each sum stays in VMEM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.attention.inputs import Gradients, Inputs, Options
from moe.kernels.attention.masks import key_blocks, query_blocks
from moe.kernels.attention.tpu import common
from moe.kernels.attention.tpu.common import Index, Kernel, Operands, Ref, StaticArgs


def backward(
    options: Options,
    inputs: Inputs,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
    *,
    blocks: tuple[int, int],
    interpret: Any = False,
) -> Gradients:
    """Returns the gradients of q, k and v."""
    static, operands = common.prepare(options, inputs, blocks, interpret)
    blocks = static.q_block, static.kv_block
    mask = options, inputs.shift, inputs.lengths, blocks, *inputs.segment_ids
    visited_keys = common.for_each_row(key_blocks(*mask), len(operands.q))
    # A query that sees nothing has a lse of minus infinity. Its logits are, too, so that any finite
    # number makes its probabilities 0.
    lse_BTN = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0)
    operands = operands._replace(
        dout=common.heads_first(dout_BTNH, static.q_block),
        lse=_one_for_each_query(lse_BTN, static.q_block),
        delta=_one_for_each_query(delta_BTN, static.q_block),
    )
    arrays = operands.given()
    q_kernel, kv_kernel = _q_kernel(static, operands), _kv_kernel(static, operands)
    dq = common.run_kernel(static, q_kernel, visited_keys, inputs.shift, *arrays)
    visited_queries = common.for_each_row(query_blocks(*mask), len(operands.q))
    dk, dv = common.run_kernel(static, kv_kernel, visited_queries, inputs.shift, *arrays)
    length, kv_length = inputs.lengths
    return Gradients(
        common.heads_second(dq, length),
        common.heads_second(dk, kv_length),
        common.heads_second(dv, kv_length),
    )


def _one_for_each_query(x_BTN: jax.Array, block: int) -> jax.Array:
    """Turns [B, T, N] into [B, N, 1, T], with zeros after T up to whole blocks."""
    return common.pad(jnp.moveaxis(x_BTN, 2, 1)[:, :, None], block, 3)


def _q_kernel(static: StaticArgs, operands: Operands) -> Kernel:
    """Describes the kernel for dq, whose grid is (B, N, blocks of queries, blocks of keys)."""
    q, k, v = operands.q, operands.k, operands.v
    num_kv_blocks = k.shape[2] // static.kv_block
    steps = common.grid_steps(static, static.q_block, static.kv_block, num_kv_blocks)
    specs = common.block_specs(static, operands, common.q_index, common.kv_index(static))
    return Kernel(
        _dq_kernel,
        (*q.shape[:2], q.shape[2] // static.q_block, steps),
        specs,
        specs[0],
        jax.ShapeDtypeStruct(q.shape, static.options.result_dtype(q.dtype)),
        [pltpu.VMEM((static.q_block, q.shape[3]), jnp.float32)],
        flops=4 * q.shape[3] + 2 * v.shape[3],
    )


def _dq_kernel(
    static: StaticArgs,
    steps: int,
    first: Ref,
    end: Ref,
    shift: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    *refs: Ref,
) -> None:
    *ids, dout, lse, delta, dq, accumulator = refs
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, i] + step

    # The first step clears the sum of dq, which stays in VMEM until the last.
    @pl.when(step == 0)
    def _() -> None:
        accumulator[...] = jnp.zeros_like(accumulator)

    @pl.when(block < end[b, i])
    def _() -> None:
        # dQ += dS K; dS is [keys, queries].
        _, dscores = _probs_and_dscores(
            static, i, block, shift[0], (q, k, v), ids, (dout, lse, delta)
        )
        accumulator[...] += common.dot(dscores.astype(k.dtype), k[...], 0, 0)

    @pl.when(step == steps - 1)
    def _() -> None:
        dq[...] = accumulator[...].astype(dq.dtype)


def _kv_kernel(static: StaticArgs, operands: Operands) -> Kernel:
    """Describes the kernel for dk and dv.

    Its grid is (B, K, blocks of keys, query heads of a group x blocks of queries): the last
    dimension visits the blocks of queries of one head, then those of the next.
    """
    q, k, v = operands.q, operands.k, operands.v
    num_q_blocks = q.shape[2] // static.q_block
    steps = common.grid_steps(static, static.kv_block, static.q_block, num_q_blocks)

    def q_index(
        b: Index, n: Index, j: Index, step: Index, first: Ref, end: Ref, *_: Ref
    ) -> tuple[Index, ...]:
        head, step = n * static.group + jax.lax.div(step, steps), jax.lax.rem(step, steps)
        return b, head, common.visited_block(first, end, b, j, step)

    def kv_index(b: Index, n: Index, j: Index, step: Index, *_: Ref) -> tuple[Index, ...]:
        return b, n, j

    specs = common.block_specs(static, operands, q_index, kv_index)
    return Kernel(
        functools.partial(_dkv_kernel, steps),
        (*k.shape[:2], k.shape[2] // static.kv_block, static.group * steps),
        specs,
        tuple(specs[1:3]),
        [jax.ShapeDtypeStruct(x.shape, static.options.result_dtype(x.dtype)) for x in (k, v)],
        [pltpu.VMEM((static.kv_block, x.shape[3]), jnp.float32) for x in (k, v)],
        flops=4 * (k.shape[3] + v.shape[3]),
    )


def _dkv_kernel(
    q_steps: int,
    static: StaticArgs,
    steps: int,
    first: Ref,
    end: Ref,
    shift: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    *refs: Ref,
) -> None:
    *ids, dout, lse, delta, dk, dv, dk_accumulator, dv_accumulator = refs
    b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    # All query heads of the group add to the same dk and dv: their steps follow one another.
    block = first[b, j] + jax.lax.rem(step, q_steps)

    @pl.when(step == 0)
    def _() -> None:
        dk_accumulator[...] = jnp.zeros_like(dk_accumulator)
        dv_accumulator[...] = jnp.zeros_like(dv_accumulator)

    @pl.when(block < end[b, j])
    def _() -> None:
        # dK += dSᵀ Q and dV += Pᵀ dO; dS and P are [keys, queries] already.
        probs, dscores = _probs_and_dscores(
            static, block, j, shift[0], (q, k, v), ids, (dout, lse, delta)
        )
        dk_accumulator[...] += common.dot(dscores.astype(q.dtype), q[...], 1, 0)
        dv_accumulator[...] += common.dot(probs.astype(dout.dtype), dout[...], 1, 0)

    @pl.when(step == steps - 1)
    def _() -> None:
        dk[...] = dk_accumulator[...].astype(dk.dtype)
        dv[...] = dv_accumulator[...].astype(dv.dtype)


def _probs_and_dscores(
    static: StaticArgs,
    i: Index,
    j: Index,
    shift: jax.Array,
    qkv: tuple[Ref, Ref, Ref],
    ids: list[Ref],
    rows: tuple[Ref, Ref, Ref],
) -> tuple[jax.Array, jax.Array]:
    """Returns P and dS [keys, queries] of block i of queries and j of keys.

    `rows` are dout, lse and delta of the queries. dS includes the scale, so that dQ = dS K.
    """
    (q, k, v), (dout, lse, delta) = qkv, rows
    logits, slopes = common.scores(static, i, j, shift, q[...], k[...], [x[...] for x in ids])
    # P = exp(S - lse), dP = V dOᵀ, dS = P * (dP - delta).
    probs = jnp.exp(logits - lse[...])
    dprobs = common.dot(v[...], dout[...], 1, 1)
    return probs, probs * (dprobs - delta[...]) * (slopes * static.options.scale)
