"""Attention on NVIDIA Hopper GPUs, in Pallas' Mosaic GPU: the output here, its gradients in
`hopper_backward.py`.

A program takes 128 queries of one head. Two warpgroups compute, 64 queries each; a third only
starts the copies of blocks of keys and values into a ring in shared memory. The schedule is that of
FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2): in a step a warpgroup issues its product
of queries with the next keys and its product of the last weights with their values, hands the
tensor cores to the other warpgroup, and computes the next weights while both run.

Which blocks a tile meets comes as int32 in global memory, from `masks.py`: first those at both
ends, which need a mask, then those between, which run without one. A tile whose queries see nothing
meets one block, masked, so that no loop is ever empty.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.masks import Options, clear_key_blocks, key_blocks

ROWS = 64  # of a warpgroup: the height of its matrix instruction
Q_BLOCK = 2 * ROWS
LOG2E = math.log2(math.e)
# How the registers of a warpgroup hold a matrix, and a vector with one number for each of its rows
# or columns.
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
# Of the 168 registers that each thread of the three warpgroups starts with, two keep 240 and the
# one that copies 24.
FEW_REGISTERS, MANY_REGISTERS = 24, 240
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Inputs(NamedTuple):
    """A kernel's arrays, or the references to them; lengths are whole blocks and widths multiples
    of 64.
    """

    ranges: Any  # int32 [B, tiles, 4]: see `Plan`
    shift: Any  # int32 [1]
    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any
    q_ids: Any = None  # int32 [B, T]
    kv_ids: Any = None
    sinks: Any = None  # float32 [N]
    g: Any = None  # [B, T, N, H]: the gradient of the output
    lse: Any = None  # float32 [B, N, T], in base 2
    row_sums: Any = None  # float32 [B, N, T]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a kernel: the options, the sizes of blocks, how many are in flight, the
    keys there are, heads to a key head.
    """

    options: Options
    q_block: int
    kv_block: int
    stages: int
    kv_length: int
    group: int
    masked: bool  # some block may need a mask

    @property
    def factor(self) -> float:
        """What makes of `bounded` scores logits in base 2, inside the exponential: above zero, so
        that it may follow a maximum.
        """
        if self.options.softcap is not None:
            return self.options.softcap * LOG2E
        return self.options.scale * LOG2E if self.options.scale > 0 else LOG2E

    def slot(self, step: Any) -> Any:
        """Where a step's block lies. A compiler that saw that one slot is always 0 would hold all
        its addresses in registers.
        """
        return (
            jax.lax.rem(step, jnp.int32(self.stages)) if self.stages > 1 else jnp.minimum(step, 0)
        )

    def bounded(self, scores: jax.Array) -> jax.Array:
        """Logits less `factor`; between -1 and 1 with softcap."""
        if self.options.softcap is not None:
            return jnp.tanh(scores * (self.options.scale / self.options.softcap))
        return scores if self.options.scale > 0 else scores * self.options.scale


