"""Which implementation is chosen, in which blocks, and what is refused."""

import jax
import pytest
from jax import export

from moe.kernels.grouped_matmul import Choice, Shapes, choose, why_not, with_blocks
from moe.kernels.grouped_matmul.choice import IMPLEMENTATIONS, block_rows


@pytest.mark.parametrize(
    ("num_assignments", "num_experts", "rows"),
    [(65536, 64, 64), (2048, 64, 8), (16384, 64, 16), (3, 64, 8), (8192, 8, 64)],
)
def test_a_block_is_about_a_sixteenth_of_the_mean_load(num_assignments, num_experts, rows):
    assert block_rows(Shapes(num_assignments, num_experts, "float32")) == rows


@pytest.mark.parametrize("chip", ["cpu", "TPU v4", "NVIDIA A100-SXM4-40GB", "NVIDIA B200", None])
def test_a_chip_that_is_not_here_has_a_choice(chip):
    assert choose(chip, Shapes(16384, 64, "bfloat16")) == Choice("blockwise", 16)


@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_tpus_have_kernels_of_their_own(chip):
    assert choose(chip, Shapes(16384, 64, "bfloat16")) == Choice("tpu", 128)
    assert choose(chip, Shapes(131_072, 64, "float32")) == Choice("tpu", 256)
    assert choose(chip, Shapes(131_071, 64, "float32")) == Choice("tpu", 128)
    assert choose(chip, Shapes(16384, 64, "float64")) == Choice("blockwise", 16)
    assert why_not("tpu", chip, Shapes(64, 8, "float16")) == (
        "it takes bfloat16 and float32, not float16"
    )


def test_the_tpu_kernels_need_the_vmem_of_v5e_and_later():
    shapes = Shapes(64, 8, "bfloat16")
    assert why_not("tpu", "cpu", shapes) is None
    for chip in ("TPU v4", "TPU v4 lite", "TPU v3", "NVIDIA H200"):
        assert why_not("tpu", chip, shapes) == (
            f"it runs on TPU v5e, v5p and later, and interpreted on CPUs, not on {chip}"
        )


def test_every_choice_names_an_implementation():
    choice = choose("cpu", Shapes(16384, 64, "float32"))
    assert IMPLEMENTATIONS[choice.name].blocks(Shapes(16384, 64, "float32")) == choice.block_rows


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_obstacle_says_what_the_implementation_takes(name):
    obstacle = IMPLEMENTATIONS[name].obstacle
    [symbol] = export.symbolic_shape("n")
    assert obstacle(Shapes(64, 8, "bfloat16"), None) is None
    assert obstacle(Shapes(64, 8, "int32"), None).endswith(
        {"hopper": "float16, not int32", "tpu": "float32, not int32"}.get(
            name, "float64, not int32"
        )
    )
    assert obstacle(Shapes(symbol, 8, "bfloat16"), None).endswith("not the symbol n")


def test_the_hopper_kernels_are_for_hopper_gpus():
    shapes = Shapes(64, 8, "bfloat16")
    assert why_not("hopper", "NVIDIA H200", shapes) is None
    assert why_not("hopper", "NVIDIA A100-SXM4-40GB", shapes) == (
        "it runs on Hopper GPUs, not on NVIDIA A100-SXM4-40GB"
    )
    assert with_blocks("hopper", shapes) == Choice("hopper", 128)
    for chip in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"):
        assert choose(chip, shapes) == Choice("hopper", 128)
        assert choose(chip, shapes, refused=["hopper"]) == Choice("blockwise", 8)
        assert choose(chip, shapes._replace(dtype="float32")) == Choice("blockwise", 8)


def test_a_call_that_none_can_compute_is_refused():
    with pytest.raises(NotImplementedError, match="'blockwise' cannot: it takes bfloat16, "):
        choose("cpu", Shapes(64, 8, "int8"))


def test_a_choice_is_made_without_any_device(monkeypatch):
    def fail(*arguments):
        raise AssertionError("asked for the devices")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(jax, "default_backend", fail)
    assert choose("TPU v6 lite", Shapes(64, 8, "float32")).name == "tpu"
