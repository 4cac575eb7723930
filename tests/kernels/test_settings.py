"""Runs the kernels and context parallelism in a process whose JAX settings are not the defaults."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe.kernels import grouped_matmul
from moe.kernels.attention import (
    Choice,
    Inputs,
    attention_backward,
    attention_forward,
    decode_attention,
    flash_attention,
)
from moe.kernels.attention.inputs import Options
from moe.kernels.grouped_matmul import grouped_swiglu, grouped_swiglu_backward
from moe.parallel import context

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
TPU = Choice("tpu", (128, 128))


@contextlib.contextmanager
def settings(names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SETTINGS[name]())
        yield


def random_arrays(dtype):
    """Returns q, k, v, g, sinks and ids; with 64-bit types the last two are float64 and int64."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 32, heads, 8)), dtype) for heads in (4, 2, 2, 4)]
    return (
        *arrays,
        jnp.asarray(rng.normal(size=4)),
        jnp.asarray(np.sort(rng.integers(0, 3, (2, 32)))),
    )


def flash(dtype, implementation=None):
    """Returns flash_attention with all options and traced offsets, and its arguments."""
    q, k, v, g, sinks, ids = random_arrays(dtype)

    def call(q, k, v, sinks, ids, offset):
        keywords = {
            "q_segment_ids": ids,
            "kv_segment_ids": ids,
            "q_offset": offset,
            "kv_offset": offset,
        }
        keywords |= {
            "causal": True,
            "window": (9, 0),
            "softcap": 5.0,
            "scale": 0.3,
            "implementation": implementation,
        }
        return flash_attention(q, k, v, sinks=sinks, return_lse=True, **keywords)

    def run(q, k, v, g, sinks, ids, offset):
        results, pull_back = jax.vjp(lambda *x: call(*x, ids, offset), q, k, v, sinks)
        return results, pull_back((g, jnp.ones_like(results[1])))

    return run, (q, k, v, g, sinks, ids, jnp.asarray(3))


def passes(dtype):
    """Returns both passes of an attention with partial results, and their arguments."""
    q, k, v, g, sinks, ids = random_arrays(dtype)
    options = Options(None, 0, None, 0.3, partial=True)
    inputs = Inputs(q, k, v, sinks, ids, ids, jnp.asarray(2))

    def run(dout, inputs):
        output, lse = attention_forward(None, options, inputs)
        delta = jnp.sum(output * dout.astype(output.dtype), axis=-1)
        rows = {"lse_BTN": lse, "dout_BTNH": dout, "delta_BTN": delta}
        return output, lse, attention_backward(None, options, inputs, **rows)

    return run, (g, inputs)


def decode(dtype):
    q, k, v, _, sinks, _ = random_arrays(dtype)
    call = functools.partial(decode_attention, layer=1, window=(9, 0), softcap=5.0)
    return lambda q, k, v, positions, sinks: call(q, k, v, positions, sinks=sinks), (
        q[:, :2],
        *(jnp.stack([x, x]) for x in (k, v)),
        jnp.asarray([[3, 4], [30, 31]]),
        sinks,
    )


def experts(dtype, implementation="blockwise"):
    rng = np.random.default_rng(0)
    shapes = (11, 6), (3, 6, 4), (3, 6, 4), (3, 4, 6), (11, 6)
    *arrays, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    tokens, experts_G, weights = (
        rng.integers(0, 11, 40),
        np.sort(rng.integers(0, 4, 20)),
        rng.normal(size=40),
    )

    def run(g, tokens, experts_G, weights, *arrays):
        inputs = grouped_matmul.Inputs(*arrays, tokens, experts_G)
        rows, inner = grouped_swiglu(inputs, implementation)
        gradients = grouped_swiglu_backward(inputs, inner, weights, g, implementation)
        return jnp.where((experts_G < 3).repeat(2)[:, None], rows, jnp.zeros((), dtype)), gradients

    return run, (g, *(jnp.asarray(x) for x in (tokens, experts_G, weights)), *arrays)


