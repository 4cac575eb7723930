"""Multiplies rows by their experts' gate and up on TPUs, with the activation in the epilogue."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.grouped_matmul.activation import swiglu_of_pair
from moe.kernels.grouped_matmul.tpu.blocks import (
    BUFFERS,
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


def project(
    x_GbD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    blocks: BlockMap,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns gate and up side by side, [G, b, 2F], and silu(gate) * up, [G, b, F].

    The activation is computed from gate and up as they are rounded.
    """
    (num_blocks, block_rows, dim), width = x_GbD.shape, w_gate_EDF.shape[2]
    tile = choose_tile(block_rows, dim, width, x_GbD.dtype)
    num_tiles = width // tile

    def weight_index(j: Index, g: Index, half: Index, *map_refs: Ref) -> tuple[Index, ...]:
        return block_expert(g, *map_refs), 0, j

    weight_spec = pl.BlockSpec((None, dim, tile), weight_index)
    shape = num_blocks, block_rows, width
    kernel = Kernel(
        "experts_projections",
        _kernel,
        # A block of rows takes two steps, one for gate and one for up. Each step writes its own
        # half of `gate_up`, and both weights stay where they are.
        (num_tiles, num_blocks, 2),
        in_specs=[rows_spec(block_rows, dim), weight_spec, weight_spec],
        out_specs=(
            output_spec(block_rows, tile, lambda j, g, half: half * num_tiles + j),
            output_spec(block_rows, tile, lambda j, g, half: j),
        ),
        out_shapes=(
            jax.ShapeDtypeStruct((*shape[:2], 2 * width), x_GbD.dtype),
            jax.ShapeDtypeStruct(shape, x_GbD.dtype),
        ),
        parallel=2,
        flops=4 * x_GbD.size * width,
        bytes_read=num_tiles * nbytes(x_GbD) + nbytes(w_gate_EDF, w_up_EDF),
        scratch=[pltpu.VMEM((block_rows, tile), x_GbD.dtype)],
    )
    return run_kernel(kernel, blocks, (x_GbD, w_gate_EDF, w_up_EDF), interpret)


def choose_tile(block_rows: int, dim: int, width: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns the columns of F in a tile, whose gate and up lie in VMEM with all D rows."""
    item, products = jnp.dtype(dtype).itemsize, block_rows * dim * num_passes(dtype)
    weights, outputs = 2 * dim * item, 2 * block_rows * item
    # Gate is kept until up is there, and the activation computes in float32.
    values = block_rows * (item + 4 * 5)
    fixed = BUFFERS * block_rows * dim * item
    if tile := widest_tile(width, fixed, BUFFERS * (weights + outputs) + values, products):
        return tile
    raise NotImplementedError(
        f"'tpu' has no room in VMEM for blocks of {block_rows} rows of width {dim} and weights of "
        "as many: take 'blockwise'"
    )


def _kernel(
    experts: Ref,
    num_used: Ref,
    x: Ref,
    w_gate: Ref,
    w_up: Ref,
    gate_up: Ref,
    hidden: Ref,
    gate: Ref,
) -> None:
    half, is_used = pl.program_id(2), pl.program_id(1) < num_used[0]

    @pl.when(is_used & (half == 0))
    def _() -> None:
        gate[...] = dot(x[...], w_gate[...], 1, 0).astype(gate.dtype)
        gate_up[...] = gate[...]

    @pl.when(is_used & (half == 1))
    def _() -> None:
        up = dot(x[...], w_up[...], 1, 0).astype(gate_up.dtype)
        gate_up[...] = up
        hidden[...] = swiglu_of_pair(gate[...], up)[0].astype(hidden.dtype)

    @pl.when(~is_used)
    def _() -> None:
        gate_up[...] = jnp.zeros_like(gate_up)
        hidden[...] = jnp.zeros_like(hidden)
