"""Tests what launch.plan compiles: for which slices, what programs hold, and what they send."""

import dataclasses
import importlib.util
import subprocess
import types

import jax
import pytest

from configs import dense_7b, moe_8x7b
from launch import plan
from launch.compiled_step import held_bytes
from launch.compiler_flags import TPU_FLAGS, VARIABLE
from launch.plan_page import plan_page
from launch.plan_program import (
    ProgramMemory,
    StepProgram,
    compile_for,
    compile_step,
    program_collective_rows,
    program_lines,
)
from launch.topologies import Target, find_target
from moe.config import ConfigError, DataConfig, MeshConfig, RunConfig, TrainConfig
from moe.scaling.communication import Collective
from moe.scaling.hardware import CHIPS
from moe.scaling.layouts import Layout
from moe.scaling.memory import state_bytes
from moe.scaling.roofline import estimate
from tests.tiny import TINY_MODEL

GIB = 2**30
TINY = RunConfig(
    model=dataclasses.replace(TINY_MODEL, num_layers=3, remat="full"),
    data=DataConfig(sequence_length=16),
    train=TrainConfig(batch_size=16, accumulation=2),
    mesh=MeshConfig(data=2, fsdp=4),
)


@pytest.fixture
def no_compiler(monkeypatch):
    """Makes the compilers of all chips seem not to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def all_compilers(monkeypatch):
    """Makes the compilers of all chips seem to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("chip", "devices", "topology"),
    [
        ("h200", 1, "1x1x1"),
        ("h200", 8, "1x1x8"),
        ("h100", 64, "1x8x8"),
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 8, "v5p:2x2x2"),
        ("v5p", 32, "v5p:2x4x4"),
        ("v5p", 1024, "v5p:8x8x16"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
        ("tpu7x", 8, "tpu7x:2x2x1"),  # two devices in each of 4 chips
    ],
)
def test_slices(chip, devices, topology, all_compilers) -> None:
    target = find_target(CHIPS[chip], devices)
    assert target.topology == topology
    assert f"compiled for {devices} {chip}, as {topology}" in target.label
    assert ("H200" in target.label) == (chip == "h100")


@pytest.mark.parametrize(
    ("chip", "devices", "fix"),
    [
        ("h200", 12, "multiple of 8"),
        ("v5p", 12, "power of two from 4 to"),
        ("v5p", 2, "power of two from 4 to"),
        ("v5e", 512, "from 4 to 256"),
        ("tpu7x", 4, "from 8 to"),
    ],
)
def test_a_number_of_devices_that_no_slice_has_is_refused(chip, devices, fix) -> None:
    with pytest.raises(ConfigError, match=f"--devices={devices} .*{fix}"):
        find_target(CHIPS[chip], devices)


def test_without_a_compiler_the_target_is_virtual_and_says_so(no_compiler) -> None:
    target = find_target(CHIPS["v5p"], 64)
    assert (target.platform, target.topology) == ("cpu", "64")
    assert "compiled for CPU, as 64 virtual devices" in target.label
    assert "pip install '.[aot]'" in target.label


def test_an_exchange_that_cpus_lack_is_an_estimate_and_says_so(no_compiler, capsys) -> None:
    config = RunConfig.from_config_dict(moe_8x7b.get_config())
    chip = CHIPS["v5p"]
    layout = Layout(config, estimate(config, config.mesh.resolve(64), chip))
    assert plan._compile(layout, chip, 64) is None
    assert (
        "Not compiled, so the plan is an estimate: the compiler for v5p" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("platform", "flags"), [("tpu", set(TPU_FLAGS)), ("cuda", set())])
def test_a_program_for_tpus_is_compiled_with_the_flags_of_a_run(
    platform, flags, monkeypatch
) -> None:
    environments = []

    def start(command, *, env, **_):
        environments.append(env)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_this_process=1")
    monkeypatch.setenv(VARIABLE, "--xla_own=1")
    with pytest.raises(FileNotFoundError):
        compile_for(TINY, Target(platform, "1x1x8", "a slice"))
    (environment,) = environments
    set_flags = {flag.split("=")[0] for flag in environment[VARIABLE].split()}
    assert set_flags == {f"--{flag}" for flag in flags} | {"--xla_own"}
    assert "XLA_FLAGS" not in environment and environment["JAX_PLATFORMS"] == "cpu"


LEAST = [
    Collective("all-gather", ("fsdp",), "weights", 2 * GIB, 8),
    Collective("all-gather", ("fsdp",), "embedding", 2 * GIB, 2),
    Collective("all-to-all", ("expert",), "rows", 1 * GIB, 4),
]
SENT = (
    Collective("all-gather", ("fsdp",), "stack", 5 * GIB, 12),
    Collective("all-reduce", ("fsdp", "tensor"), "f32[2]", 2 * GIB, 3),
    Collective("all-gather", ("fsdp",), "embed", 1 * GIB, 4),
)


