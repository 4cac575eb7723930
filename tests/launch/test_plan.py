"""Tests launch.plan's estimate, its page, and the check of a run before it compiles."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from configs import benchmark_dense, dense_7b, dense_tiny, moe_671b, moe_pipeline_tiny
from launch import plan_fit
from launch.plan import find_layouts
from launch.plan_cpu import cpu_chip
from launch.plan_page import plan_page
from launch.plan_text import layout_lines, plan_lines
from moe.config import ConfigError, MeshConfig, RunConfig
from moe.scaling.flops import run_training_flops
from moe.scaling.hardware import CHIPS
from moe.scaling.layouts import Layout, fitting_layouts
from moe.scaling.memory import step_bytes
from moe.scaling.roofline import estimate

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"
H200 = CHIPS["h200"]


def read(module, **changes):
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return RunConfig.from_config_dict(config)


def layout_on(config, devices, chip):
    return Layout(config, estimate(config, config.mesh.resolve(devices), chip))


def test_a_plan_has_every_kind_of_memory_and_what_is_sent():
    layout = layout_on(read(dense_7b), 64, H200)
    text = "\n".join(plan_lines(layout, H200))
    for kind in ("parameters", "optimizer", "gradients", "activations", "temporaries", "total"):
        assert f"\n{kind} " in text
    assert "64 h200 as fsdp=32, tensor=2; 1024 rows in 16 microbatches" in text
    assert "It fits: " in text and "bounded by compute" in text
    # 1024 rows of 4096 tokens, and 6.738e9 parameters.
    assert "The model takes 1.798e+17 FLOPs a step" in text and "are 1.696e+17." in text
    page = plan_page(layout, H200)
    assert page.count("background:var(--first)") == 6 and "<script" not in page
    assert "<td class=words>attention: weights</td><td>128</td>" in page


def test_a_plan_says_what_gathering_once_would_send_and_take():
    each, once = (
        layout_on(read(dense_7b, **{"train.gather_once": value}), 64, H200)
        for value in (False, True)
    )
    sent, taken = (
        sum(use.bytes for use in once.estimate.collectives) / 2**30,
        once.estimate.memory.total / 2**30,
    )
    expected = f"With train.gather_once=True it would send {sent:.1f} GiB, and take {taken:.1f} GiB"
    assert expected in "\n".join(plan_lines(each, H200))
    assert "gather_once" not in "\n".join(plan_lines(once, H200))
    small = dataclasses.replace(H200, memory_bytes=(taken - 1) * 2**30)
    assert "gather_once" not in "\n".join(plan_lines(each, small))


def test_a_layout_that_does_not_fit_names_its_largest_part_and_a_change_that_fits():
    full = {"mesh.tensor": 1, "model.remat": "full", "train.gather_once": False}
    config = read(dense_7b, **full, **{"train.accumulation": 1})
    layout = layout_on(config, 64, H200)
    text = "\n".join(plan_lines(layout, dataclasses.replace(H200, memory_bytes=20e9)))
    assert "It does not fit 18.6 GiB; the largest part is activations" in text
    change = text.split("GiB: set ")[1].split(".\n")[0]
    name, value = change.split("=")
    changed = read(dense_7b, **full, **{name: int(value)})
    assert step_bytes(changed, changed.mesh.resolve(64), "gpu").total <= 20e9
    assert "background:var(--alarm)" in plan_page(
        layout, dataclasses.replace(H200, memory_bytes=20e9)
    )


def test_the_layouts_that_fit_are_listed_with_flags_that_choose_the_first():
    layouts = fitting_layouts(read(dense_7b), 8, H200)
    lines = layout_lines(layouts)
    flags = dict(flag.split("=") for flag in lines[-1].split("--config.")[1:])
    read_value = {"model.remat": str.strip, "train.gather_once": lambda value: value == "True"}
    changes = {name: read_value.get(name, int)(value) for name, value in flags.items()}
    chosen = read(dense_7b, **changes)
    assert estimate(chosen, chosen.mesh, H200).memory == layouts[0].estimate.memory


def test_where_no_layout_fits_a_number_of_devices_or_rows_is_named():
    no_room = r"state takes 100\.4 GiB, and .* on top: set --devices to at least 7, or"
    with pytest.raises(ConfigError, match=no_room):
        find_layouts(read(dense_7b), 2, dataclasses.replace(H200, memory_bytes=16 * 2**30))
    with pytest.raises(ConfigError, match=r"batch_size=1024: set train\.batch_size to a mult.* 7,"):
        find_layouts(read(dense_7b), 7, H200)
    changed = read(dense_7b, **{"train.batch_size": 7, "train.accumulation": 1})
    assert find_layouts(changed, 7, H200)


def test_a_run_that_cannot_fit_is_refused_and_one_that_may_fit_is_not(monkeypatch):
    config = read(dense_tiny, **{"mesh.data": -1})
    needed = step_bytes(config, MeshConfig(data=8), "cpu").total
    device = types.SimpleNamespace(platform="cpu", device_kind="cpu")
    for name, value in (("local_devices", [device]), ("local_device_count", 8)):
        monkeypatch.setattr(plan_fit.jax, name, lambda value=value: value)
    monkeypatch.setattr(plan_fit.jax, "device_count", lambda: 8)
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda _: 8 * 0.95 * needed)
    plan_fit.check_fit(config)
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda _: 8 * 0.8 * needed)
    with pytest.raises(
        ConfigError, match=r"largest part is activations.*: set .*\(--force"
    ) as caught:
        plan_fit.check_fit(config)
    assert "\n" not in str(caught.value)


def test_a_measured_cpu_explains_its_own_step_and_is_no_bound():
    config, mesh = read(dense_tiny), MeshConfig(data=1)
    measured = {"matmul_flops_per_second": 2e11, "ratio_to_matmul": 0.5}
    chip = cpu_chip(config, measured)
    flops = 16 * 256 * run_training_flops(config)
    assert estimate(config, mesh, chip).step_seconds == pytest.approx(2 * flops / 2e11)
    wider = read(dense_tiny, **{"model.model_dim": 512, "model.feed_forward_dim": 1408})
    # A wider model has more FLOPs for each byte that it moves.
    assert 0.5 < estimate(wider, mesh, chip).mfu < 1


@pytest.mark.parametrize("name", ["cpu_benchmark_dense", "cpu_benchmark_dense_zen3"])
def test_a_cpu_that_was_measured_on_one_shape_predicts_another(name):
    """The measurements are those of docs/training.md: `dense_tiny`, and a model twice as wide."""
    measured = json.loads((BENCHMARKS / "cpu_dense_tiny.json").read_text())
    chip = cpu_chip(read(dense_tiny), measured)
    other = json.loads((BENCHMARKS / f"{name}.json").read_text())
    predicted = estimate(read(benchmark_dense), MeshConfig(data=1), chip)
    # Both speeds are parts of the matmul's rate in the same run, so the machines may differ.
    assert other["ratio_to_matmul"] / predicted.mfu == pytest.approx(1, abs=0.25)


def test_the_check_before_a_run_counts_pipelines_too(monkeypatch):
    config = read(moe_pipeline_tiny)
    needed = step_bytes(config, config.mesh.resolve(2), "cpu").total
    device = types.SimpleNamespace(platform="cpu", device_kind="cpu")
    for name, value in (("local_devices", [device]), ("local_device_count", 2)):
        monkeypatch.setattr(plan_fit.jax, name, lambda value=value: value)
    monkeypatch.setattr(plan_fit.jax, "device_count", lambda: 2)
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda _: 2 * 0.8 * needed)
    with pytest.raises(ConfigError, match=r"largest part is .* GiB: set .*\(--force"):
        plan_fit.check_fit(config)


@pytest.mark.slow
def test_an_estimate_of_the_largest_config_needs_no_jax_and_half_a_minute(tmp_path):
    text = f"""
