"""Checks which implementation is chosen for a chip and a call, and the errors where none can."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe.kernels.attention import (
    IMPLEMENTATIONS,
    Choice,
    choice,
    choose,
    flash_attention,
    supported,
    why_not,
)
from moe.kernels.attention.inputs import Options


def array(width: int = 128, length: int = 4096, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length, 8, width), dtype)


IDS = jax.ShapeDtypeStruct((1, 4096), "int32")
SEGMENTS = {"q_segment_ids": IDS, "kv_segment_ids": IDS}
LONG = dict.fromkeys(SEGMENTS, jax.ShapeDtypeStruct((1, 16_384), "int32"))


@pytest.mark.parametrize(
    ("chip", "q", "keywords", "name"),
    [
        ("cpu", array(), {"causal": True}, "blockwise"),
        ("TPU v5p", array(), {"causal": True}, "tpu"),
        ("TPU v6 lite", array(80, dtype="float32"), {"window": (9, 9), "softcap": 30.0}, "tpu"),
        ("TPU v5p", array(dtype="float16"), {}, "blockwise"),
        ("NVIDIA A100-SXM4-80GB", array(), {"causal": True}, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", array(), {"causal": True, "window": (1023, 0)}, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", array(), {}, "blockwise"),
        ("NVIDIA A100-SXM4-80GB", array(256), {"causal": True}, "blockwise"),
        ("NVIDIA A100-SXM4-80GB", array(dtype="float32"), {"causal": True}, "blockwise"),
        ("NVIDIA A100-SXM4-80GB", array(), {"causal": True, **SEGMENTS}, "cudnn"),
        ("NVIDIA B200", array(), {"causal": True, **SEGMENTS}, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", array(length=16_384), {"causal": True, **LONG}, "blockwise"),
        ("NVIDIA A100-SXM4-80GB", array(), {"causal": True, "q_offset": jnp.int32(0)}, "blockwise"),
        ("NVIDIA H100 80GB HBM3", array(), {"causal": True}, "hopper"),
        ("NVIDIA H200", array(256), {"causal": True, "softcap": 30.0, **SEGMENTS}, "hopper"),
        ("NVIDIA H200", array(dtype="float32"), {"causal": True, **SEGMENTS}, "blockwise"),
    ],
)
def test_the_chip_and_the_call_decide(chip, q, keywords, name):
    chosen = choose(chip, q, q, q, **keywords)
    assert chosen.name == name and supported(name, q, q, q, chip=chip, **keywords)


def test_blocks_come_from_the_table_or_from_a_rule(monkeypatch):
    monkeypatch.setattr(
        choice, "tuned_blocks", lambda: {"TPU v5p": {"tpu bfloat16 128 causal 4096": (1024, 512)}}
    )
    causal = {"causal": True}
    assert choose("TPU v5p", *[array()] * 3, **causal) == Choice("tpu", (1024, 512))
    assert choose("TPU v5p", *[array(length=4000)] * 3, **causal) == Choice("tpu", (1024, 512))
    for q, keywords in (
        (array(length=4097), causal),
        (array(64), causal),
        (array(), {}),
        (array(), {"causal": True, "window": (8, 0)}),
    ):
        assert choose("TPU v5p", q, q, q, **keywords).blocks is None


def test_an_implementation_s_rule_gives_the_blocks_that_the_table_lacks():
    causal, narrow = (Options(left, 0, None, 1.0) for left in (None, 511))
    assert choice.with_blocks(Choice("tpu"), narrow) == Choice("tpu", (512, 512))
    assert choice.with_blocks(Choice("blockwise"), causal).blocks == (256, 256)
    assert choice.with_blocks(Choice("blockwise", (8, 8)), narrow).blocks == (8, 8)
    assert choice.with_blocks(Choice("reference"), narrow).blocks is None
    rule = IMPLEMENTATIONS["blockwise"].blocks
    widths = (9, 300, 511, 1023, 9999)
    sizes = lambda right: [rule(Options(left, right, None, 1.0))[1] for left in widths]
    assert (sizes(0), sizes(1)) == ([128, 128, 256, 256, 256], [128, 128, 256, 512, 512])
    assert rule(Options(None, None, None, 1.0)) == (256, 512)


def test_an_unknown_name_is_told_with_those_that_are_known():
    message = (
        r"^implementation='flash' is not known: choose from 'reference', 'blockwise', .*'cudnn'$"
    )
    q = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match=message):
        flash_attention(q, q, q, implementation="flash")
    with pytest.raises(ValueError, match=message):
        why_not("flash", q, q, q)


def test_importing_attention_loads_no_pallas():
    """Pallas takes a second to load, and many programs run no kernel that needs it."""
    program = "import sys, moe.kernels.attention; print('jax.experimental.pallas' in sys.modules)"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_table_names_chips_and_keys_of_calls():
    for chip, rows in json.loads(choice.TUNED_BLOCKS.read_text()).items():
        assert chip and all(
            re.fullmatch(r"(blockwise|tpu) \w+ \d+ (full|causal|window) \d+", key) for key in rows
        )
        assert all(len(blocks) == 2 and min(blocks) > 0 for blocks in rows.values())


@pytest.mark.parametrize(
    ("name", "keywords", "reason"),
    [
        (
            "tpu",
            {"chip": "NVIDIA H200"},
            "it runs on TPUs, and interpreted on CPUs, not on NVIDIA H200",
        ),
        (
            "hopper",
            {"chip": "NVIDIA A100-SXM4-80GB"},
            "it runs on Hopper GPUs, not on NVIDIA A100-SXM4-80GB",
        ),
        ("hopper", {"chip": "NVIDIA H100 80GB HBM3", "causal": True, **SEGMENTS}, None),
        ("hopper_fused", {"chip": "NVIDIA H200", "causal": True, **SEGMENTS}, None),
        ("cudnn", {"chip": "cpu"}, "it runs on NVIDIA GPUs, not on cpu"),
        ("cudnn", {}, "it takes causal attention alone"),
        ("cudnn", {"causal": True, "softcap": 1.0}, "it knows no softcap"),
        (
            "cudnn",
            {"causal": True, "sinks": jax.ShapeDtypeStruct((8,), "float32")},
            "it knows no sinks",
        ),
        ("cudnn", {"causal": True, "return_lse": True}, "it knows no lse"),
        ("reference", {}, None),
    ],
)
def test_what_an_implementation_cannot_do_has_a_reason(name, keywords, reason):
    found = why_not(name, *[array()] * 3, **keywords)
    assert found == reason or found.startswith(reason)


def test_the_fused_gradients_on_hopper_are_of_narrow_heads():
    assert why_not("hopper", *[array(192)] * 3) is None
    assert (
        why_not("hopper_fused", *[array(192)] * 3) == "it takes head widths of up to 128, not 192"
    )


def test_a_named_implementation_that_cannot_do_a_call_names_one_that_can():
    q = jnp.zeros((1, 8, 2, 16), jnp.float16)
    message = r"^'tpu' cannot do this attention, for it takes bfloat16 .*'blockwise' can$"
    with pytest.raises(NotImplementedError, match=message):
        flash_attention(q, q, q, implementation="tpu")


def test_without_a_name_the_platform_decides_when_the_program_is_lowered():
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, causal=True))))
    kernels = {
        name: gradient.trace(q).lower(lowering_platforms=(name,)).as_text().count("tpu_custom_call")
        for name in ("cpu", "tpu")
    }
    assert kernels == {"cpu": 0, "tpu": 3}
