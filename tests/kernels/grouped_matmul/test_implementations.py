"""Checks every implementation of the grouped matmuls against float64, over the same cases."""

import jax
import jax.numpy as jnp
import pytest

from moe.kernels.grouped_matmul import Inputs, Shapes, grouped_swiglu, why_not
from moe.kernels.grouped_matmul.choice import IMPLEMENTATIONS
from tests.kernels.grouped_matmul.cases import (
    CASES,
    SHAPES,
    check_against_plain_jax,
    check_implementation,
)


def names_on(chip: str) -> list[str]:
    """Returns the implementations that run on a chip."""
    return [name for name in IMPLEMENTATIONS if not why_not(name, chip, Shapes(64, 8, "bfloat16"))]


def test_every_implementation_that_can_run_here_is_tested() -> None:
    assert names_on("cpu") == ["reference", "blockwise", "tpu"]
    assert names_on("TPU v5") == ["reference", "blockwise", "tpu"]
    assert names_on("NVIDIA H100 80GB HBM3") == ["reference", "blockwise", "hopper"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", names_on("cpu"))
def test_equals_float64(name: str, case: str, dtype: str) -> None:
    if reason := why_not(name, "cpu", Shapes(64, 8, dtype)):
        assert (name, dtype) == ("tpu", "float64"), reason
        return
    check_implementation(name, case, dtype)


@pytest.mark.parametrize("name", names_on("cpu"))
def test_equals_float64_outside_of_jit(name: str) -> None:
    check_implementation(name, "every expert", "float32", jit=False)


@pytest.mark.parametrize("name", names_on("cpu"))
def test_rows_that_do_not_fill_blocks_are_refused(name: str) -> None:
    x, weights = jnp.ones((1, 2)), (jnp.ones((1, 2, 2)),) * 3
    inputs = Inputs(x, *weights, jnp.zeros(7, jnp.int32), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="7 rows are not a multiple of 2 blocks"):
        grouped_swiglu(inputs, name)


@pytest.mark.parametrize("shapes", SHAPES[1:4], ids=str)
def test_drawn_cases_hold_for_the_reference(shapes) -> None:
    for seed in range(5):
        check_against_plain_jax("reference", seed, shapes, block_rows=8)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_numerics_on_a_gpu(name, shapes) -> None:
    """At most twice the error of plain JAX, over 10 draws of each shape."""
    kind = jax.devices()[0].device_kind
    if reason := why_not(name, kind, Shapes(64, 8, shapes.dtype)):
        pytest.skip(f"{name}: {reason}")
    for seed in range(10):
        check_against_plain_jax(name, seed, shapes, block_rows=128)
