"""Attention on TPUs: three Pallas kernels, for the output, for the gradient of q, and for those of
k and v.

Scores are held transposed, [keys, queries]: what belongs to a query (its maximum, its sum, its
log-sum-exp) then lies along lanes, sums over keys are sums over sublanes, and a log-sum-exp is
stored as it is computed, one number to a query. A grid's last dimension is sequential; it walks
over the blocks that the mask leaves, whose numbers come ahead as scalars, and stands still where
there are fewer.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.attention.masks import Options, key_blocks, query_blocks


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a kernel: the options, the sizes of blocks, the keys there are, query heads
    to a key, and whether there are ids.
    """

    options: Options
    q_block: int
    kv_block: int
    kv_length: int
    group: int
    has_ids: bool
    interpret: Any

    def pallas(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        in_specs: Any,
        out_specs: Any,
        shapes: Any,
        scratch: list[Any],
        flops: int,
    ) -> Any:
        """The kernel as a function of the first and last blocks to meet, of the shift, and of
        arrays. `flops`: of a query and a key.
        """
        pairs = math.prod(grid) * self.q_block * self.kv_block
        read = sum(math.prod(x for x in spec.block_shape or () if x) for spec in in_specs)
        # For the compiler to hide what is sent meanwhile: more than a mask leaves, and as if all
        # that is read were float32.
        cost = pl.CostEstimate(
            flops=pairs * flops, transcendentals=pairs, bytes_accessed=4 * math.prod(grid) * read
        )
        return pl.pallas_call(
            functools.partial(kernel, self, grid[-1]),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",)
            ),
            interpret=self.interpret,
            cost_estimate=cost,
        )


