"""Experiments: their config files, and the order, the interruption and the end of their runs."""

import dataclasses
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.compare import (
    plan_runs,
    read_experiment,
    train,
)
from moe.config import (
    ConfigError,
    MoEConfig,
    RunConfig,
)
from moe.scaling.flops import training_flops_per_token
from moe.training import trainer
from moe.workdir.tracking import read_metrics
from tests.launch.compared_runs import TINY, write_run

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
from moe.config import RunConfig

SEEDS = (0, 7)
VARIANTS = {"dense": {}, "sparse": {"model.moe.num_experts": 4, "model.moe.expert_dim": 8}}

def get_config():
    return RunConfig.config_dict()
"""


def experiment(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_variants_are_the_base_with_their_fields_set(tmp_path: Path) -> None:
    base = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=9))
    variants, seeds = read_experiment(experiment(tmp_path / "e.py", EXPERIMENT), base)
    assert list(variants) == ["dense", "sparse"] and seeds == (0, 7)
    assert variants["dense"] == base
    assert (
        variants["sparse"].model.moe == MoEConfig(num_experts=4, expert_dim=8)
        and variants["sparse"].train.steps == 9
    )
    runs = plan_runs(variants, seeds, tmp_path)
    assert [str(run.workdir.relative_to(tmp_path)) for run in runs] == [
        "dense/seed_0",
        "sparse/seed_0",
        "dense/seed_7",
        "sparse/seed_7",
    ]
    assert [run.config.seed for run in runs] == [0, 0, 7, 7]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "moe.num_experts",
            "moe.num_expert",
            r"VARIANTS\['sparse'\] of .*: model.moe.num_expert=4 is not a field: did you mean model",
        ),
        (
            "moe.num_experts",
            "moee.num_experts",
            r"model.moee={'num_experts': 4} is not a field: did you mean model.moe\?",
        ),
        (
            "moe.num_experts",
            "num_layers.x",
            r"model.num_layers={'x': 4} has type dict: set num_layers to a value of type int",
        ),
        ('num_experts": 4', 'num_experts": "4"', r"model.moe.num_experts='4' has type str"),
        ("SEEDS", "SEED", r"e.py has no SEEDS: set --config to an experiment"),
        ("VARIANTS", "VARIANT", r"e.py has no VARIANTS: set --config to an experiment"),
    ],
)
def test_a_mistake_in_an_experiment_gets_one_line(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_experiment(experiment(tmp_path / "e.py", EXPERIMENT.replace(before, after)), TINY)
    assert "\n" not in str(caught.value)


def test_one_variant_cannot_be_compared() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--config=e.py:wide names one variant, and all are compared: set --config to e.py$",
    ):
        read_experiment("e.py:wide", TINY)


def test_seeds_are_distinct_and_runs_of_the_same_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SEEDS=\(1, 1\) has a seed twice"):
        plan_runs({"dense": TINY}, (1, 1), tmp_path)
    with pytest.raises(ConfigError, match=r"seed=-1 is out of range"):
        plan_runs({"dense": TINY}, (-1,), tmp_path)
    write_run(plan_runs({"dense": TINY}, (0,), tmp_path)[0], [1.0])
    difference = r"\(train.log_every is 1 there and 5 here\)"
    with pytest.raises(
        ConfigError, match=f"dense/seed_0 holds a run of another config {difference}"
    ):
        plan_runs(
            {
                "dense": dataclasses.replace(
                    TINY, train=dataclasses.replace(TINY.train, log_every=5)
                )
            },
            (0,),
            tmp_path,
        )


def test_the_variants_of_moe_vs_dense_have_the_same_flops_apart_from_the_router() -> None:
    module = importlib.import_module("configs.experiments.moe_vs_dense")
    configs = {
        variant: RunConfig.from_config_dict(module.get_config(variant))
        for variant in module.VARIANTS
    }
    variants, seeds = read_experiment(
        str(ROOT / "configs" / "experiments" / "moe_vs_dense.py"), configs["dense"]
    )
    assert variants == configs and seeds == (
        0,
        1,
        2,
    )  # what launch.train makes of FILE:VARIANT is what is compared
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


def test_unfinished_runs_are_trained_and_the_next_one_follows_a_diverged_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan_runs({"one": TINY, "two": TINY}, (0, 7), tmp_path)
    write_run(runs[1], [1.0])
    trained = []

    def fit(config: RunConfig, workdir: Path) -> None:
        trained.append((config.seed, workdir))
        if len(trained) == 2:
            raise trainer.Diverged("step 3: no loss")

    monkeypatch.setattr(trainer, "fit", fit)
    train(runs)
    assert trained == [
        (0, tmp_path / "one/seed_0"),
        (7, tmp_path / "one/seed_7"),
        (7, tmp_path / "two/seed_7"),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == f"run 2 of 4: {tmp_path}/one/seed_0"
    )  # one is finished before anything begins
    assert lines[1] == f"run 3 of 4, about 00:00 left: {tmp_path}/one/seed_7"
    assert lines[2] == f"diverged: {tmp_path}/one/seed_7: step 3: no loss"
    assert lines[3] == f"run 4 of 4, about 00:00 left: {tmp_path}/two/seed_7"


def start(workdir: Path) -> subprocess.Popen[str]:
    """The command, on an experiment of four runs of 20 steps each."""
    groups = {
        "model": TINY.model,
        "data": TINY.data,
        "optimizer": TINY.optimizer,
        "train": TINY.train,
    }
    values = {
        f"{group}.{name}": value
        for group, fields in groups.items()
        for name, value in dataclasses.asdict(fields).items()
    }
    values |= {"train.steps": 20, "data.directory": workdir / "data"}
    command = [
        sys.executable,
        "-m",
        "launch.compare",
        f"--config={experiment(workdir / 'e.py', EXPERIMENT)}",
        f"--workdir={workdir}",
    ]
    command += [
        f"--config.{name}={value}"
        for name, value in values.items()
        if not name.startswith(("model.moe", "model.attention"))
    ]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # five programs are compiled
def test_an_interrupted_experiment_goes_on(tmp_path: Path) -> None:
    process, deadline = start(tmp_path), time.monotonic() + 400
    path = tmp_path / "sparse" / "seed_0" / "metrics.jsonl"
    while not (path.exists() and '"step": 3,' in path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert (
        process.returncode == 75
        and "run the same command again to go on" in errors.splitlines()[-1]
    ), errors
    assert read_metrics(path.parent)[-1]["step"] < 20

    process = start(tmp_path)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1].startswith("| sparse | ") and " | 2 | " in output
    assert f"run 2 of 4: {path.parent}\n" in errors and "run 1 of 4" not in errors
    assert (
        len((path.parent / "environment.jsonl").read_text().splitlines()) == 2
    )  # two starts, of which the second resumed
