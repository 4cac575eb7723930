"""Compiles the Hopper kernels ahead of time for H200, and runs them in JAX's interpreter.

test_implementations.py runs them where there is a GPU.
"""

import jax
import jax.numpy as jnp
import pytest

from moe.kernels.grouped_matmul import Inputs, grouped_swiglu
from moe.kernels.grouped_matmul.hopper.pipeline import (
    Tiling,
    choose_tiling,
    staging_plan,
    tile_in_bands,
)
from tests.kernels.programs import check_compiled_kernels, compile_for_h200, run


@pytest.mark.parametrize(("rows", "columns", "band"), [(7, 3, 4), (8, 1, 4), (3, 5, 16), (1, 1, 1)])
def test_tiles_in_bands_are_all_tiles_once(rows, columns, band):
    places = [
        tuple(map(int, tile_in_bands(jnp.int32(i), rows, columns, band)))
        for i in range(rows * columns)
    ]
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]
    # The tiles of a band's first column come first.
    assert places[: min(band, rows)] == [(row, 0) for row in range(min(band, rows))]


@pytest.mark.parametrize(
    ("width", "columns", "stages"),
    [(14_336, 256, 4), (2880, 192, 4), (1408, 128, 6), (320, 64, 8)],
)
def test_tiles_divide_the_width(width, columns, stages):
    assert choose_tiling(width)[:2] == (columns, stages)
    with pytest.raises(ValueError, match="tiles of 100 columns do not divide a width of"):
        choose_tiling(width, Tiling(100, 4, 16))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_no_buffer_is_written_before_its_last_copy_has_read_it(num_parts, buffers):
    """Copies read in order, as late as they may. Interpreted copies are done at once."""
    unread = []
    for buffer, most_unread in staging_plan(num_parts, buffers) * 3:  # of three tiles
        unread = unread[len(unread) - most_unread :] if len(unread) > most_unread else unread
        assert buffer not in unread
        unread.append(buffer)


def test_blocks_of_other_sizes_are_refused():
    x, weights = jnp.ones((1, 64), "bfloat16"), (jnp.ones((1, 64, 64), "bfloat16"),) * 3
    inputs = Inputs(x, *weights, jnp.zeros(192, jnp.int32), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="96 rows in a block are not a multiple of 128"):
        grouped_swiglu(inputs, "hopper")


COMPILE = """
import sys
from moe.kernels.grouped_matmul import Inputs, grouped_swiglu, grouped_swiglu_backward

num_experts, dim, width, num_tokens, num_blocks = map(int, sys.argv[2:])
array_in = lambda *shape: array(shape, jnp.dtype(sys.argv[1]))
projection, down = array_in(num_experts, dim, width), array_in(num_experts, width, dim)
tokens, experts = array((128 * num_blocks,), jnp.int32), array((num_blocks,), jnp.int32)
x, gate_up = array_in(num_tokens, dim), array_in(128 * num_blocks, 2 * width)
weights = array((128 * num_blocks,), jnp.float32)
inputs = Inputs(x, projection, projection, down, tokens, experts)

compile_for_h200(lambda *arrays: grouped_swiglu(*arrays, "hopper"), inputs)
compile_for_h200(
    lambda *arrays: grouped_swiglu_backward(*arrays, "hopper"), inputs, gate_up, weights, x
)
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("bfloat16", (64, 2048, 1024, 8192, 575)),  # OLMoE
        ("bfloat16", (8, 4096, 14_336, 16_384, 263)),  # Mixtral
        ("bfloat16", (4, 2880, 1408, 4096, 65)),  # tiles of 192 and of 128 columns
        ("float16", (3, 100, 72, 50, 6)),  # padded widths, tiles of 128
        ("bfloat16", (3, 192, 320, 50, 7)),  # tiles of 192 and of 64 columns
    ],
)
def test_compiles_for_h200_without_spills(dtype, sizes, tmp_path):
    compile_for_h200(COMPILE, dtype, *map(str, sizes), dumps=tmp_path)
    check_compiled_kernels(tmp_path, least=7)


# Two programs share the tiles, so that each goes round its ring several times, and from one tile
# to the next. Both kernels are checked before what they are put together to.
INTERPRET_KERNELS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from moe.kernels.grouped_matmul.hopper import gradient, matmul, pipeline
from tests.kernels.attention.gpu_interpreter import interpreted

pipeline.PROGRAMS = 2
tiling = pipeline.Tiling(columns=int(sys.argv[1]), stages=3, band=2)
experts = jnp.array(eval(sys.argv[2]), jnp.int32)
rng, experts_I = np.random.default_rng(0), np.repeat(experts, 128)
array = lambda *shape: jnp.asarray(rng.normal(size=shape), "bfloat16")
x, grad = array(len(experts_I), 128), array(len(experts_I), 256)
gate, up = array(3, 128, 128), array(3, 128, 128)

def check(function, arrays, expected, tolerance):
    actual = np.asarray(interpreted(function, *arrays), np.float64)
    error = np.abs(actual - expected).max()
    assert error <= tolerance * np.abs(expected).max(), error

x_64, grad_64, gate_64, up_64 = (np.asarray(x, np.float64) for x in (x, grad, gate, up))
both = np.concatenate([gate_64, up_64], axis=2)
both = np.concatenate([both, np.zeros_like(both[:1])])[experts_I]
check(
    lambda x, *weights: matmul.grouped_matmul(x, weights, experts, tiling=tiling),
    (x, gate, up), np.einsum("ik,iko->io", x_64, both), 4e-3,
)
check(
    lambda x, *weights: matmul.grouped_matmul(
        x, weights, experts, transposed=True, dtype="float32", tiling=tiling
    ),
    (grad, gate, up), np.einsum("io,iko->ik", grad_64, both), 1e-6,
)
sums = [x_64[experts_I == e].T @ grad_64[experts_I == e][:, 128:] for e in range(3)]
check(
    lambda x, grad: gradient.grouped_weight_gradient(
        x, grad, experts, 3, columns=(128, 128), tiling=tiling
    ),
    (x, grad), np.stack(sums), 1e-6,
)
print("checked")
"""

INTERPRET_PASSES = """
import sys
import numpy as np
from tests.kernels.attention.gpu_interpreter import interpreted
from tests.kernels.grouped_matmul import cases

run = cases._run_both_passes
cases._run_both_passes = lambda *arrays: (
    interpreted(lambda *arrays: run(*arrays, "hopper"), *arrays[:3])
    if arrays[3] == "hopper" else run(*arrays)
)
shapes = cases.Drawn(3, 72, 100, 4)
cases.check_against_plain_jax("hopper", int(sys.argv[1]), shapes, block_rows=128)
print("checked")
"""

only_here = pytest.mark.skipif(
    jax.__version__ != "0.10.2",
    reason="the interpreter and what tests add to it are private to JAX 0.10.2",
)


@pytest.mark.slow
@only_here
@pytest.mark.parametrize(
    ("columns", "experts"), [(64, [0, 0, 2, 3]), (128, [1, 1, 1]), (64, [3, 3])]
)
def test_the_kernels_in_the_interpreter(columns, experts):
    """Some experts have no rows, one has all, or no block has an expert."""
    assert "checked" in run(INTERPRET_KERNELS, str(columns), str(experts), timeout=280)


@pytest.mark.slow
@only_here
@pytest.mark.parametrize("seed", [0, 3])
def test_both_passes_in_the_interpreter(seed):
    """With widths that are padded, rows that fill up blocks, and blocks without an expert."""
    assert "checked" in run(INTERPRET_PASSES, str(seed), timeout=280)