def forward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
    *,
    blocks: tuple[int, int],
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in the dtype of the queries or of a part, and lse [B, T, N] in float32."""
    call, arrays, first, end = _prepare(
        options, q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, shift, blocks, interpret
    )
    (batch, heads, length, _), width = arrays[0].shape, v_BSKH.shape[3]
    sinks = jnp.full(heads, -jnp.inf) if sinks_N is None else sinks_N.astype(jnp.float32)
    specs = _specs(call, arrays, _q_index, _kv_index(call))
    out_specs = (
        pl.BlockSpec((None, None, call.q_block, width), lambda b, n, i, *_: (b, n, i, 0)),
        pl.BlockSpec((None, None, 1, call.q_block), lambda b, n, i, *_: (b, n, 0, i)),
    )
    shapes = (
        jax.ShapeDtypeStruct((batch, heads, length, width), options.result_dtype(q_BTNH.dtype)),
        jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    )
    scratch = [
        pltpu.VMEM((width, call.q_block), jnp.float32),
        *[pltpu.VMEM((1, call.q_block), jnp.float32)] * 2,
    ]
    grid = (
        batch,
        heads,
        length // call.q_block,
        _steps(call, call.q_block, call.kv_block, arrays[1].shape[2] // call.kv_block),
    )
    run = call.pallas(
        _forward_kernel,
        grid,
        [pl.BlockSpec(memory_space=pltpu.SMEM), *specs],
        out_specs,
        shapes,
        scratch,
        2 * (arrays[0].shape[3] + width),
    )
    output, lse = run(first, end, jnp.reshape(shift, 1), sinks, *arrays)
    return jnp.moveaxis(output, 1, 2)[:, : q_BTNH.shape[1]], jnp.moveaxis(lse[:, :, 0], 1, 2)[
        :, : q_BTNH.shape[1]
    ]


def _forward_kernel(
    call: _Call,
    steps: int,
    first: Any,
    end: Any,
    shift: Any,
    sinks: Any,
    q: Any,
    k: Any,
    v: Any,
    *refs: Any,
) -> None:
    ids, (output, lse, total_output, highest, total) = (
        refs[: 2 * call.has_ids],
        refs[2 * call.has_ids :],
    )
    b, n, i, step = (pl.program_id(dim) for dim in range(4))
    block = first[b, i] + step

    @pl.when(step == 0)
    def _() -> None:
        # A sink is a logit as a key's is, with nothing to carry: the softmax begins with it.
        total_output[...] = jnp.zeros_like(total_output)
        highest[...] = jnp.full_like(highest, sinks[n])
        total[...] = jnp.full_like(total, (sinks[n] > -jnp.inf).astype(jnp.float32))

    @pl.when(block < end[b, i])
    def _() -> None:
        logits, _ = _scores(call, i, block, shift[0], q[...], k[...], *(x[...] for x in ids))
        new_highest = jnp.maximum(highest[...], jnp.max(logits, axis=0, keepdims=True))
        base = jnp.where(
            new_highest > -jnp.inf, new_highest, 0.0
        )  # nothing is seen yet: all weights are zero
        weights, kept = jnp.exp(logits - base), jnp.exp(highest[...] - base)
        total_output[...] = total_output[...] * kept + _dot(v[...], weights.astype(v.dtype), 0, 0)
        total[...] = total[...] * kept + jnp.sum(weights, axis=0, keepdims=True)
        highest[...] = new_highest

    @pl.when(step == steps - 1)
    def _() -> None:
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        output[...] = (total_output[...] / divisor).T.astype(output.dtype)
        lse[...] = jnp.where(some, highest[...] + jnp.log(divisor), -jnp.inf)


def backward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
    lse_BTN: jax.Array,
    g_BTNH: jax.Array,
    row_sums_BTN: jax.Array,
    *,
    blocks: tuple[int, int],
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v. `row_sums_BTN` is each query's sum of output times `g_BTNH`, less
    the gradient of its lse.
    """
    call, arrays, first, end = _prepare(
        options, q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, shift, blocks, interpret
    )
    rows = (jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0), row_sums_BTN)
    rows = (_pad(jnp.moveaxis(x, 2, 1)[:, :, None], call.q_block, 3) for x in rows)
    operands = (*arrays, _heads_first(g_BTNH, call.q_block), *rows)
    gradient_q = _gradient_q(call, first, end, shift, operands)
    lengths, blocks = (q_BTNH.shape[1], k_BSKH.shape[1]), (call.q_block, call.kv_block)
    first, end = _per_row(
        query_blocks(options, shift, lengths, blocks, q_ids_BT, kv_ids_BS), len(q_BTNH)
    )
    gradients = gradient_q, *_gradients_kv(call, first, end, shift, operands)
    return tuple(
        jnp.moveaxis(g, 1, 2)[:, : x.shape[1]]
        for g, x in zip(gradients, (q_BTNH, k_BSKH, v_BSKH), strict=True)
    )


def _gradient_q(
    call: _Call, first: jax.Array, end: jax.Array, shift: Any, operands: tuple[jax.Array, ...]
) -> jax.Array:
    q, k = operands[:2]
    grid = (
        *q.shape[:2],
        q.shape[2] // call.q_block,
        _steps(call, call.q_block, call.kv_block, k.shape[2] // call.kv_block),
    )
    shape = jax.ShapeDtypeStruct(q.shape, call.options.result_dtype(q.dtype))
    specs = _specs(call, operands, _q_index, _kv_index(call))
    scratch = [pltpu.VMEM((call.q_block, q.shape[3]), jnp.float32)]
    flops = 4 * q.shape[3] + 2 * operands[2].shape[3]
    return call.pallas(_q_kernel, grid, specs, specs[0], shape, scratch, flops)(
        first, end, jnp.reshape(shift, 1), *operands
    )


def _q_kernel(
    call: _Call, steps: int, first: Any, end: Any, shift: Any, q: Any, k: Any, v: Any, *refs: Any
) -> None:
    *ids, g, lse, row_sums, output, total = refs
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, i] + step

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(block < end[b, i])
    def _() -> None:
        _, gradient = _probs_and_gradient(call, i, block, shift[0], q, k, v, ids, g, lse, row_sums)
        total[...] += _dot(gradient.astype(k.dtype), k[...], 0, 0)

    @pl.when(step == steps - 1)
    def _() -> None:
        output[...] = total[...].astype(output.dtype)