def forward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in the dtype of the queries, and lse [B, T, N] in float32.

    With `options.partial` the output is float32, with twice the digits of the queries' dtype: the
    kernel writes the rounded output and what rounding took, for shared memory holds no float32.
    """
    kv_block, stages = _block_and_stages(q_BTNH.shape[3], v_BSKH.shape[3])
    lengths, blocks = (q_BTNH.shape[1], k_BSKH.shape[1]), (Q_BLOCK, kv_block)
    of_mask = options, shift, lengths, blocks
    met = key_blocks(*of_mask, q_ids_BT, kv_ids_BS)
    ranges = ranges_of(met, clear_key_blocks(*of_mask, met, q_ids_BT, kv_ids_BS), len(q_BTNH))
    call = Call(
        options,
        *blocks,
        stages,
        lengths[1],
        q_BTNH.shape[2] // k_BSKH.shape[2],
        needs_mask(options, lengths[1], kv_block, q_ids_BT),
    )
    inputs = prepare(blocks, ranges, shift, q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS)
    inputs = inputs._replace(sinks=None if sinks_N is None else sinks_N.astype(jnp.float32))
    (batch, length, heads, width), value_width = inputs.q.shape, inputs.v.shape[3]
    rounded = jax.ShapeDtypeStruct((batch, length, heads, value_width), q_BTNH.dtype)
    output, lse, *lost = plgpu.kernel(
        functools.partial(_forward_kernel, call),
        out_type=(
            rounded,
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
            *[rounded] * options.partial,
        ),
        scratch_types=_scratch(call, width, value_width, q_BTNH.dtype, q_ids_BT is not None),
        # Heads that share keys run at the same time and find them in the cache; tiles that meet the
        # most blocks come first.
        grid=(batch, length // Q_BLOCK, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
    )(inputs)
    if options.partial:
        output = output.astype(jnp.float32) + lost[0].astype(jnp.float32)
    return output[:, : lengths[0], :, : v_BSKH.shape[3]], jnp.moveaxis(lse, 1, 2)[:, : lengths[0]]


def _block_and_stages(width: int, value_width: int) -> tuple[int, int]:
    """Keys in a block, and blocks in flight: what registers and 227 KiB of shared memory hold."""
    widest = max(width, value_width)
    return (128, 2) if widest <= 128 else (64, 3) if widest <= 192 else (64, 2)


def _scratch(call: Call, width: int, value_width: int, dtype: Any, has_ids: bool) -> "Scratch":
    of_queries, of_keys = (2, ROWS), (call.stages, call.kv_block)
    return Scratch(
        q=matrices((*of_queries, width), dtype),
        k=matrices((*of_keys, width), dtype),
        v=matrices((*of_keys, value_width), dtype),
        output=None if value_width == width else matrices((*of_queries, value_width), dtype),
        lse=plgpu.SMEM(of_queries, jnp.float32),
        q_ids=plgpu.SMEM(of_queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(of_keys, jnp.int32) if has_ids else None,
        q_full=plgpu.Barrier(num_barriers=2, num_arrivals=1 + has_ids),
        k_full=plgpu.Barrier(num_barriers=call.stages, num_arrivals=1 + has_ids),
        v_full=plgpu.Barrier(num_barriers=call.stages),
        k_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
        v_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
        turn=plgpu.Barrier(num_barriers=2),
    )


class Scratch(NamedTuple):
    """The forward kernel's shared memory, and its barriers: a ring's are full, by the copy, and
    free, by both warpgroups.
    """

    q: Any
    k: Any
    v: Any
    output: Any  # None where the queries' place can take it
    lse: Any
    q_ids: Any
    kv_ids: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any  # a warpgroup's, to issue products


def _forward_kernel(call: Call, x: Inputs, output: Any, lse: Any, *refs: Any) -> None:
    """`refs` begin with where to write what rounding takes from the output, if that is wanted."""
    lost, at = refs[: call.options.partial], Scratch(*refs[call.options.partial :])
    b, n, me = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    tile = x.ranges.shape[1] - 1 - jax.lax.axis_index("tile")
    plan = read_plan(x.ranges, b, tile, least=1)

    @pl.when(me == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        copy_keys(call, x, at, b, n, plan)

    @pl.when(me < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * Q_BLOCK + me * ROWS
        rows = pl.ds(start, ROWS)
        plgpu.copy_gmem_to_smem(x.q.at[b, rows, n], at.q.at[me], at.q_full.at[me])
        if x.q_ids is not None:
            plgpu.copy_gmem_to_smem(x.q_ids.at[b, rows], at.q_ids.at[me], at.q_full.at[me])
        plgpu.barrier_wait(at.q_full.at[me])
        mask = functools.partial(mask_keys, call, at, me, start + x.shift[0], plan)
        sink = -jnp.inf if x.sinks is None else x.sinks[n] * LOG2E
        attend = functools.partial(_attend, call, at, me, plan, mask, sink)
        total_output, highest, total = pl.run_scoped(
            attend, plgpu.ACC((ROWS, output.shape[3]), jnp.float32)
        )
        some = jnp.where(total > 0, total, 1.0)
        staged = (at.q if at.output is None else at.output).at[me]
        total_output = total_output * across(1 / some, total_output.shape)
        rounded = total_output.astype(output.dtype)
        # before anything is stored, so that registers hold two halves of the output then, and not
        # all of it and a half
        if lost:
            rest = (total_output - rounded.astype(jnp.float32)).astype(output.dtype)
            rounded, rest = jax.lax.optimization_barrier((rounded, rest))
        staged[...] = rounded
        at.lse[me] = jnp.where(total > 0, highest / LOG2E + jnp.log(some), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, output.at[b, rows, n])
        plgpu.copy_smem_to_gmem(at.lse.at[me], lse.at[b, n, rows])
        pl.when(me == 0)(lambda: plgpu.barrier_wait(at.turn.at[0]))
        if lost:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the output has left its place
            staged[...] = rest
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, lost[0].at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def copy_keys(call: Call, x: Inputs, at: Any, b: Any, n: Any, plan: "Plan") -> None:
    """What the warpgroup that copies does for a tile of queries."""
    head = jax.lax.div(n, jnp.int32(call.group))

    @pl.loop(0, plan.steps)
    def _(step: Any) -> None:
        slot, keys = call.slot(step), pl.ds(plan.block(step) * call.kv_block, call.kv_block)
        pl.when(step >= call.stages)(lambda: plgpu.barrier_wait(at.k_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.k.at[b, keys, head], at.k.at[slot], at.k_full.at[slot])
        if x.kv_ids is not None:
            plgpu.copy_gmem_to_smem(x.kv_ids.at[b, keys], at.kv_ids.at[slot], at.k_full.at[slot])
        pl.when(step >= call.stages)(lambda: plgpu.barrier_wait(at.v_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.v.at[b, keys, head], at.v.at[slot], at.v_full.at[slot])

    drain(call.stages, plan.steps, at.k_free, at.v_free)


def drain(stages: int, steps: Any, *rings: Any) -> None:
    """Sees the last phases of barriers, as JAX's interpreter demands of every phase."""
    for slot in range(stages):
        for free in rings:
            pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, free.at[slot]))