import sys
from absl import flags
sys.argv = ["plan", "--estimate", "--config=configs/moe_671b.py", "--chip=v5p", "--devices=1024",
            "--page={tmp_path}/plan.html"]
import runpy
try:
    runpy.run_module("launch.plan", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("code", end.code, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("code 0 False\n"), done
    assert "1024 v5p as fsdp=16, expert=64" in done.stdout
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert layout_on(read(moe_671b), 1024, CHIPS["v5p"]).estimate.memory.total > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chip=h20", "--chip=h20 is no chip of the table: set it to h200"),
        ("--page=plan.html", "--page plans for a chip, and none is named: add --chip="),
        ("--chip=h200 --devices=3", "does not fit 3 devices: set sizes"),
        ("--chip=cpu --devices=2", "set --devices=1, and config.mesh to one device"),
        ("--chip=h200 --devices=3 --config.mesh.tensor=1", "set train.batch_size to a multiple"),
        ("--chip=h200 --devices=16 --page=no/x.html", "--page=no/x.html: no is no directory"),
        ("--estimate --chip=v5e --devices=1 --search", "set --devices to at least 7, or take"),
        ("--chip=v5p --devices=2 --config.mesh.tensor=1", "make no usual slice of v5p: set"),
    ],
)
def test_a_mistake_is_told_before_anything_is_printed(flags, message):
    command = [sys.executable, "-m", "launch.plan", "--config=configs/dense_7b.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def rows_of_the_page() -> dict[str, tuple[str, str]]:
    """Returns the rows of the page's table of counts: the cells by the first one."""
    page = (ROOT / "docs/scaling_laws/counting.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d,.]+)[^|]*\| ([\d,.]+)[^|]*\|$", page, re.MULTILINE)
    return {name: (dense, sparse) for name, dense, sparse in rows}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_page_on_counting_shows_what_its_commands_print(number):
    page = (ROOT / "docs/scaling_laws/counting.md").read_text().replace("\\\n", " ")
    command = re.findall(r"^python -m launch\.plan (.*--compile.*)$", page, re.MULTILINE)[number]
    words = [sys.executable, "-m", "launch.plan", *shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])\d[\d,]{5,}", done.stdout)]
    for name, cells in rows_of_the_page().items():
        shown = cells[number].replace(",", "")
        if name.startswith("XLA"):
            (compiled,) = re.findall(r"^compiled step: ([\d,]+) FLOPs", done.stdout, re.MULTILINE)
            found = float(compiled.replace(",", ""))
            assert float(shown) * 1e6 == pytest.approx(found, rel=1e-3)
        elif shown != "0":
            assert float(shown) in printed, name
