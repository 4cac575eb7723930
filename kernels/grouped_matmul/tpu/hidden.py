"""Goes back through down and the activation on TPUs, in one kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe.kernels.grouped_matmul.activation import swiglu_of_pair
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
    used_block,
    widest_tile,
)


class HiddenGradients(NamedTuple):
    """What the rest of the backward pass needs."""

    grad_gate: jax.Array  # [G, b, F]
    grad_up: jax.Array  # [G, b, F]
    weighted: jax.Array  # the hidden activation times the rows' weights, [G, b, F]
    grad_weights: jax.Array  # the gradients of the rows' weights, float32 [G, b]


def hidden_gradients(
    grad_y_GbD: jax.Array,
    w_down_EFD: jax.Array,
    gate_up: jax.Array,
    weights_Gb: jax.Array,
    blocks: BlockMap,
    interpret: bool = False,
) -> HiddenGradients:
    """Returns the gradients of what enters the activation, and of the rows' weights.

    y is the sum of weight * (hidden w_down), so the gradient of `hidden` before the weight is
    applied also gives the weight's own gradient: (grad_y w_downᵀ) hidden.
    """
    (num_blocks, block_rows, dim), width = grad_y_GbD.shape, w_down_EFD.shape[1]
    tile = choose_tile(block_rows, dim, width, grad_y_GbD.dtype)
    num_tiles = width // tile

    def weight_index(j: Index, g: Index, *map_refs: Ref) -> tuple[Index, ...]:
        return block_expert(g, *map_refs), j, 0

    # The rows' weights and their gradients lie along lanes, [1, b].
    along_lanes = pl.BlockSpec(
        (None, 1, block_rows), lambda j, g, _, num_used: (used_block(g, num_used), 0, 0)
    )
    lane_sums = pl.BlockSpec((None, None, 1, block_rows), lambda j, g, *_: (j, g, 0, 0))
    by_tile = output_spec(block_rows, tile, lambda j, g: j)
    columns = jax.ShapeDtypeStruct((num_blocks, block_rows, width), grad_y_GbD.dtype)
    sums = jax.ShapeDtypeStruct((num_tiles, num_blocks, 1, block_rows), jnp.float32)
    kernel = Kernel(
        "experts_hidden",
        _kernel,
        (num_tiles, num_blocks),
        in_specs=[
            along_lanes,
            rows_spec(block_rows, dim),
            pl.BlockSpec((None, tile, dim), weight_index),
            rows_spec(block_rows, tile, lambda j, g: j),
            rows_spec(block_rows, tile, lambda j, g: num_tiles + j),
        ],
        out_specs=(by_tile, by_tile, by_tile, lane_sums),
        out_shapes=(columns, columns, columns, sums),
        parallel=2,
        flops=2 * grad_y_GbD.size * width,
        bytes_read=num_tiles * nbytes(grad_y_GbD) + nbytes(w_down_EFD, gate_up),
    )
    arrays = weights_Gb[:, None], grad_y_GbD, w_down_EFD, gate_up, gate_up
    grad_gate, grad_up, weighted, grad_weights = run_kernel(kernel, blocks, arrays, interpret)
    # Each tile has summed over its own columns.
    return HiddenGradients(grad_gate, grad_up, weighted, jnp.sum(grad_weights, axis=(0, 2)))


def choose_tile(block_rows: int, dim: int, width: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns the columns of F in a tile, whose weights lie in VMEM with all of D."""
    item, products = jnp.dtype(dtype).itemsize, block_rows * dim * num_passes(dtype)
    # Gate and up, the three results, and what is computed between them in float32.
    values = BUFFERS * 5 * block_rows * item + 8 * block_rows * 4
    fixed = BUFFERS * block_rows * dim * item
    if tile := widest_tile(width, fixed, BUFFERS * dim * item + values, products):
        return tile
    raise NotImplementedError(
        f"'tpu' has no room in VMEM for blocks of {block_rows} rows of width {dim}: "
        "take 'blockwise'"
    )


def _kernel(
    experts: Ref,
    num_used: Ref,
    weights: Ref,
    grad_y: Ref,
    w_down: Ref,
    gate: Ref,
    up: Ref,
    grad_gate: Ref,
    grad_up: Ref,
    weighted: Ref,
    grad_weights: Ref,
) -> None:
    is_used = pl.program_id(1) < num_used[0]

    @pl.when(is_used)
    def _() -> None:
        grad_unweighted = dot(grad_y[...], w_down[...], 1, 1)
        hidden, swiglu_backward = swiglu_of_pair(gate[...], up[...])

        # The sum over the tile's columns: whole vectors first, and then, transposed, sublanes.
        products = grad_unweighted * hidden
        lanes = jnp.zeros((products.shape[0], LANES), jnp.float32)
        for first in range(0, products.shape[1], LANES):
            lanes += products[:, first : first + LANES]
        grad_weights[...] = jnp.sum(lanes.T, axis=0, keepdims=True)

        # Each row's weight goes from its lane to all lanes of its row.
        weight = jnp.broadcast_to(weights[...], (LANES, weights.shape[1])).T[:, :1]
        weighted[...] = (hidden * weight).astype(weighted.dtype)
        for gradient, values in zip(
            (grad_gate, grad_up), swiglu_backward(grad_unweighted * weight), strict=True
        ):
            gradient[...] = values.astype(gradient.dtype)

    @pl.when(~is_used)
    def _() -> None:
        for output in (grad_gate, grad_up, weighted, grad_weights):
            output[...] = jnp.zeros_like(output)
