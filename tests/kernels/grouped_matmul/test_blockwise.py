"""The experts' SwiGLU on grouped rows against float64, with gradients: empty experts and blocks,
runs of blocks, blocks a row wide.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.grouped_matmul import blockwise, grouped_swiglu, grouped_swiglu_backward

N, D, F, E = 11, 5, 4, 3
CASES = {
    "every expert": (4, [0, 1, 2, 3]),
    "an expert without rows": (4, [0, 0, 2, 2]),
    "empty blocks": (8, [1, 2, 3, 3]),
    "all blocks empty": (2, [3, 3]),
    "blocks of one row": (1, [0, 1, 1, 3]),
    "runs of every length": (2, [0] * 21 + [1] * 16 + [2] * 7 + [3] * 5),
}


def arguments(case):
    """x, the three weights, the rows' tokens (the last row of each block is empty: N), the blocks'
    experts, the rows' weights, and g.
    """
    block, experts = CASES[case]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, N, (len(experts), block))
    weights = rng.normal(size=tokens.shape)
    if block > 1:
        tokens[:, -1], weights[:, -1] = N, 0.0
    arrays = (rng.normal(size=shape) for shape in ((N, D), (E, D, F), (E, D, F), (E, F, D)))
    return (
        *arrays,
        tokens.reshape(-1),
        np.array(experts, np.int32),
        weights.reshape(-1),
        rng.normal(size=(N, D)),
    )


def plain(x, gate, up, down, tokens, experts, weights):
    """Each token's weighted sum, row by row."""
    y = jnp.zeros_like(x)
    for row, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        expert = experts[row * len(experts) // len(tokens)]
        if token < N and expert < E:
            hidden = jax.nn.silu(x[token] @ gate[expert]) * (x[token] @ up[expert])
            y = y.at[token].add(weight * (hidden @ down[expert]))
    return y


def add_up(rows, tokens):
    return np.stack([np.sum(np.asarray(rows)[tokens == token], axis=0) for token in range(N)])


@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case):
    *arrays, tokens, experts, weights, g = arguments(case)
    with jax.enable_x64(True):
        y, pull_back = jax.vjp(
            lambda *arrays: plain(*arrays[:4], tokens, experts, arrays[4]),
            *map(jnp.asarray, arrays),
            jnp.array(weights),
        )
        expected = [np.asarray(gradient) for gradient in pull_back(jnp.asarray(g))]
    arrays, tokens32, experts = (
        [jnp.float32(array) for array in arrays],
        jnp.int32(tokens),
        jnp.asarray(experts),
    )
    rows, inner = grouped_swiglu(*arrays, tokens32, experts)
    np.testing.assert_allclose(add_up(rows * jnp.float32(weights)[:, None], tokens), y, atol=1e-4)
    of_rows, *of_weights, of_row_weights = grouped_swiglu_backward(
        *arrays, tokens32, experts, inner, jnp.float32(weights), jnp.float32(g)
    )
    for actual, gradient in zip((add_up(of_rows, tokens), *of_weights), expected[:4], strict=True):
        np.testing.assert_allclose(actual, gradient, atol=2e-4)
    np.testing.assert_allclose(np.where(tokens < N, of_row_weights, 0), expected[4], atol=2e-4)


def test_runs_cover_every_block_in_use_once_and_the_longest_come_first():
    experts = jnp.array([0] * 21 + [1] * 16 + [2] * 7 + [3] * 5)
    runs = [
        (length, starts[:number].tolist()) for length, starts, number in blockwise._runs(experts, E)
    ]
    assert runs == [(16, [0, 21]), (4, [16, 37]), (1, [20, 41, 42, 43])]


def test_bfloat16_rows_are_summed_in_float32():
    x = jnp.ones((1, 1024), jnp.bfloat16)
    gate, up = (
        jnp.full((1, 1024, 1), 0.0, jnp.bfloat16),
        jnp.full((1, 1024, 1), 1 + 2**-7, jnp.bfloat16),
    )
    _, inner = grouped_swiglu(
        x,
        gate,
        up,
        jnp.ones((1, 1, 1024), jnp.bfloat16),
        jnp.zeros(1, jnp.int32),
        jnp.zeros(1, jnp.int32),
    )
    assert inner.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(inner), [[0.0, 1032.0]])


def test_rows_that_do_not_fill_blocks_are_refused():
    x, weights = jnp.ones((1, 2)), (jnp.ones((1, 2, 2)),) * 3
    with pytest.raises(ValueError, match="7 rows are not a multiple of 2 blocks"):
        grouped_swiglu(x, *weights, jnp.zeros(7, jnp.int32), jnp.zeros(2, jnp.int32))
