"""What only the blockwise implementation does: runs of blocks, and sums wider than its inputs."""

import jax.numpy as jnp
import numpy as np

from moe.kernels.grouped_matmul import Inputs, grouped_swiglu
from moe.kernels.grouped_matmul.blockwise import _cut_into_runs


def test_runs_cover_every_block_in_use_once_and_the_longest_come_first():
    experts = jnp.array([0] * 21 + [1] * 16 + [2] * 7 + [3] * 5)
    runs = [
        (run.length, run.first_blocks[: run.num_runs].tolist())
        for run in _cut_into_runs(experts, num_experts=3)
    ]
    assert runs == [(16, [0, 21]), (4, [16, 37]), (1, [20, 41, 42, 43])]


def test_bfloat16_rows_are_summed_in_float32():
    """A sum of 1,024 times 1 + 2**-7 in bfloat16 would stop growing at 256."""
    inputs = Inputs(
        x_ND=jnp.ones((1, 1024), jnp.bfloat16),
        w_gate_EDF=jnp.zeros((1, 1024, 1), jnp.bfloat16),
        w_up_EDF=jnp.full((1, 1024, 1), 1 + 2**-7, jnp.bfloat16),
        w_down_EFD=jnp.ones((1, 1, 1024), jnp.bfloat16),
        tokens_I=jnp.zeros(1, jnp.int32),
        experts_G=jnp.zeros(1, jnp.int32),
    )
    gate_up = grouped_swiglu(inputs).gate_up
    assert gate_up.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(gate_up), [[0.0, 1032.0]])