def _gradients_kv(
    call: _Call, first: jax.Array, end: jax.Array, shift: Any, operands: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """The last dimension of the grid walks over the blocks of queries of one head of a group, then
    of the next.
    """
    q, k, v = operands[:3]
    steps = _steps(call, call.kv_block, call.q_block, q.shape[2] // call.q_block)
    grid = (*k.shape[:2], k.shape[2] // call.kv_block, call.group * steps)

    def q_index(
        b: Any, n: Any, j: Any, step: Any, first: Any, end: Any, *_: Any
    ) -> tuple[Any, ...]:
        head, step = n * call.group + jax.lax.div(step, steps), jax.lax.rem(step, steps)
        return b, head, jnp.minimum(first[b, j] + step, jnp.maximum(end[b, j] - 1, 0))

    specs = _specs(call, operands, q_index, lambda b, n, j, step, *_: (b, n, j))
    shapes = [jax.ShapeDtypeStruct(x.shape, call.options.result_dtype(x.dtype)) for x in (k, v)]
    scratch = [pltpu.VMEM((call.kv_block, x.shape[3]), jnp.float32) for x in (k, v)]
    kernel = functools.partial(_kv_kernel, steps)
    flops = 4 * (k.shape[3] + v.shape[3])
    return call.pallas(kernel, grid, specs, tuple(specs[1:3]), shapes, scratch, flops)(
        first, end, jnp.reshape(shift, 1), *operands
    )


def _kv_kernel(
    q_steps: int,
    call: _Call,
    steps: int,
    first: Any,
    end: Any,
    shift: Any,
    q: Any,
    k: Any,
    v: Any,
    *refs: Any,
) -> None:
    *ids, g, lse, row_sums, output_k, output_v, total_k, total_v = refs
    b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, j] + jax.lax.rem(step, q_steps)

    @pl.when(step == 0)
    def _() -> None:
        total_k[...], total_v[...] = jnp.zeros_like(total_k), jnp.zeros_like(total_v)

    @pl.when(block < end[b, j])
    def _() -> None:
        probs, gradient = _probs_and_gradient(
            call, block, j, shift[0], q, k, v, ids, g, lse, row_sums
        )
        total_k[...] += _dot(gradient.astype(q.dtype), q[...], 1, 0)
        total_v[...] += _dot(probs.astype(g.dtype), g[...], 1, 0)

    @pl.when(step == steps - 1)
    def _() -> None:
        output_k[...], output_v[...] = (
            total_k[...].astype(output_k.dtype),
            total_v[...].astype(output_v.dtype),
        )


def _probs_and_gradient(
    call: _Call,
    i: Any,
    j: Any,
    shift: Any,
    q: Any,
    k: Any,
    v: Any,
    ids: list[Any],
    g: Any,
    lse: Any,
    row_sums: Any,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities [keys, queries] of a block, and the gradient of its products of q and k."""
    logits, slopes = _scores(call, i, j, shift, q[...], k[...], *(x[...] for x in ids))
    probs = jnp.exp(logits - lse[...])
    return probs, probs * (_dot(v[...], g[...], 1, 1) - row_sums[...]) * (
        slopes * call.options.scale
    )


def _scores(
    call: _Call, i: Any, j: Any, shift: Any, q: jax.Array, k: jax.Array, *ids: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Logits [keys, queries] of block i of queries and j of keys, minus infinity where a key is not
    seen; and slopes under softcap.
    """
    options = call.options
    logits, slopes = _dot(k, q, 1, 1) * options.scale, 1.0
    if options.softcap is not None:
        capped = jnp.tanh(logits / options.softcap)
        logits, slopes = options.softcap * capped, 1 - capped * capped
    keys, queries = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, dim) for dim in (0, 1))
    keys, queries = keys + j * call.kv_block, queries + (i * call.q_block + shift)
    seen = keys < call.kv_length
    if options.left is not None:
        seen &= keys >= queries - options.left
    if options.right is not None:
        seen &= keys <= queries + options.right
    if ids:
        seen &= ids[0] == ids[1]
    return jnp.where(seen, logits, -jnp.inf), slopes


def _dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int) -> jax.Array:
    """The product of two matrices over a dimension of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((x_dim,), (y_dim,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _prepare(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    kv_ids: Any,
    shift: Any,
    blocks: tuple[int, int],
    interpret: Any,
) -> tuple[_Call, tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The call; q, k, v by heads and the ids of queries and of keys, if any, padded to whole
    blocks; the keys' blocks to meet.
    """
    lengths = q.shape[1], k.shape[1]
    blocks = tuple(
        min(block, _round_up(length, 128)) for block, length in zip(blocks, lengths, strict=True)
    )
    call = _Call(
        options, *blocks, lengths[1], q.shape[2] // k.shape[2], q_ids is not None, interpret
    )
    arrays = [
        _heads_first(x, block) for x, block in zip((q, k, v), (*blocks, blocks[1]), strict=True)
    ]
    if call.has_ids:
        arrays += [_pad(q_ids, blocks[0], 1)[:, None], _pad(kv_ids, blocks[1], 1)[:, :, None]]
    return (
        call,
        tuple(arrays),
        *_per_row(key_blocks(options, shift, lengths, blocks, q_ids, kv_ids), len(q)),
    )


