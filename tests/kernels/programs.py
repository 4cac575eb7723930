"""Compiles for chips that are not here, and runs programs in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROOT = Path(__file__).parents[2]

# Defines `array`, a shape on one H200 that is not attached, and `compile_for_h200`.
ON_H200 = """
import pathlib
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

target = pathlib.Path("moe/scaling/programs/h200.textproto").read_text()
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology="1x1x8"
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(AxisType.Auto,))
one_gpu = NamedSharding(mesh, PartitionSpec())
array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=one_gpu)

def compile_for_h200(function, *arrays):
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=("cuda",)).compile()
"""


def tpus(topology, monkeypatch):
    """Returns the TPUs of a topology, which are not attached."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(found.devices)


def on_one(topology, monkeypatch):
    """Returns a sharding on one TPU that is not attached."""
    devices = np.array(tpus(topology, monkeypatch)[:1])
    return NamedSharding(Mesh(devices, ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())


def run(program: str, *args: str, timeout: int, **environment: str) -> str:
    """Runs a Python program in a process of its own, and returns what it prints.

    The interpreter may hang, and the compiler reads its settings when its process starts.
    """
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *args],
        cwd=ROOT,
        env=variables,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_for_h200(program: str, *args: str, dumps: Path) -> str:
    """Runs a program that begins where `ON_H200` ends. What compilers say is left in `dumps`."""
    pytest.importorskip(
        "jax_cuda13_plugin", reason="needs pip install jax-cuda13-plugin jax-cuda13-pjrt"
    )
    settings = {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_TO": str(dumps),
        # A program out of the cache would not be compiled, so nothing would be said.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    return run(ON_H200 + program, *args, timeout=280, **settings)


def check_compiled_kernels(dumps: Path, least: int) -> None:
    """Checks that at least so many kernels were compiled, all without spills.

    Nor may a wgmma wait for the one before it, which ptxas would report as "serialized".
    """
    reports = [path.read_text() for path in sorted(dumps.glob("*.ptxas"))]
    assert len(reports) >= least
    for report in reports:
        print(
            re.search(r"Used \d+ registers", report).group(),
            re.search(r"\d+ bytes spill stores", report).group(),
        )
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
        assert "are spilled" not in report and "serialized" not in report
