"""Compiles the three TPU kernels of attention ahead of time for chips that are not attached."""

import re

import jax
import jax.numpy as jnp
import pytest

from moe.kernels.attention import decode_attention, flash_attention
from tests.kernels.programs import on_one

MASKS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (1024, 0), "softcap": 30.0},
    "segments": {"causal": True, "segments": True},
}


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_compiles_for_tpus(topology, width, mask, monkeypatch):
    sharding = on_one(topology, monkeypatch)
    q = jax.ShapeDtypeStruct((1, 4096, 4, width), jnp.bfloat16, sharding=sharding)
    k = jax.ShapeDtypeStruct((1, 4096, 2, width), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=sharding)
    sinks = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
    options = MASKS[mask]

    def loss(q, k, v, sinks, ids):
        segments = {"q_segment_ids": ids, "kv_segment_ids": ids} if "segments" in options else {}
        keywords = {name: value for name, value in options.items() if name != "segments"} | segments
        return jnp.sum(
            flash_attention(q, k, v, sinks=sinks, implementation="tpu", **keywords).astype(
                jnp.float32
            )
        )

    traced = jax.jit(jax.grad(loss, range(4))).trace(q, k, k, sinks, ids)
    program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    size = re.compile(
        r'"tpu_custom_call".*"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
    )
    held = [int(found[1]) / 2**20 for line in program.splitlines() if (found := size.search(line))]
    print(topology, width, mask, "MiB of VMEM:", *(f"{x:.1f}" for x in held))
    assert len(held) == 3 and max(held) < 8  # a kernel may hold 16


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_decoding_copies_no_cache(topology, monkeypatch):
    sharding = on_one(topology, monkeypatch)
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((8, 1, 64, 128), (4, 8, 8192, 8, 128))
    )
    positions, layer = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in ((8, 1), ())
    )
    traced = jax.jit(lambda *arrays, layer: decode_attention(*arrays, layer=layer)).trace(
        q, k, k, positions, layer=layer
    )
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 8 * 8192 * 8 * 128 * 2 / 16
    )  # of a step's keys at most
