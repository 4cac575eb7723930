"""Computes the experts' SwiGLU in plain JAX, in a loop over the blocks that hold an expert's rows.

jax.lax.ragged_dot does E times the needed work on CPUs, and on GPUs too. Here each block gathers
its own rows (ScatterMoE, Tan et al. 2024) and goes through all matmuls of its expert while it is in
the cache, so the gathered rows and the hidden activations never exist as a whole. The backward pass
takes the gradient of a row's weight before the last matmul, so that the forward pass need not save
the output of that matmul (SonicMoE, Guo et al. 2025).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moe.kernels.grouped_matmul.activation import sum_dtype, swiglu
from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs

# How many blocks of one expert are multiplied at once. Long runs make large matmuls, which are
# faster, while the blocks stay small, so that an expert's last block has little padding.
RUN_LENGTHS = (16, 4, 1)

Arrays = TypeVar("Arrays", Outputs, Gradients)

# Computes a run of blocks. Takes the arrays to write to, the number of the run's first row, the
# number of its rows (static) and its expert, and returns the arrays.
ComputeRun = Callable[[Arrays, jax.Array, int, jax.Array], Arrays]

_slice = jax.lax.dynamic_slice_in_dim
_update = jax.lax.dynamic_update_slice_in_dim


def forward(inputs: Inputs) -> Outputs:
    """Returns each row's output and its gate and up projections, in the dtype of the tokens."""
    dtype = inputs.x_ND.dtype

    def compute_run(outputs: Outputs, start: jax.Array, size: int, expert: jax.Array) -> Outputs:
        x = _gather_rows(inputs.x_ND, inputs.tokens_I, start, size)

        # Both projections are one matmul. They are rounded before the activation, so that the
        # backward pass, which reads them rounded, differentiates exactly what was computed here.
        gate_up = _matmul("id,df->if", x, _concatenate_gate_up(inputs, expert)).astype(dtype)
        hidden = swiglu(gate_up)[0].astype(dtype)

        rows = _matmul("if,fd->id", hidden, inputs.w_down_EFD[expert]).astype(dtype)
        return Outputs(
            _update(outputs.rows_ID, rows, start, 0), _update(outputs.gate_up, gate_up, start, 0)
        )

    # Blocks without an expert are not computed and keep these zeros.
    num_rows, (_, dim, width) = inputs.tokens_I.size, inputs.w_gate_EDF.shape
    outputs = Outputs(jnp.zeros((num_rows, dim), dtype), jnp.zeros((num_rows, 2 * width), dtype))
    return _compute_all_runs(inputs, compute_run, outputs)


def backward(
    inputs: Inputs, gate_up: jax.Array, weights_I: jax.Array, grad_y_ND: jax.Array
) -> Gradients:
    """Returns the gradients, those of the weights in float32 or float64."""
    dtype = inputs.x_ND.dtype

    def compute_run(
        gradients: Gradients, start: jax.Array, size: int, expert: jax.Array
    ) -> Gradients:
        x = _gather_rows(inputs.x_ND, inputs.tokens_I, start, size)
        grad_y = _gather_rows(grad_y_ND, inputs.tokens_I, start, size)
        weights = _slice(weights_I, start, size)[:, None]
        hidden, swiglu_backward = swiglu(_slice(gate_up, start, size))

        # y = weight * (hidden w_down). The gradient of `hidden` before the weight is applied also
        # gives the weight's own gradient: grad_y (hidden w_down) = (grad_y w_down^T) hidden.
        grad_unweighted = _matmul("id,fd->if", grad_y, inputs.w_down_EFD[expert])
        grad_weights = jnp.sum(grad_unweighted * hidden, axis=1)
        grad_w_down = _matmul("if,id->fd", (hidden * weights).astype(dtype), grad_y)

        # Back through the activation, to the two projections as one.
        grad_gate_up = swiglu_backward(grad_unweighted * weights).astype(dtype)
        grad_x = _matmul("if,df->id", grad_gate_up, _concatenate_gate_up(inputs, expert))
        grad_w_gate, grad_w_up = jnp.split(_matmul("id,if->df", x, grad_gate_up), 2, axis=1)

        # A row belongs to one run, so its gradients are written. An expert may have several runs,
        # so its gradients are added up.
        return Gradients(
            _update(gradients.rows_ID, grad_x.astype(dtype), start, 0),
            gradients.w_gate_EDF.at[expert].add(grad_w_gate),
            gradients.w_up_EDF.at[expert].add(grad_w_up),
            gradients.w_down_EFD.at[expert].add(grad_w_down),
            _update(gradients.weights_I, grad_weights, start, 0),
        )

    rows_ID = jnp.zeros((inputs.tokens_I.size, inputs.x_ND.shape[1]), dtype)
    shapes = (w.shape for w in (inputs.w_gate_EDF, inputs.w_up_EDF, inputs.w_down_EFD, weights_I))
    zeros = (jnp.zeros(shape, sum_dtype(dtype)) for shape in shapes)
    return _compute_all_runs(inputs, compute_run, Gradients(rows_ID, *zeros))


