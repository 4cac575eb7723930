"""Multiplies rows that are grouped by expert with their experts' weights, on TPUs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe.kernels.grouped_matmul.tpu.blocks import (
    BUFFERS,
    LANES,
    BlockMap,
    Index,
    Kernel,
    Ref,
    block_expert,
    dot,
    nbytes,
    num_passes,
    output_spec,
    rows_spec,
    run_kernel,
    widest_tile,
)

# If a tile would have fewer columns, a sum is spread over several calls. A block's rows give
# as many FLOPs for each byte that is fetched of them as a tile of 16-bit weights has columns.
FEWEST_COLUMNS = 512


class Term(NamedTuple):
    """A product that is added up: rows [G, b, K], and weights [E, K, O] or, transposed, [E, O, K].

    Its part `part` of `size` columns of K is multiplied.
    """

    rows: jax.Array
    weights: jax.Array
    part: int
    size: int


def grouped_matmul(
    rows: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...],
    blocks: BlockMap,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Returns the sum of each of `rows` [G, b, K] times its `weights`, [G, b, O], in their dtype.

    A block's weights are those of its expert, [E, K, O], or [E, O, K] if they are to be transposed.
    A block without an expert gives zeros. Sums are in float32.
    """
    (_, block_rows, dim), dtype = rows[0].shape, rows[0].dtype
    width = weights[0].shape[1 if transposed else 2]
    tiling = choose_tiling(len(rows), block_rows, dim, width, dtype)
    terms = [
        Term(*pair, part, tiling.size)
        for pair in zip(rows, weights, strict=True)
        for part in range(dim // tiling.size)
    ]
    # The sum so far passes from call to call in float32.
    per_call, total = len(terms) // tiling.calls, None
    for call in range(tiling.calls):
        own_terms = terms[call * per_call : (call + 1) * per_call]
        is_last = call == tiling.calls - 1
        result = jax.ShapeDtypeStruct(
            (*rows[0].shape[:2], width), dtype if is_last else jnp.float32
        )
        total = _add_terms(own_terms, total, blocks, tiling.columns, result, transposed, interpret)
    assert total is not None
    return total


class Tiling(NamedTuple):
    """How a sum of products is cut."""

    columns: int  # of a tile of the output
    size: int  # the columns of K that a term sums over
    calls: int  # over which the terms are spread


def choose_tiling(
    num_terms: int, block_rows: int, dim: int, width: int, dtype: jax.typing.DTypeLike
) -> Tiling:
    """Returns the tiling with the fewest calls whose tiles are wide, or with the widest tiles.

    A tile of weights has all of the K that its call sums over, so that it stays in VMEM for all
    blocks of its expert. If that leaves room for few columns, the sum is cut instead: a call more
    reads and writes [G, b, O] once more, while a narrow tile fetches all rows for itself.
    """
    item, passes = jnp.dtype(dtype).itemsize, num_passes(dtype)
    # A product of several passes takes so much longer that its rows may be fetched more often.
    enough_columns = min(width, FEWEST_COLUMNS // passes)
    tilings = []
    for calls in (2**power for power in range(dim.bit_length())):
        cuts = max(1, calls // num_terms)  # of each term
        if dim % (cuts * LANES) or (cuts == 1 and num_terms % calls):
            break
        size, terms = dim // cuts, num_terms * cuts // calls
        operands = BUFFERS * terms * size * item
        # The output and the sum so far are float32 at most; then come the products.
        results = block_rows * 4 * (2 * BUFFERS + terms)
        products = terms * block_rows * size * passes
        columns = widest_tile(width, operands * block_rows, operands + results, products)
        if columns >= enough_columns:
            return Tiling(columns, size, calls)
        tilings.append(Tiling(columns, size, calls))
    best = max(tilings, key=lambda tiling: tiling.columns)
    if not best.columns:
        raise NotImplementedError(
            f"'tpu' has no room in VMEM for blocks of {block_rows} rows of width {dim}: "
            "take 'blockwise'"
        )
    return best


def _add_terms(
    terms: list[Term],
    total: jax.Array | None,
    blocks: BlockMap,
    columns: int,
    result: jax.ShapeDtypeStruct,
    transposed: bool,
    interpret: bool,
) -> jax.Array:
    """Returns the sum of terms, and of `total` if there is one."""
    num_blocks, block_rows, width = result.shape
    num_tiles, sizes = width // columns, [term.size for term in terms]
    tile = lambda j, g: j

    def weight_spec(term: Term) -> pl.BlockSpec:
        def index(j: Index, g: Index, *map_refs: Ref) -> tuple[Index, ...]:
            expert = block_expert(g, *map_refs)
            return (expert, j, term.part) if transposed else (expert, term.part, j)

        shape = (columns, term.size) if transposed else (term.size, columns)
        return pl.BlockSpec((None, *shape), index)

    in_specs = [
        rows_spec(block_rows, term.size, lambda j, g, part=term.part: part) for term in terms
    ]
    in_specs += [weight_spec(term) for term in terms]
    arrays = [*(term.rows for term in terms), *(term.weights for term in terms)]
    if total is not None:
        in_specs.append(rows_spec(block_rows, columns, tile))
        arrays.append(total)
    num_rows, item = num_blocks * block_rows, terms[0].rows.dtype.itemsize
    rows_read = num_tiles * num_rows * sum(sizes) * item
    weights_read = sum(sizes) * width * len(terms[0].weights) * item
    kernel = Kernel(
        "experts_matmul",
        functools.partial(_kernel, len(terms), transposed),
        (num_tiles, num_blocks),
        in_specs=in_specs,
        out_specs=output_spec(block_rows, columns, tile),
        out_shapes=result,
        parallel=2,
        flops=2 * num_rows * sum(sizes) * width,
        bytes_read=rows_read + weights_read + (0 if total is None else nbytes(total)),
    )
    return run_kernel(kernel, blocks, arrays, interpret)


def _kernel(num_terms: int, transposed: bool, experts: Ref, num_used: Ref, *refs: Ref) -> None:
    rows, weights = refs[:num_terms], refs[num_terms : 2 * num_terms]
    *so_far, output = refs[2 * num_terms :]  # the sum of the calls before, if there were any
    is_used = pl.program_id(1) < num_used[0]

    @pl.when(is_used)
    def _() -> None:
        total = so_far[0][...] if so_far else jnp.zeros(output.shape, jnp.float32)
        for x, w in zip(rows, weights, strict=True):
            total += dot(x[...], w[...], 1, 1 if transposed else 0)
        output[...] = total.astype(output.dtype)

    @pl.when(~is_used)
    def _() -> None:
        output[...] = jnp.zeros_like(output)