def _per_row(ranges: tuple[jax.Array, jax.Array], batch: int) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.broadcast_to(x, (batch, x.shape[1])) for x in ranges)


def _steps(call: _Call, block: int, other_block: int, others: int) -> int:
    """The most blocks of the other kind that one block can meet: all, or what a window spans."""
    left, right = call.options.left, call.options.right
    if left is None or right is None:
        return others
    return min(others, -(-(block + left + right) // other_block) + 1)


def _q_index(b: Any, n: Any, i: Any, step: Any, *_: Any) -> tuple[Any, ...]:
    return b, n, i


def _kv_index(call: _Call) -> Any:
    def index(b: Any, n: Any, i: Any, step: Any, first: Any, end: Any, *_: Any) -> tuple[Any, ...]:
        return (
            b,
            jax.lax.div(n, call.group),
            jnp.minimum(first[b, i] + step, jnp.maximum(end[b, i] - 1, 0)),
        )

    return index


def _specs(
    call: _Call, operands: tuple[jax.Array, ...], q_index: Any, kv_index: Any
) -> list[pl.BlockSpec]:
    """The blocks of q, k, v, of the ids if any, and, in the backward pass, of g, lse and row sums.
    An index is (row, head, block).
    """

    def block(index: Any, size: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, width), lambda *at: (*index(*at), 0))

    q, k, v = operands[:3]
    specs = [
        block(q_index, call.q_block, q.shape[3]),
        *(block(kv_index, call.kv_block, x.shape[3]) for x in (k, v)),
    ]
    if call.has_ids:
        specs.append(pl.BlockSpec((None, 1, call.q_block), lambda *at: (at[0], 0, q_index(*at)[2])))
        specs.append(
            pl.BlockSpec((None, call.kv_block, 1), lambda *at: (at[0], kv_index(*at)[2], 0))
        )
    if len(operands) > len(specs):
        row = pl.BlockSpec(
            (None, None, 1, call.q_block), lambda *at: (*q_index(*at)[:2], 0, q_index(*at)[2])
        )
        specs += [block(q_index, call.q_block, v.shape[3]), row, row]
    return specs


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, T, N, H] to [B, N, T, H], T filled up to whole blocks with zeros."""
    return _pad(jnp.moveaxis(x, 2, 1), block, 2)


def _pad(x: jax.Array, block: int, dim: int) -> jax.Array:
    return jnp.pad(x, [(0, -size % block if i == dim else 0) for i, size in enumerate(x.shape)])


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