def context_parallel(dtype, attention, size):
    """Returns a ring or Ulysses on `size` ranks, forward and backward, and its arguments."""
    q, k, v, g, sinks, ids = random_arrays(dtype)
    mesh = jax.make_mesh(
        (size,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )

    def local(q, k, v, sinks, ids):
        return attention(
            q,
            k,
            v,
            sinks=sinks,
            segment_ids=ids,
            axis_name="context",
            causal=True,
            window=(9, 0),
            softcap=5.0,
        )

    part = P(None, "context")
    call = jax.shard_map(
        local, mesh=mesh, in_specs=(part, part, part, P(), part), out_specs=part, check_vma=False
    )

    def run(g, q, k, v, sinks, ids):
        output, pull_back = jax.vjp(lambda *x: call(*x, ids), q, k, v, sinks)
        return output, pull_back(g)

    return run, (g, q, k, v, sinks, ids)


FUNCTIONS = {
    "flash_attention": flash,
    "the_tpu_kernels": functools.partial(flash, implementation=TPU),
    "the_reference": functools.partial(flash, implementation="reference"),
    "passes": passes,
    "decode_attention": decode,
    "experts": experts,
    "experts_on_tpus": functools.partial(experts, implementation="tpu"),
    "ring_attention": functools.partial(context_parallel, attention=context.ring_attention, size=2),
    "ulysses_attention": functools.partial(
        context_parallel, attention=context.ulysses_attention, size=4
    ),
}


def check(name, dtype, names):
    """Checks that the results are those without the settings, to the last digits of the dtype.

    Only the gradient of sinks that were float64 is float64.
    """
    run, arguments = FUNCTIONS[name](dtype)
    usual = jax.tree.leaves(jax.jit(run)(*arguments))
    with settings(names):
        run, arguments = FUNCTIONS[name](dtype)
        other = jax.tree.leaves(jax.jit(run)(*arguments))
    for value, usual_value in zip(other, usual, strict=True):
        assert value.dtype == usual_value.dtype or (value.dtype, value.shape) == ("float64", (4,))
        value, usual_value = (np.asarray(x, np.float64) for x in (value, usual_value))
        np.testing.assert_array_equal(np.isfinite(value), np.isfinite(usual_value))
        size = np.abs(usual_value[np.isfinite(usual_value)]).max()
        np.testing.assert_allclose(
            value, usual_value, rtol=0, atol=8 * float(jnp.finfo(dtype).eps) * size
        )


# Of bfloat16, float32 and float64, a call in bfloat16 may mix all three.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in FUNCTIONS]
    + [(name, "float32") for name in ("flash_attention", "passes", "experts")]
    + [
        pytest.param(name, "float32", marks=pytest.mark.exhaustive)
        for name in FUNCTIONS
        if name not in ("flash_attention", "passes", "experts")
    ],
)
def test_with_every_setting_at_once(name, dtype):
    check(name, dtype, tuple(SETTINGS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_with_each_setting_alone(setting, name, dtype):
    check(name, dtype, (setting,))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["flash_attention", "decode_attention", "ring_attention"])
def test_programs_for_other_platforms_with_64_bits(name, platform):
    with settings(SETTINGS):
        run, arguments = FUNCTIONS[name]("bfloat16")
        program = jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in program) == (platform == "tpu" and name != "decode_attention")


@pytest.mark.parametrize(("implementation", "kernels"), [("hopper", 3), ("hopper_fused", 2)])
@pytest.mark.parametrize("names", [(), tuple(SETTINGS)])
def test_programs_of_the_hopper_kernels(names, implementation, kernels):
    """Lowers flash_attention with its gradient, while other tests use the kernels alone."""
    with settings(names):
        run, arguments = flash("bfloat16", implementation)
        program = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == kernels


def test_programs_of_the_experts_on_tpus_with_64_bits():
    with settings(SETTINGS):
        run, arguments = FUNCTIONS["experts_on_tpus"]("bfloat16")
        program = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("@tpu_custom_call") == 7


def test_float64_stays_float64():
    with settings(SETTINGS):
        for name in ("flash_attention", "the_reference", "decode_attention"):
            run, arguments = FUNCTIONS[name]("float64")
            assert {x.dtype.name for x in jax.tree.leaves(jax.jit(run)(*arguments))} == {"float64"}
