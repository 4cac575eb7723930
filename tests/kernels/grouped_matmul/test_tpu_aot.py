"""Compiles the TPU kernels of the experts ahead of time, alone and in a train step."""

import collections
import functools
import re

import jax
import pytest

from configs import moe_1b_7b
from launch.compiled_step import abstract_batch, lower_step
from moe.config import RunConfig
from moe.kernels.grouped_matmul import Inputs, grouped_swiglu, grouped_swiglu_backward
from moe.kernels.grouped_matmul.tpu import blocks
from moe.training.train_step import make_program
from tests.kernels.programs import on_one, tpus

# The first byte of a kernel's VMEM and the one after its last. Before it XLA may hold operands.
VMEM = re.compile(
    r'"tpu_custom_call".*"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"'
    r'.*"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)
DTYPES_AND_SIZES = [
    ("bfloat16", (64, 2048, 1024, 16_384, 575, 256)),  # OLMoE
    ("bfloat16", (1, 4096, 14_336, 16_384, 129, 256)),  # Mixtral, an expert a device
    ("bfloat16", (4, 7168, 2048, 4096, 65, 128)),  # DeepSeek-V3
    ("float32", (3, 192, 320, 50, 7, 8)),  # padded widths, small blocks
]


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("dtype", "sizes"), DTYPES_AND_SIZES, ids=str)
def test_compiles_for_tpus(topology, dtype, sizes, monkeypatch):
    """Both passes compile. A kernel that overflows its VMEM would not."""
    sharding = on_one(topology, monkeypatch)
    num_experts, dim, width, num_tokens, num_blocks, block_rows = sizes
    num_rows = num_blocks * block_rows
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    projection, down = (num_experts, dim, width), (num_experts, width, dim)
    floats = (array(dtype, *shape) for shape in ((num_tokens, dim), projection, projection, down))
    inputs = Inputs(*floats, array("int32", num_rows), array("int32", num_blocks))
    rest = array(dtype, num_rows, 2 * width), array("float32", num_rows), inputs.x_ND
    for function, arguments in ((grouped_swiglu, ()), (grouped_swiglu_backward, rest)):
        traced = jax.jit(functools.partial(function, implementation="tpu")).trace(
            inputs, *arguments
        )
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        found = VMEM.findall(compiled.as_text())
        held = [(int(end) - int(first)) / 2**20 for first, end in found]
        print(topology, dtype, sizes, "MiB of VMEM:", *(f"{x:.1f}" for x in held))
        assert len(held) >= (5 if arguments else 2)
        assert max(held) * 2**20 <= blocks.VMEM_LIMIT
        # Beside the products of rows, XLA gathers rows and adds up numbers.
        calculated = compiled.cost_analysis()["flops"]
        matmuls = (6 if arguments else 3) * 2 * num_rows * dim * width
        assert matmuls <= calculated <= 1.2 * matmuls or width % 128


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_the_experts_of_a_train_step_are_the_kernels(monkeypatch):
    """Compiles two layers of moe_1b_7b for 8 v5p, with remat, in one loop over layers."""
    devices = tpus("v5p:2x2x2", monkeypatch)
    config = moe_1b_7b.get_config()
    config.update_from_flattened_dict(
        {"model.num_layers": 2, "mesh.data": 1, "train.batch_size": 32, "train.accumulation": 1}
    )
    run = RunConfig.from_config_dict(config)
    program = make_program(run, devices)
    text = lower_step(program, abstract_batch(run, program), "tpu").compile().as_text()
    calls = re.findall(r"%(experts_[a-z_]+)[.0-9]* = .*tpu_custom_call", text)
    assert collections.Counter(calls) == {
        "experts_projections": 2,  # the second one in the recomputation
        "experts_matmul": 2,  # down, and the gradient of x
        "experts_hidden": 1,
        "experts_weight_gradient": 3,
    }
    # A TPU's matmuls are convolutions. None of them has the weights of all experts.
    whole_weights = re.compile(r"\[64,(2048,1024|1024,2048)\]")
    matmuls = re.findall(r".*(?:convolution|dot)\(.*", text)
    assert matmuls and not any(map(whole_weights.search, matmuls))
