"""Compiles the Hopper kernels ahead of time for H200, and runs them in JAX's interpreter.

test_implementations.py runs them where there is a GPU.
"""

import jax
import pytest

from tests.kernels.programs import check_compiled_kernels, compile_for_h200, run

MASKS = {
    "causal": "Options(None, 0, None, 0.1), None, None",
    "window": "Options(1024, 0, 30.0, 0.1), sinks, None",
    "segments": "Options(None, 0, None, 0.1), None, ids",
}
COMPILE = """
import dataclasses, sys
from moe.kernels.attention import Inputs, Options
from moe.kernels.attention.hopper import backward, forward, fused

width, value_width = map(int, sys.argv[1:])
q, k = array((1, 4096, 16, width)), array((1, 4096, 2, width))
v, dout = array((1, 4096, 2, value_width)), array((1, 4096, 16, value_width))
rows = array((1, 4096, 16), jnp.float32)
sinks, ids = array((16,), jnp.float32), array((1, 4096), jnp.int32)
options, sinks, ids = MASK

def run_all_kernels(q, k, v, sinks, ids, lse, dout, delta):
    inputs = Inputs(q, k, v, sinks, ids, ids, jnp.int32(0))
    modules = (backward, fused) if max(width, value_width) <= 128 else (backward,)
    both = [dataclasses.replace(options, partial=partial) for partial in (False, True)]
    outputs = [forward.forward(options, inputs) for options in both]
    return outputs, [x.backward(options, inputs, lse, dout, delta) for x in modules]

compile_for_h200(run_all_kernels, q, k, v, sinks, ids, rows, dout, rows)
"""


@pytest.mark.aot
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (128, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("mask", MASKS)
def test_compiles_for_h200_without_spills(mask, widths, tmp_path):
    compile_for_h200(COMPILE.replace("MASK", MASKS[mask]), *map(str, widths), dumps=tmp_path)
    check_compiled_kernels(tmp_path, least=5 if max(widths) <= 128 else 4)


@pytest.mark.aot
def test_wide_values_of_narrow_keys_compile_for_h200(tmp_path):
    """Some of these kernels spill registers."""
    compile_for_h200(COMPILE.replace("MASK", MASKS["causal"]), "64", "256", dumps=tmp_path)


INTERPRET = """
import dataclasses, sys
import jax, numpy as np
from moe.kernels.attention import Inputs, Options, reference
from moe.kernels.attention.hopper import backward, forward, fused
from tests.kernels.attention.gpu_interpreter import interpreted

rng = np.random.default_rng(0)
array = lambda *shape: jax.numpy.asarray(rng.normal(size=shape), "bfloat16")
which, kv_length = sys.argv[1], int(sys.argv[2])
q_shape, kv_shape = (1, 140, 2, 64), (1, kv_length, 1, 64)
q, k, v, dout = (array(*shape) for shape in (q_shape, kv_shape, kv_shape, q_shape))
ids = [
    jax.numpy.asarray(np.sort(rng.integers(0, 2, (1, length))), "int32")
    for length in (140, kv_length)
]
sinks, delta = (jax.numpy.asarray(rng.normal(size=shape), "float32") for shape in (2, (1, 140, 2)))
options, shift = Options(120, 40, 5.0, -0.1), jax.numpy.int32(30)
if kv_length == 128:
    options, sinks, ids = Options(None, None, None, 0.1), None, (None, None)
if kv_length == 201:
    options = Options(120, 40, None, 0.1)
inputs = Inputs(q, k, v, sinks, *ids, shift)
lse = reference.forward(options, inputs)[1]
module = {"forward": forward, "backward": backward, "fused": fused}[which]
arguments = (inputs,) if which == "forward" else (inputs, lse, dout, delta)

def bind(module):
    pass_ = module.forward if which == "forward" else module.backward
    return lambda *arguments: pass_(options, *arguments)

def relative_errors():
    actual_results = interpreted(bind(module), *arguments)
    expected_results = bind(reference)(*arguments)
    for actual, expected in zip(actual_results, expected_results, strict=True):
        actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
        np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
        finite = np.isfinite(expected)
        square = np.mean((actual - expected)[finite] ** 2)
        yield np.sqrt(square / np.mean(expected[finite] ** 2))

errors = list(relative_errors())
assert max(errors) < 6e-3, errors
if which == "forward":
    # A partial output includes the remainder, which rounding would take from it. The error that is
    # left comes from rounding the weights.
    options = dataclasses.replace(options, partial=True)
    partial_errors = list(relative_errors())
    assert partial_errors[0] < 0.85 * errors[0], (partial_errors, errors)
print("checked")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version__ != "0.10.2",
    reason="the interpreter and what tests add to it are private to JAX 0.10.2",
)
@pytest.mark.parametrize("which", ["forward", "backward", "fused"])
@pytest.mark.parametrize("kv_length", [200, 201, 128])
def test_in_the_interpreter(which, kv_length):
    """With 200 keys it uses all options at once, with 201 all but softcap, and with 128 none.

    The options are a window on both sides, documents, softcap, sinks, a negative scale and a shift.
    200 keys are no whole number of blocks; 128 are, so that only queries are padded. Without
    softcap the gradients of heads of 64 are computed in blocks of 128.
    """
    assert "checked" in run(INTERPRET, which, str(kv_length), timeout=280)