def test_what_is_sent_stands_beside_the_least() -> None:
    assert program_collective_rows(SENT, LEAST)[1:] == [
        ("all-gather", "fsdp", "16", "6.000", "4.000", "1.50"),
        ("all-reduce", "fsdp, tensor", "3", "2.000", "0.000", "-"),
        ("all-to-all", "expert", "0", "0.000", "1.000", "0.00"),
        ("total", "", "19", "8.000", "5.000", "1.60"),
    ]


def test_a_program_is_shown_as_text_and_on_the_page() -> None:
    memory = ProgramMemory(1, 2, 3, 4, 10 * GIB, 5 * GIB, 8 * GIB, 7 * GIB)
    assert memory.total == 16 * GIB
    program = StepProgram(Target("tpu", "x", "compiled for x"), {}, memory, SENT, 3.0)
    chip, layout = CHIPS["v5p"], Layout(TINY, estimate(TINY, TINY.mesh, CHIPS["v5p"]))
    text = "\n".join(program_lines(program, LEAST, chip))
    page = plan_page(layout, chip, program)
    for shown in (text, page):
        assert "compiled for x (3 s)" in shown and "16.00" in shown and "f32[2]" in shown
    assert "The compiled program" not in plan_page(layout, chip)


def test_what_a_program_holds_is_read_off_what_its_compiler_allocates() -> None:
    """These are the figures of a program that compiles for v5e, which has 16 GiB (docs/log.md)."""
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=1_856_788_992,
        temp_size_in_bytes=17_448_963_584,
        output_size_in_bytes=1_853_728_768,
        alias_size_in_bytes=1_853_725_184,
        peak_memory_in_bytes=13_133_076_992,
    )
    assert held_bytes(analysis, "tpu") / GIB == pytest.approx(12.23, abs=0.01)
    assert held_bytes(analysis, "cuda") / GIB == pytest.approx(17.98, abs=0.01)


def check_state(program: StepProgram, config: RunConfig, mesh: MeshConfig) -> None:
    """Compares the state's shapes with what is counted, and both with the compiler's count."""
    memory, counted = program.memory, state_bytes(config, mesh)
    assert memory.parameters == counted.parameters
    assert memory.optimizer == counted.optimizer
    state = memory.parameters + memory.optimizer + memory.rest_of_state
    # The numbers of the schedule are arguments too, and compilers pad small arrays.
    assert 0 <= memory.arguments - state - memory.batch <= 2**20
    assert state <= memory.aliased + 2**20
    assert memory.temporaries > memory.parameters  # they contain the gradients


@pytest.mark.slow
def test_a_step_is_compiled_for_virtual_devices(no_compiler, capsys) -> None:
    jax.devices()  # starts threads, beside which a process must not be forked
    program = compile_step(TINY, CHIPS["h200"], 8)
    check_state(program, TINY, TINY.mesh)
    assert program.mesh == dict.fromkeys(program.mesh, 1) | {"data": 2, "fsdp": 4}
    axes = {use.axes for use in program.collectives}
    assert axes <= {("data",), ("fsdp",), ("data", "fsdp")} and ("fsdp",) in axes
    # Each of 2 microbatches gathers 7 weights of 3 layers at least twice.
    gathers = sum(use.count for use in program.collectives if use.kind == "all-gather")
    assert gathers >= 2 * 3 * 7 * 2
    phases = capsys.readouterr().err
    assert "plan: compiling the step (" in phases and "plan: done (" in phases


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_told_from_the_process_of_its_own(no_compiler) -> None:
    with pytest.raises(ConfigError, match=r"mesh .* does not fit 16 devices"):
        compile_step(TINY, CHIPS["h200"], 16)


@pytest.mark.aot
def test_dense_7b_for_8_h200() -> None:
    """A microbatch at a time, 7/8 of 228.7 GiB are gathered, and 7/8 of 160 GiB scattered."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin jax-cuda13-pjrt")
    config = dense_7b.get_config()
    config.update_from_flattened_dict(
        {"mesh.tensor": 1, "train.batch_size": 64, "train.accumulation": 4}
        | {"model.remat": "full", "train.gather_once": False}
    )
    config = RunConfig.from_config_dict(config)
    program = compile_step(config, CHIPS["h200"], 8)
    check_state(program, config, config.mesh.resolve(8))
    sent = {(use.kind, use.axes): 0.0 for use in program.collectives}
    for use in program.collectives:
        sent[use.kind, use.axes] += use.bytes / GIB
    assert sent["all-gather", ("fsdp",)] <= 1.01 * 228.7 * 7 / 8
    assert sent["reduce-scatter", ("fsdp",)] <= 1.01 * 161 * 7 / 8
    assert sum(sent.values()) >= 0.9 * 2 * 100.4 * 7 / 8
    assert program.memory.total < 25 * GIB
