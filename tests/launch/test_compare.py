"""What `launch.compare` makes of an experiment: its variants, its tables, and its figures."""

import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from launch import sweep_table
from launch.compare import compare, group, read_planned
from launch.sweep_file import Planned, plan, read_sweep
from moe.config import ConfigError, MoEConfig, RunConfig
from moe.scaling.experiments.sweep import Point, repeat
from moe.scaling.flops import training_flops_per_token
from moe.workdir.tracking import read_metrics
from tests.jobs import let_it_stop, wait_for_step
from tests.launch.compared_runs import TINY, Rows, write_run
from tests.launch.report_runs import colours

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
import dataclasses

from ml_collections import ConfigDict

from moe.scaling.experiments.sweep import Point, repeat
from tests.launch.compared_runs import TINY

def get_config():
    return ConfigDict(TINY.to_dict())

def get_sweep():
    points = [Point("dense", {}), Point("sparse", {"model.moe.num_experts": 4})]
    return repeat(points, (0, 7))
"""


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_table, "open_split", lambda config, split: Rows())


def plan_runs(variants: list[str], seeds: tuple[int, ...]) -> list[Planned]:
    """Returns the runs of variants that differ in the steps between two log lines."""
    points = [Point(name, {"train.log_every": 1 + n}) for n, name in enumerate(variants)]
    return plan("e.py", TINY, repeat(points, seeds), [])


def named(planned: list[Planned], name: str) -> Planned:
    (one,) = (one for one in planned if one.name == name)
    return one


def test_an_experiment_is_a_sweep_of_variants_and_seeds(tmp_path: Path) -> None:
    path = tmp_path / "e.py"
    path.write_text(EXPERIMENT)
    planned = read_sweep(str(path), ["train.steps=9"])
    assert [one.name for one in planned] == [
        "dense/seed_0",
        "sparse/seed_0",
        "dense/seed_7",
        "sparse/seed_7",
    ]
    variants = group(planned)
    assert {name: [one.run.config.seed for one in runs] for name, runs in variants.items()} == {
        "dense": [0, 7],
        "sparse": [0, 7],
    }
    train = dataclasses.replace(TINY.train, steps=9)
    assert variants["dense"][0].run.config == dataclasses.replace(TINY, train=train)
    assert variants["sparse"][1].run.config.model.moe == MoEConfig(num_experts=4)


def test_config_files_are_variants(tmp_path: Path) -> None:
    for name, steps in (("short", 5), ("long", 9)):
        text = EXPERIMENT.replace(
            "TINY.to_dict()", f"TINY.to_dict() | {{'train': {{'steps': {steps}}}}}"
        )
        (tmp_path / f"{name}.py").write_text(text)
    files = [str(tmp_path / f"{name}.py") for name in ("short", "long")]
    values = SimpleNamespace(sweep=None, configs=files, seeds=["3", "4"], set=[])
    variants = group(read_planned(values))  # pyright: ignore[reportArgumentType]
    assert [one.run.config.train.steps for one in variants["long"]] == [9, 9]
    names = [one.name for one in read_planned(values)]  # pyright: ignore[reportArgumentType]
    assert names == ["short/seed_3", "long/seed_3", "short/seed_4", "long/seed_4"]
    assert variants["long"][0].arguments(tmp_path)[0] == f"--config={files[1]}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "set one of them, to a sweep or to files"),
        ({"sweep": "a.py", "configs": ["b.py"]}, "set one of them, to a sweep or to files"),
        ({"configs": ["b.py"], "seeds": ["x"]}, "--seeds=x: write one or more different numbers"),
        ({"configs": ["b.py"], "seeds": []}, "--seeds=: write one or more different numbers, as"),
        ({"configs": ["b.py"], "seeds": ["0", "0"]}, "--seeds=0,0: write one or more different"),
        ({"configs": ["b.py"], "set": ["seed=5"]}, "--set=seed gives all runs of a variant one"),
        ({"configs": ["nowhere.py"]}, "--configs=nowhere.py: No such file or directory"),
        ({"configs": ["configs/dense_tiny.py"]}, "has one variant, dense_tiny: compare two"),
        (
            {"configs": ["configs/dense_tiny.py"] * 2},
            "has two files of one name, and the names are those of the variants",
        ),
    ],
)
def test_bad_flags_get_one_line(
    flags: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    values = SimpleNamespace(**{"sweep": None, "configs": None, "seeds": ["0"], "set": []} | flags)
    with pytest.raises(ConfigError, match=message) as caught:
        group(read_planned(values))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_the_variants_of_moe_vs_dense_have_the_same_flops_apart_from_the_router() -> None:
    module = importlib.import_module("configs.experiments.moe_vs_dense")
    configs = {
        variant: RunConfig.from_config_dict(module.get_config(variant))
        for variant in module.VARIANTS
    }
    path = ROOT / "configs" / "experiments" / "moe_vs_dense.py"
    variants = group(read_sweep(str(path), []))
    # What launch.train makes of FILE:VARIANT is what is compared.
    assert {name: runs[0].run.config for name, runs in variants.items()} == configs
    assert [one.run.config.seed for one in variants["dense"]] == [0, 1, 2]
    assert list(configs) == [
        "dense",
        "moe_8_top1",
        "moe_32_top4",
        "unbalanced",
        "loss_free",
        "capacity_1",
    ]
    flops = {
        variant: training_flops_per_token(config.model, 256) for variant, config in configs.items()
    }
    # A router of D x E in each of two layers: 2 FLOPs per weight forward, and twice that backward.
    routers = {
        variant: 6 * 2 * 64 * config.model.moe.num_experts for variant, config in configs.items()
    }
    assert (
        routers["dense"] == 0 and routers["moe_8_top1"] == 6_144 and routers["capacity_1"] == 24_576
    )
    assert {variant: flops[variant] - routers[variant] for variant in flops} == dict.fromkeys(
        flops, 1_032_960
    )


def test_a_comparison_needs_a_run_that_has_begun(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="holds none of the experiment's runs: leave out --report_only"
    ):
        compare(group(plan_runs(["a", "b"], (0,))), tmp_path)


def test_an_unfinished_experiment_is_written_and_drawn(tmp_path: Path) -> None:
    planned = plan_runs(["one", "two", "three"], (0, 7))
    write_run(named(planned, "one/seed_0"), tmp_path, [2.0], speeds=[10.0, 20.0])
    write_run(named(planned, "one/seed_7"), tmp_path, [4.0], speeds=[10.0])
    write_run(named(planned, "two/seed_0"), tmp_path, [], speeds=[10.0], status="interrupted")
    text = compare(group(planned), tmp_path)
    assert [line.split(" | ")[4:6] for line in text.splitlines()[2:5]] == [
        ["3.0000 ± 1.0000", "2"],
        ["–", "0"],
        ["–", "0"],
    ]
    written = (tmp_path / "comparison.md").read_text()
    assert written.startswith(text) and "![Losses by variant, and over steps](" in written
    values = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert values["variants"]["one"]["loss"] == {
        "mean": 3.0,
        "standard_error": 1.0,
        "of_seeds": {"0": 2.0, "7": 4.0},
    }
    assert values["differences"] == {"two": None, "three": None}
    assert values["pareto_fronts"]["flops"] == ["one"]
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size == (1650, 600)
    seen = colours(tmp_path / "comparison.png")
    assert "#0072b2" in seen and "#009e73" not in seen  # the third variant has not begun
    assert (tmp_path / "fronts.png").exists()
    for name in ("comparison.pdf", "fronts.pdf"):
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")


def test_a_run_that_diverged_is_left_out(tmp_path: Path) -> None:
    planned = plan_runs(["one", "two"], (0, 1))
    for name, loss in (("one/seed_0", 2.0), ("two/seed_0", 2.5), ("one/seed_1", 2.25)):
        write_run(named(planned, name), tmp_path, [loss])
    write_run(named(planned, "two/seed_1"), tmp_path, [math.nan], status="diverged")
    compare(group(planned), tmp_path)
    values = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert values["variants"]["two"]["loss"]["of_seeds"] == {"0": 2.5}
    assert values["differences"]["two"]["mean"] == 0.5
    assert values["differences"]["two"]["num_seeds"] == 1


def test_a_run_that_lost_its_metrics_is_left_out(tmp_path: Path) -> None:
    planned = plan_runs(["a", "b"], (0, 1))
    for one in planned:
        write_run(one, tmp_path, [4.0])
    lost = named(planned, "a/seed_1")
    (tmp_path / lost.name / "metrics.jsonl").unlink()
    sweep_table.write_result(lost.run, tmp_path, "finished", "a version", None)
    assert "| a |" in compare(group(planned), tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert list(results["variants"]["a"]["loss"]["of_seeds"]) == ["0"]


def test_equal_variants_are_compared_though_one_is_trained(tmp_path: Path) -> None:
    points = repeat([Point("a", {}), Point("same", {}), Point("b", {"train.steps": 5})], (0,))
    planned = plan("e.py", TINY, points, [])
    for one, loss in ((planned[0], 1.0), (planned[2], 1.5)):
        write_run(one, tmp_path, [loss], speeds=[8.0])
    compare(group(planned), tmp_path)
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["differences"]["same"]["mean"] == 0.0
    assert values["variants"]["same"]["loss"] == values["variants"]["a"]["loss"]


# A sparse run waits in step 10 until the file is there.
GATED = """
import os, time
from moe.training.log import Log
add = Log.add

def wait_and_add(log, step, metrics):
    while step == 10 and log._config.model.moe.num_experts and not os.path.exists("{file}"):
        time.sleep(0.01)
    add(log, step, metrics)

Log.add = wait_and_add
"""


def start(workdir: Path) -> subprocess.Popen[str]:
    """The command, on an experiment of four runs of 20 steps each."""
    path = workdir / "e.py"
    path.write_text(EXPERIMENT + GATED.format(file=workdir / "open"))
    words = [f"--sweep={path}", f"--workdir={workdir}", f"--set=data.directory={workdir / 'data'}"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.compare", *words, "--set=train.steps=20"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes start JAX and compile
def test_an_interrupted_experiment_goes_on(tmp_path: Path) -> None:
    process, run = start(tmp_path), tmp_path / "sparse" / "seed_0"
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    let_it_stop(process, run, tmp_path / "open")
    _, errors = process.communicate()
    assert process.returncode == 75 and "stopping: each run saves first" in errors, errors
    assert read_metrics(run)[-1]["step"] < 20

    process = start(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "| sparse | " in output and " | 2 | " in output
    assert "1 of 4 runs are done already" in errors
    # It was started twice, and resumed the second time.
    assert len((run / "environment.jsonl").read_text().splitlines()) == 2
