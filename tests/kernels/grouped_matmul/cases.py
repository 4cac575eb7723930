"""Makes calls of the grouped matmuls, and checks an implementation's results against float64."""

import functools
from typing import Any, NamedTuple

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


def actual_results(case: Case, name: str, dtype: str, jit: bool = True) -> Results:
    """Computes the results by an implementation in `dtype`, as one program or call by call."""
    float_dtype = jnp.promote_types(dtype, jnp.float32)
    *floats, tokens_I, experts_G = case.inputs
    inputs = Inputs(*(jnp.asarray(x, dtype) for x in floats), tokens_I, experts_G)
    weights_I = jnp.asarray(case.weights_I, float_dtype)
    grad_y_ND = jnp.asarray(case.grad_y_ND, dtype)

    run = _run_both_passes if jit else _run_both_passes.__wrapped__
    outputs, gradients = run(inputs, weights_I, grad_y_ND, name)
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


def check_implementation(name: str, case_name: str, dtype: str, jit: bool = True) -> None:
    """Compares both passes of an implementation with float64, array by array."""
    case, expected = make_case(case_name), expected_results(case_name)
    with jax.enable_x64(dtype == "float64"):
        actual = actual_results(case, name, dtype, jit)
    for field in Results._fields:
        values = getattr(expected, field)
        atol = TOLERANCE[dtype] * np.abs(values).max()
        np.testing.assert_allclose(getattr(actual, field), values, rtol=0, atol=atol, err_msg=field)


class Drawn(NamedTuple):
    """The shapes of drawn calls."""

    num_experts: int
    dim: int
    width: int
    num_blocks: int
    dtype: str = "bfloat16"


# Widths of one tile and of several, those that are no multiples of a tile or of 64, and odd numbers
# of blocks.
SHAPES = [
    Drawn(4, 256, 512, 9),
    Drawn(3, 192, 320, 7),
    Drawn(5, 100, 72, 6),
    Drawn(1, 64, 64, 3),
    Drawn(8, 384, 256, 13, "float16"),
    Drawn(2, 768, 1024, 37),
]


def draw_experts(seed: int, num_experts: int, num_blocks: int) -> np.ndarray:
    """Draws each block's expert, ascending: by seed, all kinds of loads come in turn."""
    rng = np.random.default_rng(seed)
    match seed % 5:
        case 0:  # every expert may have blocks, and some blocks have none
            return np.sort(rng.integers(0, num_experts + 1, num_blocks)).astype(np.int32)
        case 1:  # one expert has all
            return np.full(num_blocks, rng.integers(num_experts), np.int32)
        case 2:  # no block has an expert
            return np.full(num_blocks, num_experts, np.int32)
        case 3:  # the last expert has one block, the first ones all others
            experts = np.sort(rng.integers(0, (num_experts + 1) // 2, num_blocks))
            return np.append(experts[1:], num_experts - 1).astype(np.int32)
        case _:  # most blocks are of one expert, and at least one block has none
            experts = np.where(rng.random(num_blocks) < 0.7, num_experts // 2, num_experts - 1)
            return np.append(np.sort(experts)[1:], num_experts).astype(np.int32)


def draw_case(seed: int, shapes: Drawn, block_rows: int) -> Case:
    """Draws a case whose numbers `shapes.dtype` can hold, with 50 tokens."""
    rng, (num_experts, dim, width, num_blocks, dtype) = np.random.default_rng(seed), shapes
    tokens = rng.integers(0, 50, (num_blocks, block_rows))
    weights = rng.random(tokens.shape)
    filling = rng.integers(0, block_rows)  # the rows that only fill up each block
    if filling:
        tokens[:, -filling:], weights[:, -filling:] = 50, 0.0
    projections = [(num_experts, dim, width)] * 2
    weight_shapes = [*projections, (num_experts, width, dim)]
    x, grad_y = (_round(rng.normal(size=(50, dim)), dtype) for _ in range(2))
    matrices = (
        _round(rng.normal(size=shape) / np.sqrt(shape[1]), dtype) for shape in weight_shapes
    )
    experts = draw_experts(seed, num_experts, num_blocks)
    return Case(Inputs(x, *matrices, tokens.reshape(-1), experts), weights.reshape(-1), grad_y)


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.float64(jnp.asarray(x, dtype))


def check_against_plain_jax(name: str, seed: int, shapes: Drawn, block_rows: int) -> None:
    """Holds an implementation's errors against twice those of plain JAX ("blockwise")."""
    case = draw_case(seed, shapes, block_rows)
    with jax.enable_x64(True):
        expected = _both_passes(case, "reference", "float64")
    ours, plain = (_both_passes(case, x, shapes.dtype) for x in (name, "blockwise"))
    for field, right in expected.items():
        errors = [np.sqrt(np.mean((got[field] - right) ** 2)) for got in (ours, plain)]
        # Where plain JAX has no error, an error of the last bit of float32 is allowed.
        least = 1e-6 * np.sqrt(np.mean(right**2))
        assert np.isfinite(errors[0]) and errors[0] <= 2 * errors[1] + least, (field, errors)


@functools.partial(jax.jit, static_argnums=(3,))
def _run_both_passes(inputs: Inputs, weights_I: jax.Array, grad_y_ND: jax.Array, name: str) -> Any:
    outputs = grouped_swiglu(inputs, name)
    return outputs, grouped_swiglu_backward(inputs, outputs.gate_up, weights_I, grad_y_ND, name)


def _both_passes(case: Case, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Returns what an implementation gives, in float64; 0 in rows that only fill up a block."""
    *floats, tokens_I, experts_G = case.inputs
    inputs = Inputs(
        *(jnp.asarray(x, dtype) for x in floats), jnp.asarray(tokens_I), jnp.asarray(experts_G)
    )
    weights_I = jnp.asarray(case.weights_I, jnp.promote_types(dtype, jnp.float32))
    grad_y_ND = jnp.asarray(case.grad_y_ND, dtype)
    outputs, gradients = _run_both_passes(inputs, weights_I, grad_y_ND, name)
    names = ("rows", "gate_up", "grad_x", "grad_w_gate", "grad_w_up", "grad_w_down", "grad_weights")
    found = {field: np.float64(x) for field, x in zip(names, (*outputs, *gradients), strict=True)}
    is_row_I = tokens_I < len(case.inputs.x_ND)
    for field in ("rows", "gate_up", "grad_x", "grad_weights"):
        is_row = is_row_I if found[field].ndim == 1 else is_row_I[:, None]
        found[field] = np.where(is_row, found[field], 0)
    return found
