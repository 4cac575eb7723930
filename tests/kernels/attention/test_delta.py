"""Checks 16-bit gradients of queries that see few keys, which a rounded output would spoil."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import Choice, compute_delta, round_output
from tests.kernels.attention.cases import Case, error, evaluate, expected, flash, mask, xla


def few_keys(keys: int, sinks: bool, dtype: str) -> Case:
    """Returns a causal case in which a query sees only `keys` keys, whose values are alike.

    `dtype` can hold all of its numbers exactly.
    """
    rng = np.random.default_rng(0)
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
    q, k, v, g = (rounded(rng.normal(size=(1, 40, heads, 64))) for heads in (2, 1, 1, 2))
    # With a small share of the sink, a probability is nearly 1.
    logits = np.array([-3.0, -4.0]) if sinks else None
    return Case(
        (q, k, rounded(v + 4), logits),
        (g, np.zeros((1, 40, 2))),
        {"causal": True, "window": (keys - 1, 0)},
    )


@pytest.mark.parametrize(("keys", "sinks"), [(1, True), (3, False)])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("blockwise", "bfloat16"),
        ("blockwise", "float16"),
        (Choice("tpu", (128, 128)), "bfloat16"),
    ],
)
def test_gradients_of_few_keys_are_as_exact_as_xla_s(implementation, dtype, keys, sinks):
    case = few_keys(keys, sinks, dtype)

    def plain(q, k, v, sinks, **keywords):
        return xla(q, k, v, sinks, jax.lax.optimization_barrier(jnp.asarray(mask(case))), None)

    wanted, sizes = expected(case)
    ours, theirs = (
        error(evaluate(attention, case, dtype), wanted)
        for attention in (functools.partial(flash, implementation), plain)
    )
    # With one key and no sink the gradient is 0. What is left is the rounding of delta, a sum of 64
    # terms in float32.
    least = 64 * float(jnp.finfo(jnp.float32).eps) * float(np.abs(case.arrays[2]).max())
    for name, our, their, size in zip(
        ("output", "lse", "q", "k", "v"), ours, theirs, sizes, strict=False
    ):
        assert our <= 1.5 * max(their, float(jnp.finfo(dtype).eps) * size, least), (
            name,
            ours,
            theirs,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_output_and_its_remainder_have_the_digits_of_both(dtype):
    """It compiles both together, since XLA may leave out a conversion and its inverse.

    Several numbers are subnormal in float16.
    """
    rng = np.random.default_rng(0)
    output = np.float32(rng.normal(size=(3, 64)) * [[1.0], [1e-3], [1e-6]])
    rounded, remainder = jax.jit(round_output, static_argnums=1)(output, jnp.dtype(dtype))
    np.testing.assert_array_equal(
        np.asarray(rounded), np.asarray(jnp.asarray(output).astype(dtype))
    )
    whole = np.asarray(rounded, np.float64) + np.asarray(remainder, np.float64)
    digits = 2.0 ** -(2 * jnp.finfo(dtype).nmant + 2)
    np.testing.assert_allclose(
        whole, output, rtol=digits, atol=float(jnp.finfo(dtype).smallest_subnormal)
    )
    g = np.float32(rng.normal(size=output.shape))
    np.testing.assert_allclose(
        compute_delta(rounded, remainder, g, jnp.float32),
        np.sum(output * g, axis=-1),
        rtol=0,
        atol=64 * 4 * digits,
    )


def test_what_is_not_rounded_loses_nothing():
    output = jnp.ones((2, 3))
    assert round_output(output, jnp.dtype("float32")) == (output, None)
