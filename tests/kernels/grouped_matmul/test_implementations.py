"""Checks every implementation of the grouped matmuls against float64, over the same cases."""

import jax.numpy as jnp
import pytest

from moe.kernels.grouped_matmul import Inputs, grouped_swiglu
from moe.kernels.grouped_matmul.choice import IMPLEMENTATIONS
from tests.kernels.grouped_matmul.cases import CASES, check_implementation


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_float64(name: str, case: str, dtype: str) -> None:
    check_implementation(name, case, dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_do_not_fill_blocks_are_refused(name: str) -> None:
    x, weights = jnp.ones((1, 2)), (jnp.ones((1, 2, 2)),) * 3
    inputs = Inputs(x, *weights, jnp.zeros(7, jnp.int32), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="7 rows are not a multiple of 2 blocks"):
        grouped_swiglu(inputs, name)
