"""Tests the flags of compilers that commands set, and what they do to a program for TPUs."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch import compiler_flags
from launch.compiler_flags import TPU_FLAGS, VARIABLE, use_flags


def test_flags_are_for_tpus_alone(monkeypatch) -> None:
    environment = {"A": "b"}
    use_flags(environment)
    assert environment == {"A": "b"}
    monkeypatch.setattr(compiler_flags, "on_tpu", lambda environment: True)
    use_flags(environment)
    assert environment[VARIABLE].split() == [f"--{flag}={on}" for flag, on in TPU_FLAGS.items()]


def test_flags_of_the_user_stay(monkeypatch) -> None:
    monkeypatch.setattr(compiler_flags, "on_tpu", lambda environment: True)
    environment = {VARIABLE: "--xla_enable_async_all_gather=false --xla_other=1"}
    use_flags(environment)
    flags = environment[VARIABLE].split()
    assert flags[:2] == ["--xla_enable_async_all_gather=false", "--xla_other=1"]
    assert len(flags) == len(set(TPU_FLAGS)) + 1


# Two matmuls, whose weights eight chips hold in parts: the second gather needs no result.
_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
mesh = Mesh(np.array(found.devices), ("fsdp",), axis_types=(AxisType.Auto,))
shape = lambda size, spec: jax.ShapeDtypeStruct(
    size, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
)
def layers(x, w, v):
    gather = lambda w: jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
    return (x @ gather(w)) @ gather(v)
specs = P("fsdp"), P("fsdp"), P("fsdp")
mapped = jax.shard_map(layers, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), check_vma=False)
arrays = shape((65536, 4096), specs[0]), *(shape((4096, 4096), specs[1]) for _ in "wv")
compiled = jax.jit(mapped).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
print(compiled.as_text().count("AsyncCollectiveStart"))
"""


@pytest.mark.aot
def test_a_gather_becomes_part_of_a_matmul_beside_it() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs pip install '.[aot]'")
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    flags = " ".join(f"--{flag}={value}" for flag, value in TPU_FLAGS.items())
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", _PROGRAM],
                env=os.environ | own | {VARIABLE: arguments},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
        )
        for arguments in ("", flags)
    ]
    assert found[0] == 0 and found[1] > 0