def _attend(
    call: Call, at: Scratch, me: Any, plan: "Plan", mask: Any, sink: Any, summed: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A warpgroup's weighted sum of values, and each row's highest logit, in base 2, and sum of
    weights.
    """
    products = plgpu.ACC((ROWS, call.kv_block), jnp.float32)

    def await_keys(step: Any) -> None:
        pl.when(step < plan.steps)(lambda: plgpu.barrier_wait(at.k_full.at[call.slot(step)]))

    def first_scores(scores: Any) -> jax.Array:
        plgpu.wgmma(scores, at.q.at[me], at.k.at[0].T)
        return scores[...]

    def meet(masked: bool, step: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, highest, total = carry
        slot, last = call.slot(step), call.slot(step - 1)
        plgpu.barrier_wait(at.turn.at[me])

        def overlap(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, at.q.at[me], at.k.at[slot].T)
            plgpu.barrier_wait(at.v_full.at[last])
            plgpu.wgmma(summed, weights, at.v.at[last])
            plgpu.barrier_arrive(at.turn.at[1 - me])
            # A mask needs the registers of the last weights, so here the product with the values is
            # awaited too.
            return plgpu.wgmma_accumulator_load(scores, wait_n=0 if masked else 1)

        logits = call.bounded(pl.run_scoped(overlap, products))
        if masked:
            logits = mask(step, slot, logits)
        plgpu.barrier_arrive(at.k_free.at[slot])
        # The compiler would sink the exponentials to where they are used, behind the wait for the
        # product that they are to overlap with: a barrier for values keeps them in place in LLVM,
        # and the branch of another wait keeps them there in ptxas, which moves no instruction
        # between blocks. Rounded weights are operands, which must not change while a product runs:
        # they come after it.
        weights, kept, highest, total = jax.lax.optimization_barrier(
            _softmax(call, logits, highest, total, masked)
        )
        await_keys(step + 1)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(at.v_free.at[last])
        sums = plgpu.wgmma_accumulator_load(summed, wait_n=None)
        summed[...] = sums * across(kept, sums.shape)
        return weights.astype(at.v.dtype), highest, total

    plgpu.barrier_wait(at.k_full.at[0])
    logits = call.bounded(pl.run_scoped(first_scores, products))
    if call.masked:
        logits = mask(0, 0, logits)
    plgpu.barrier_arrive(at.k_free.at[0])
    # A sink is a logit as a key's is, with nothing to carry: the softmax begins with it.
    highest, total = (by_row(x) for x in (sink, jnp.where(sink > -jnp.inf, 1.0, 0.0)))
    weights, _, highest, total = _softmax(call, logits, highest, total, call.masked)
    carry = weights.astype(at.v.dtype), highest, total
    await_keys(1)
    pl.when(me == 1)(lambda: plgpu.barrier_arrive(at.turn.at[0]))
    begin = jnp.maximum(plan.masked, 1)
    if call.masked:
        carry = jax.lax.fori_loop(1, begin, functools.partial(meet, True), carry)
    weights, highest, total = jax.lax.fori_loop(
        begin, plan.steps, functools.partial(meet, False), carry
    )
    last = call.slot(plan.steps - 1)
    plgpu.barrier_wait(at.v_full.at[last])
    plgpu.wgmma(summed, weights, at.v.at[last])
    total_output = plgpu.wgmma_accumulator_load(summed)
    plgpu.barrier_arrive(at.v_free.at[last])
    return total_output, highest, total


def _softmax(
    call: Call, logits: jax.Array, highest: jax.Array, total: jax.Array, masked: bool
) -> tuple[jax.Array, ...]:
    """Weights, what is kept of the sums before, and the new highest logits and sums of weights."""
    new_highest = jnp.maximum(highest, jnp.max(logits, axis=1) * call.factor)
    base = (
        jnp.where(new_highest > -jnp.inf, new_highest, 0.0) if masked else new_highest
    )  # nothing is seen yet: all weights are zero
    weights = jnp.exp2(logits * call.factor - across(base, logits.shape))
    kept = jnp.exp2(highest - base)
    return weights, kept, new_highest, total * kept + jnp.sum(weights, axis=1)


def mask_keys(
    call: Call,
    at: Any,
    me: Any,
    position: Any,
    plan: "Plan",
    step: Any,
    slot: Any,
    logits: jax.Array,
) -> jax.Array:
    """`mask` for rows of queries and a step's block of keys."""
    options = call.options
    ids = None if at.q_ids is None else (at.q_ids.at[me], at.kv_ids.at[slot])
    return mask(
        logits,
        position,
        plan.block(step) * call.kv_block,
        options.left,
        options.right,
        call.kv_length,
        ids,
    )


class Plan(NamedTuple):
    """The blocks that a tile meets: scalars, of which the first four are read from `ranges`."""

    first: Any  # of the blocks met
    clear: Any  # of those that need no mask
    clear_end: Any
    end: Any
    masked: Any  # how many need one
    steps: Any

    def block(self, step: Any) -> Any:
        """The block of a step: those that need a mask, then the clear ones."""
        return jnp.where(
            step < self.masked, self.masked_block(step), step - self.masked + self.clear
        )

    def masked_block(self, step: Any) -> Any:
        """Those before the clear ones, then those after."""
        before = self.clear - self.first
        return step + jnp.where(step < before, self.first, self.clear_end - before)


def read_plan(ranges: Any, b: Any, tile: Any, least: int = 0) -> Plan:
    """The plan of a tile, of at least so many steps."""
    first, clear, clear_end, end = (ranges[b, tile, i] for i in range(4))
    return Plan(
        first,
        clear,
        clear_end,
        end,
        end - first - (clear_end - clear),
        jnp.maximum(end - first, least),
    )


def ranges_of(
    met: tuple[jax.Array, jax.Array], clear: tuple[jax.Array, jax.Array], batch: int
) -> jax.Array:
    """What `read_plan` reads: int32 [B, tiles, 4]."""
    tiles = met[0].shape[1]
    ranges = [jnp.broadcast_to(x, (batch, tiles)) for x in (met[0], *clear, met[1])]
    return jnp.stack(ranges, axis=-1).astype(jnp.int32)


def needs_mask(options: Options, kv_length: int, kv_block: int, ids: jax.Array | None) -> bool:
    """Whether some block may need a mask."""
    return (
        options.left is not None
        or options.right is not None
        or ids is not None
        or bool(kv_length % kv_block)
    )


def mask(
    logits: jax.Array,
    row: Any,
    column: Any,
    left: int | None,
    right: int | None,
    length: int | None,
    ids: tuple[Any, Any] | None,
) -> jax.Array:
    """Minus infinity for columns more than `left` before their row or `right` after it, for those
    beyond a `length`, and where ids differ.

    `row` and `column` are the positions of the first ones, `ids` the references to theirs. Limits
    are one number to a row, so that each logit costs a comparison to a limit.
    """
    at_row = plgpu.layout_cast(jax.lax.iota(jnp.int32, ROWS), BY_ROW) + (row - column)
    at_column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
    limit = None if right is None else at_row + (right + 1)
    if length is not None:
        limit = length - column if limit is None else jnp.minimum(limit, length - column)
    seen = True
    if limit is not None:
        seen = at_column < (limit if jnp.ndim(limit) == 0 else across(limit, logits.shape))
    if left is not None:
        seen &= at_column >= across(at_row - left, logits.shape)
    if ids is not None:
        row_ids, column_ids = (
            plgpu.layout_cast(x[...], layout)
            for x, layout in zip(ids, (BY_ROW, BY_COLUMN), strict=True)
        )
        seen &= across(row_ids, logits.shape) == jax.lax.broadcast_in_dim(
            column_ids, logits.shape, [1]
        )
    return logits if seen is True else jnp.where(seen, logits, -jnp.inf)


def by_row(value: Any) -> jax.Array:
    """One number to a row, all the same."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW)


def across(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number to a row, for each of its columns."""
    return jax.lax.broadcast_in_dim(rows, shape, [0])


def matrices(shape: tuple[int, ...], dtype: Any, columns: int = 64) -> Any:
    """Shared memory for matrices as tensor cores read them; a product sums over multiples of
    `columns` rows or columns.
    """
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)),
    )


def prepare(
    blocks: tuple[int, int],
    ranges: jax.Array,
    shift: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    kv_ids: Any,
) -> Inputs:
    """The arrays with lengths filled up to whole blocks, and widths to multiples of 64, with zeros."""
    shift = jnp.reshape(jnp.asarray(shift, jnp.int32), 1)
    ids = (
        None if x is None else pad(x, 1, block)
        for x, block in zip((q_ids, kv_ids), blocks, strict=True)
    )
    q, k, v = (
        pad(pad(x, 1, block), 3, 64)
        for x, block in zip((q, k, v), (*blocks, blocks[1]), strict=True)
    )
    return Inputs(ranges, shift, q, k, v, *ids)


def pad(x: jax.Array, dim: int, multiple: int) -> jax.Array:
    """Zeros after the end, up to a multiple."""
    more = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, more if i == dim else 0) for i in range(x.ndim)]) if more else x
