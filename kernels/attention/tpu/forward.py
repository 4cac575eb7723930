"""Computes attention's output on TPUs by FlashAttention-2 (Dao 2023, algorithm 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import key_blocks
from moe.kernels.attention.tpu import common
from moe.kernels.attention.tpu.common import Kernel, Operands, Ref, StaticArgs


def forward(
    options: Options, inputs: Inputs, *, blocks: tuple[int, int], interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, N, H] and lse [B, T, N] in float32."""
    static, operands = common.prepare(options, inputs, blocks, interpret)
    q, length = operands.q, inputs.q_BTNH.shape[1]
    blocks = static.q_block, static.kv_block
    visited = key_blocks(options, inputs.shift, inputs.lengths, blocks, *inputs.segment_ids)
    sinks = inputs.sinks_N
    sinks = jnp.full(q.shape[1], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    output, lse = common.run_kernel(
        static,
        _kernel(static, operands),
        common.for_each_row(visited, len(q)),
        inputs.shift,
        sinks,
        *operands.given(),
    )
    return common.heads_second(output, length), jnp.moveaxis(lse[:, :, 0], 1, 2)[:, :length]


def _kernel(static: StaticArgs, operands: Operands) -> Kernel:
    """Describes the kernel, whose grid is (B, N, blocks of queries, blocks of keys)."""
    (batch, heads, length, width), value_width = operands.q.shape, operands.v.shape[3]
    num_kv_blocks = operands.k.shape[2] // static.kv_block
    steps = common.grid_steps(static, static.q_block, static.kv_block, num_kv_blocks)
    output = pl.BlockSpec(
        (None, None, static.q_block, value_width), lambda b, n, i, *_: (b, n, i, 0)
    )
    lse = pl.BlockSpec((None, None, 1, static.q_block), lambda b, n, i, *_: (b, n, 0, i))
    output_dtype = static.options.result_dtype(operands.q.dtype)
    return Kernel(
        _forward_kernel,
        (batch, heads, length // static.q_block, steps),
        [
            pl.BlockSpec(memory_space=pltpu.SMEM),  # the sinks
            *common.block_specs(static, operands, common.q_index, common.kv_index(static)),
        ],
        (output, lse),
        (
            jax.ShapeDtypeStruct((batch, heads, length, value_width), output_dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ),
        [
            pltpu.VMEM((value_width, static.q_block), jnp.float32),
            *[pltpu.VMEM((1, static.q_block), jnp.float32)] * 2,
        ],
        flops=2 * (width + value_width),
    )


def _forward_kernel(
    static: StaticArgs,
    steps: int,
    first: Ref,
    end: Ref,
    shift: Ref,
    sinks: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    *refs: Ref,
) -> None:
    num_ids = 2 * static.has_ids
    ids, (output, lse, accumulator, running_max, denominator) = refs[:num_ids], refs[num_ids:]
    b, n, i, step = (pl.program_id(dim) for dim in range(4))
    block = first[b, i] + step

    @pl.when(step == 0)
    def _() -> None:
        # A sink is a logit like that of a key, but without a value: the online softmax starts with
        # m = the sink's logit and l = exp(0) = 1. Without a sink it starts with m = -inf and l = 0.
        accumulator[...] = jnp.zeros_like(accumulator)
        running_max[...] = jnp.full_like(running_max, sinks[n])
        denominator[...] = jnp.full_like(denominator, (sinks[n] > -jnp.inf).astype(jnp.float32))

    @pl.when(block < end[b, i])
    def _() -> None:
        # S = K Qᵀ, transposed: [keys, queries].
        id_blocks = [x[...] for x in ids]
        logits, _ = common.scores(static, i, block, shift[0], q[...], k[...], id_blocks)
        # m_new = max(m, rowmax(S)). Where nothing is visible yet it is minus infinity, and with 0
        # in its place all weights are exp(-inf) = 0 instead of NaN.
        new_max = jnp.maximum(running_max[...], jnp.max(logits, axis=0, keepdims=True))
        base = jnp.where(new_max > -jnp.inf, new_max, 0.0)
        # P = exp(S - m_new); what was summed relative to m is rescaled by exp(m - m_new).
        weights, rescale = jnp.exp(logits - base), jnp.exp(running_max[...] - base)
        # O = rescale O + P V, and l = rescale l + rowsum(P).
        product = common.dot(v[...], weights.astype(v.dtype), 0, 0)
        accumulator[...] = accumulator[...] * rescale + product
        denominator[...] = denominator[...] * rescale + jnp.sum(weights, axis=0, keepdims=True)
        running_max[...] = new_max

    @pl.when(step == steps - 1)
    def _() -> None:
        # O = O / l and lse = m + log(l). A query that sees nothing has l = 0.
        sees_any = denominator[...] > 0
        safe_denominator = jnp.where(sees_any, denominator[...], 1.0)
        output[...] = (accumulator[...] / safe_denominator).T.astype(output.dtype)
        lse[...] = jnp.where(sees_any, running_max[...] + jnp.log(safe_denominator), -jnp.inf)
