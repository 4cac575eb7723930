"""The list of checks and measurements for a GPU, with commands that need none."""

import ast
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import gpu
from launch.plan_check import Case
from moe.scaling.hardware import CHIPS
from moe.scaling.memory import step_bytes

WRITES = """
import json, sys
with open(sys.argv[1], "w") as file:
    json.dump({"tokens_per_second": 1234.4, "mfu": 0.5}, file)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs `launch.gpu` on these steps, and returns its code and output."""

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as on a machine with a GPU

    def run_steps(steps, only=None):
        monkeypatch.setattr(gpu, "STEPS", steps)
        code = gpu.main(SimpleNamespace(out=str(tmp_path), only=only))
        return code, capsys.readouterr().out

    return run_steps


def step(program, limit_s=60):
    return gpu.Step(("-c", program, "{json}"), limit_s)


def test_a_step_that_fails_leaves_no_result_and_the_others_run(run, tmp_path):
    steps = {
        "halved": step("import sys; open(sys.argv[1], 'w').write('{'); sys.exit(3)"),
        "slow": step("import time; time.sleep(60)", limit_s=1),
        "check": step("print('noise'); print('7 passed in 1 s')"),
        "dense": step(WRITES),
    }
    code, printed = run(steps)
    assert code == 1
    assert "halved: ended with exit code 3: see" in printed
    assert "slow: took more than 1 s: see" in printed
    assert "check: 7 passed in 1 s" in printed
    assert "dense: 1,234 tokens/s, MFU 50.0%" in printed
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["check", "dense"]


def test_a_second_run_goes_on_with_what_is_missing(run, tmp_path):
    steps = {"first": step(WRITES), "second": step("import sys; sys.exit(1)")}
    assert run(steps)[0] == 1
    before = (tmp_path / "first.json").stat().st_mtime_ns
    code, printed = run({**steps, "second": step(WRITES)})
    assert code == 0 and "first: done before" in printed
    assert (tmp_path / "first.json").stat().st_mtime_ns == before


def test_only_some_steps_run(run, tmp_path):
    steps = {"first": step(WRITES), "second": step(WRITES)}
    assert run(steps, only=["second"])[0] == 0
    assert [path.stem for path in tmp_path.glob("*.json")] == ["second"]
    with pytest.raises(gpu.ConfigError, match="--only=third is no step: set it to some of first"):
        run(steps, only=["third"])


def test_without_a_gpu_nothing_runs(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(gpu.ConfigError, match="this machine has no NVIDIA GPU in /dev"):
        run({"first": step(WRITES)})
    assert not list(tmp_path.iterdir())


def test_the_summary_compares_with_the_best_of_the_others(run, tmp_path):
    rows = [
        {"mask": "causal", "length": 64, "pass": "forward", "implementation": name, "ms": ms}
        for name, ms in (("hopper", 2.0), ("cudnn", 3.0), ("xla", 9.0))
    ]
    rows.append({"mask": "causal", "length": 64, "implementation": "other", "refused": "why"})
    (tmp_path / "attention.json").write_text(json.dumps({"rows": rows}))
    printed = run({"attention": step("")})[1]
    assert "causal 64 forward: hopper 2.00 ms, 1.50 times as fast as cudnn" in printed


def test_every_step_names_a_command_and_a_config_that_exist():
    root = Path(__file__).parents[2]
    for name, (arguments, _) in gpu.STEPS.items():
        assert arguments[0] == "-m" and importlib.util.find_spec(arguments[1]), name
        for argument in arguments:
            if argument.startswith(("--config=", "tests/")):
                path = argument.removeprefix("--config=").split(":")[0]
                assert (root / path).exists(), argument


@pytest.mark.parametrize("name", ["dense_125m", "dense_1b", "moe_1b_7b_4_layers"])
def test_a_training_step_fits_a_gpu_of_80_gb(name):
    """JAX takes 0.92 of the memory of an H100."""
    arguments = [argument for argument in gpu.STEPS[name].arguments if "=" in argument]
    config, *fields = (argument.split("=", 1) for argument in arguments if "json" not in argument)
    changes = {field.removeprefix("--config."): value_of(value) for field, value in fields}
    run = Case(Path(config[1]).stem, "h100", 1, changes).read()
    counted = step_bytes(run, run.mesh, "gpu").total
    assert counted < 0.92 * CHIPS["h100"].memory_bytes


def value_of(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def test_a_check_that_ran_nothing_has_no_result(run, tmp_path):
    """Without a GPU in JAX all tests are skipped, and pytest ends without an error."""
    code, printed = run({"check": step("print('24 skipped in 3.1s')")})
    assert code == 1 and "check: ran nothing (24 skipped in 3.1s): see" in printed
    assert not list(tmp_path.glob("*.json"))


def test_the_summary_reads_the_rows_of_every_benchmark(run, tmp_path):
    of_experts = [
        {"shape": {"rows": 64, "dim": 32}, "pass": "dx", "implementation": name, "ms": ms}
        for name, ms in (("hopper", 1.0), ("ragged_dot", 4.0))
    ]
    of_decoding = [
        {"filled": 0.5, "dtype": "float32", "implementation": "ours", "ms": 1.0, "ratio": 2.0},
        {"filled": 0.5, "dtype": "float32", "implementation": "xla", "ms": 2.0},
    ]
    for name, rows in (("experts", of_experts), ("decode", of_decoding)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    printed = run({"experts": step(""), "decode": step("")})[1]
    assert "rows=64 dim=32 dx: hopper 1.00 ms, 4.00 times as fast as ragged_dot" in printed
    assert "0.5 float32: ours 1.00 ms, 2.00 times as fast as xla" in printed