def _compute_all_runs(inputs: Inputs, compute_run: ComputeRun[Arrays], arrays: Arrays) -> Arrays:
    """Applies `compute_run` to every run of blocks that an expert uses."""

    def step(run_length: int, first_blocks: jax.Array, i: jax.Array, arrays: Arrays) -> Arrays:
        block = first_blocks[i]
        start, size = block * inputs.block_rows, run_length * inputs.block_rows
        return compute_run(arrays, start, size, inputs.experts_G[block])

    # A loop's body has static shapes, so the runs of each length have a loop of their own.
    for run_length, first_blocks, num_runs in _cut_into_runs(inputs.experts_G, inputs.num_experts):
        body = functools.partial(step, run_length, first_blocks)
        arrays = jax.lax.fori_loop(0, num_runs, body, arrays)
    return arrays


class _Runs(NamedTuple):
    """The runs of one length."""

    length: int  # the number of blocks in each run
    # The first block of each run. Its size is static, as many as there could be: only the first
    # `num_runs` of its entries are runs.
    first_blocks: jax.Array
    num_runs: jax.Array


def _cut_into_runs(experts_G: jax.Array, num_experts: int) -> list[_Runs]:
    """Cuts each expert's blocks into runs, the longest runs first."""
    num_blocks = experts_G.size
    firsts_G = jnp.searchsorted(experts_G, experts_G, side="left")
    ends_G = jnp.searchsorted(experts_G, experts_G, side="right")

    # A block's place among those of its expert that are not in a run yet, and how many those are.
    place_G = jnp.arange(num_blocks) - firsts_G
    left_G = jnp.where(experts_G < num_experts, ends_G - firsts_G, 0)

    runs = []
    for length in RUN_LENGTHS:
        if length > num_blocks:
            continue
        covered_G = left_G // length * length  # how many blocks the runs of this length take
        starts_run_G = (place_G >= 0) & (place_G < covered_G) & (place_G % length == 0)
        first_blocks = jnp.nonzero(starts_run_G, size=num_blocks // length, fill_value=0)[0]
        runs.append(_Runs(length, first_blocks, jnp.sum(starts_run_G)))
        place_G, left_G = place_G - covered_G, left_G - covered_G
    return runs


def _gather_rows(x_ND: jax.Array, tokens_I: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the tokens of a run's rows, and any token for a row that only fills up its block."""
    # To return zeros there (mode="fill") would cost a tenth of the whole loop's time.
    return x_ND.at[_slice(tokens_I, start, size)].get(mode="clip")


def _concatenate_gate_up(inputs: Inputs, expert: jax.Array) -> jax.Array:
    """Returns an expert's gate and up weights side by side, [D, 2F]."""
    # This is done for each run, inside the loop. Done once for all experts, it would copy all
    # weights before the loop, and split all their gradients after it.
    return jnp.concatenate([inputs.w_gate_EDF[expert], inputs.w_up_EDF[expert]], axis=1)


def _matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=sum_dtype(x.dtype))
