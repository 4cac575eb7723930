"""Runs the TPU kernels in JAX's simulation of a TPU, which detects races and unwritten memory.

Memory starts as NaN, and races between cores and copies are printed, which is all of the simulation
that is public. So the first tests check that it notices a race and unwritten memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.attention import blockwise
from moe.kernels.attention.inputs import Inputs, Options, visible_span
from moe.kernels.attention.tpu import backward as tpu_backward
from moe.kernels.attention.tpu import forward as tpu_forward

# The seed makes the order of parallel grid points another than their own, for two points in each
# dimension.
SIMULATION = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=4)


@pytest.fixture(autouse=True)
def clean_simulation():
    yield
    pltpu.reset_tpu_interpret_mode_state()  # an exception leaves its state behind


def copy_blocks(kernel, x, block_index):
    """Runs `kernel(x, y, scratch)` on two cores; block i of 8 rows goes to `block_index(i)`."""
    in_spec, out_spec = (
        pl.BlockSpec((8, 128), lambda i, index=index: (index(i), 0))
        for index in (lambda i: i, block_index)
    )
    return pl.pallas_call(
        kernel,
        grid=(len(x) // 8,),
        in_specs=[in_spec],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=SIMULATION,
    )(x)


def test_a_block_written_by_two_cores_is_noticed(capsys):
    def copy(x, y, _):
        y[...] = x[...]

    x = jnp.ones((16, 128))
    np.testing.assert_array_equal(copy_blocks(copy, x, lambda i: i), x)
    assert "RACE" not in capsys.readouterr().out
    jax.block_until_ready(copy_blocks(copy, x, lambda i: 0))
    assert "RACE DETECTED" in capsys.readouterr().out


def test_memory_that_nothing_was_written_to_is_noticed():
    def add_to_nothing(x, y, scratch):
        scratch[...] += x[...]
        y[...] = scratch[...]

    assert np.isnan(copy_blocks(add_to_nothing, jnp.ones((16, 128)), lambda i: i)).all()


def check(
    capsys,
    *,
    batch=1,
    length=200,
    kv_length=200,
    group=2,
    kv_heads=1,
    window=None,
    causal=True,
    ids=False,
    **options,
):
    """Checks that both passes, in blocks of 128, equal blockwise, and that there is no race."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    heads = group * kv_heads
    q, k, v = (
        normal(batch, length, heads, 16),
        normal(batch, kv_length, kv_heads, 16),
        normal(batch, kv_length, kv_heads, 8),
    )
    q_ids, kv_ids = (
        (jnp.sort(jnp.array(rng.integers(0, 3, (batch, x)))) for x in (length, kv_length))
        if ids
        else (None, None)
    )
    static = Options(*visible_span(causal, window), options.get("softcap"), 0.25)
    shift = jnp.int32(options.get("shift", 0))
    inputs = Inputs(q, k, v, normal(heads), q_ids, kv_ids, shift)
    dout, delta = normal(batch, length, heads, 8), normal(batch, length, heads)

    def values(forward, backward, **keywords):
        forward, backward = (
            jax.jit(functools.partial(f, static, blocks=(128, 128), **keywords))
            for f in (forward, backward)
        )
        output, lse = forward(inputs)
        return output, lse, *backward(inputs, lse, dout, delta)

    simulated = values(tpu_forward.forward, tpu_backward.backward, interpret=SIMULATION)
    plain = values(blockwise.forward, blockwise.backward)
    for value, wanted in zip(simulated, plain, strict=True):
        np.testing.assert_allclose(value, wanted, atol=2e-5)
    assert "RACE" not in capsys.readouterr().out


def test_causal(capsys):
    check(capsys, group=1)


def test_a_window_and_segments_of_odd_lengths(capsys):
    check(capsys, length=131, window=(60, 0), ids=True, shift=50)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"length": 300, "kv_length": 300, "window": (40, 0)},
        {"length": 131, "kv_length": 259, "window": (60, 0), "ids": True, "shift": 100},
        {"length": 300, "kv_length": 300, "ids": True, "batch": 2},
        {"length": 131, "kv_length": 259, "causal": False, "kv_heads": 2, "softcap": 5.0},
        {
            "length": 259,
            "kv_length": 131,
            "causal": False,
            "window": (20, 150),
            "ids": True,
            "batch": 2,
            "kv_heads": 2,
        },
        {"length": 200, "kv_length": 200, "shift": -150},
        {"length": 200, "kv_length": 400, "shift": 5000, "window": (10, 0)},
    ],
)
def test_more_masks(options, capsys):
    check(capsys, **options)
