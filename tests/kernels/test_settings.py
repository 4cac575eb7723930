"""The kernels and context parallelism in a process with settings of JAX that are not the usual
ones, forward and backward.
"""

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
    """q, k, v, g, sinks and ids; under 64 bits the last two come in these."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 32, heads, 8)), dtype) for heads in (4, 2, 2, 4)]
    return (
        *arrays,
        jnp.asarray(rng.normal(size=4)),
        jnp.asarray(np.sort(rng.integers(0, 3, (2, 32)))),
    )


def flash(dtype, implementation=None):
    """With all options, and traced offsets."""
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
    """The two passes of an attention, whose results the caller may merge with others."""
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
    return lambda q, k, v, at, sinks: call(q, k, v, at, sinks=sinks), (
        q[:, :2],
        *(jnp.stack([x, x]) for x in (k, v)),
        jnp.asarray([[3, 4], [30, 31]]),
        sinks,
    )


def experts(dtype):
    rng = np.random.default_rng(0)
    shapes = (11, 6), (3, 6, 4), (3, 6, 4), (3, 4, 6), (11, 6)
    *arrays, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    tokens, of_blocks, weights = (
        rng.integers(0, 11, 40),
        np.sort(rng.integers(0, 4, 20)),
        rng.normal(size=40),
    )

    def run(g, tokens, of_blocks, weights, *arrays):
        inputs = grouped_matmul.Inputs(*arrays, tokens, of_blocks)
        rows, inner = grouped_swiglu(inputs)
        gradients = grouped_swiglu_backward(inputs, inner, weights, g)
        return jnp.where((of_blocks < 3).repeat(2)[:, None], rows, jnp.zeros((), dtype)), gradients

    return run, (g, *(jnp.asarray(x) for x in (tokens, of_blocks, weights)), *arrays)


def across(dtype, attention, size):
    """The result and the gradients of a ring, or of Ulysses, on so many ranks."""
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
    "ring_attention": functools.partial(across, attention=context.ring_attention, size=2),
    "ulysses_attention": functools.partial(across, attention=context.ulysses_attention, size=4),
}


def check(name, dtype, names):
    """The results are those without the settings, to the last digits of the dtype.

    Only the gradient of sinks that were float64 is float64.
    """
    run, arguments = FUNCTIONS[name](dtype)
    usual = jax.tree.leaves(jax.jit(run)(*arguments))
    with settings(names):
        run, arguments = FUNCTIONS[name](dtype)
        other = jax.tree.leaves(jax.jit(run)(*arguments))
    for ours, theirs in zip(other, usual, strict=True):
        assert ours.dtype == theirs.dtype or (ours.dtype, ours.shape) == ("float64", (4,))
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        size = np.abs(theirs[np.isfinite(theirs)]).max()
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=8 * float(jnp.finfo(dtype).eps) * size
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
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
    """Lowered whole, with its gradient: other tests call the kernels by themselves, or need their
    compiler.
    """
    with settings(names):
        run, arguments = flash("bfloat16", implementation)
        program = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == kernels


def test_float64_stays_float64():
    with settings(SETTINGS):
        for name in ("flash_attention", "the_reference", "decode_attention"):
            run, arguments = FUNCTIONS[name]("float64")
            assert {x.dtype.name for x in jax.tree.leaves(jax.jit(run)(*arguments))} == {"float64"}
