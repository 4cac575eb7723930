"""Makes calls of the grouped matmuls, and checks an implementation's results against float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.grouped_matmul import Inputs, grouped_swiglu, grouped_swiglu_backward

N, D, F, E = 11, 5, 4, 3

# The rows in a block, and the expert of each block, where 3 is none.
CASES = {
    "every expert": (4, [0, 1, 2, 3]),
    "an expert without rows": (4, [0, 0, 2, 2]),
    "empty blocks": (8, [1, 2, 3, 3]),
    "all blocks empty": (2, [3, 3]),
    "blocks of one row": (1, [0, 1, 1, 3]),
    "runs of every length": (2, [0] * 21 + [1] * 16 + [2] * 7 + [3] * 5),
}

# The largest error, as a part of an array's largest number.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2e-2}


class Case(NamedTuple):
    """A call of the forward and of the backward pass, in float64."""

    inputs: Inputs
    weights_I: np.ndarray
    grad_y_ND: np.ndarray


class Results(NamedTuple):
    """What both passes give, added up over the rows of each token where rows have no order."""

    y_ND: np.ndarray
    grad_x_ND: np.ndarray
    grad_w_gate_EDF: np.ndarray
    grad_w_up_EDF: np.ndarray
    grad_w_down_EFD: np.ndarray
    grad_weights_I: np.ndarray  # 0 where a row only fills up its block


def make_case(name: str) -> Case:
    """Draws a case. The last row of each block of two or more rows only fills it up."""
    block_rows, experts = CASES[name]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, N, (len(experts), block_rows))
    weights = rng.normal(size=tokens.shape)
    if block_rows > 1:
        tokens[:, -1], weights[:, -1] = N, 0.0
    arrays = (rng.normal(size=shape) for shape in ((N, D), (E, D, F), (E, D, F), (E, F, D)))
    inputs = Inputs(*arrays, tokens.reshape(-1), np.array(experts, np.int32))
    return Case(inputs, weights.reshape(-1), rng.normal(size=(N, D)))


@functools.cache
def expected_results(name: str) -> Results:
    """Computes a case's results row by row, with JAX's gradients, in float64."""
    inputs, weights_I, grad_y_ND = make_case(name)
    experts_I = np.repeat(inputs.experts_G, len(inputs.tokens_I) // len(inputs.experts_G))
    [real] = np.nonzero((inputs.tokens_I < N) & (experts_I < E))
    tokens, experts = inputs.tokens_I[real], experts_I[real]

    def weighted_sum(x, w_gate, w_up, w_down, weights):
        def one_row(token, expert, weight):
            hidden = jax.nn.silu(x[token] @ w_gate[expert]) * (x[token] @ w_up[expert])
            return weight * (hidden @ w_down[expert])

        return jnp.zeros_like(x).at[tokens].add(jax.vmap(one_row)(tokens, experts, weights[real]))

    @jax.jit
    def both_passes(grad_y, *arrays):
        y_ND, pull_back = jax.vjp(weighted_sum, *arrays)
        return y_ND, *pull_back(grad_y)

    with jax.enable_x64(True):
        return Results(*map(np.asarray, both_passes(grad_y_ND, *inputs[:4], weights_I)))


def actual_results(case: Case, name: str, dtype: str) -> Results:
    """Computes the results by an implementation in `dtype`."""
    float_dtype = jnp.promote_types(dtype, jnp.float32)
    *floats, tokens_I, experts_G = case.inputs
    inputs = Inputs(*(jnp.asarray(x, dtype) for x in floats), tokens_I, experts_G)
    weights_I = jnp.asarray(case.weights_I, float_dtype)
    grad_y_ND = jnp.asarray(case.grad_y_ND, dtype)

    outputs = grouped_swiglu(inputs, name)
    gradients = grouped_swiglu_backward(inputs, outputs.gate_up, weights_I, grad_y_ND, name)
    dtypes = [x.dtype for x in (*outputs, *gradients)]
    assert dtypes == [dtype] * 3 + [float_dtype] * 4

    weighted_rows = np.float64(outputs.rows_ID) * case.weights_I[:, None]
    return Results(
        sum_over_rows(weighted_rows, tokens_I),
        sum_over_rows(np.float64(gradients.rows_ID), tokens_I),
        *map(np.float64, gradients[1:4]),
        np.where(tokens_I < N, np.float64(gradients.weights_I), 0),
    )


def sum_over_rows(rows_ID: np.ndarray, tokens_I: np.ndarray) -> np.ndarray:
    return np.stack([np.sum(rows_ID[tokens_I == token], axis=0) for token in range(N)])


def check_implementation(name: str, case_name: str, dtype: str) -> None:
    """Compares both passes of an implementation with float64, array by array."""
    case, expected = make_case(case_name), expected_results(case_name)
    with jax.enable_x64(dtype == "float64"):
        actual = actual_results(case, name, dtype)
    for field in Results._fields:
        values = getattr(expected, field)
        atol = TOLERANCE[dtype] * np.abs(values).max()
        np.testing.assert_allclose(getattr(actual, field), values, rtol=0, atol=atol, err_msg=field)
