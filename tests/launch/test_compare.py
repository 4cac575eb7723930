"""Experiments: what a config file says of them, their runs (finished, interrupted, missing), and
the statistics of seeds.
"""

import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from launch.compare import Run, compare, mean_and_error, plan, read_experiment, result, table, train
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.scaling.flops import training_flops_per_token
from moe.training import trainer
from moe.workdir.identity import write_about, write_config
from moe.workdir.tracking import MetricWriter, read_metrics

ROOT = Path(__file__).parents[2]
TINY = RunConfig(
    model=ModelConfig(
        num_layers=1, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1, head_dim=8
    ),
    data=DataConfig(sequence_length=64),
    optimizer=OptimizerConfig(learning_rate=0.05, warmup_fraction=0.25),
    train=TrainConfig(
        steps=4, batch_size=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2
    ),
    tracking=TrackingConfig(tensorboard=False),
)
EXPERIMENT = """
from moe.config import RunConfig

SEEDS = (0, 7)
VARIANTS = {"dense": {}, "sparse": {"model.moe.num_experts": 4, "model.moe.expert_dim": 8}}

def get_config():
    return RunConfig.config_dict()
"""


def write_run(
    run: Run, losses: list[float], router: list[tuple[float, float]] = (), speeds: list[float] = ()
) -> Run:
    """A run directory as fit() leaves it: validation losses at the last steps, and the logged
    values of the steps from 1 on.
    """
    run.workdir.mkdir(parents=True)
    write_config(run.workdir, run.config)
    with MetricWriter(run.workdir, run.config.tracking, step=0) as writer:
        for step, speed in enumerate(speeds, start=1):
            writer.write(step, {"train/loss": 3.0, "train/tokens_per_second": speed})
        for step, (max_vio, dropped) in enumerate(router, start=1):
            writer.write(
                step,
                {
                    "train/loss": 3.0,
                    "router/worst_max_vio": max_vio,
                    "router/dropped_fraction": dropped,
                },
            )
        for step, loss in enumerate(losses, start=1):
            writer.write(step, {"validation/loss": loss})
    finish(run)
    return run


def finish(run: Run) -> None:
    """Leaves what marks the last checkpoint as complete."""
    path = run.workdir / "checkpoints" / str(run.config.train.steps)
    path.mkdir(parents=True)
    write_about(path, {"step": run.config.train.steps})


def experiment(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_mean_and_standard_error() -> None:
    # Squared distances from 4 sum to 8; over n - 1 = 2 that is 4, whose root over the root of 3 is
    # the error.
    mean, error = mean_and_error([2.0, 4.0, 6.0])
    assert (mean, error) == (4.0, pytest.approx(2 / 3**0.5, rel=1e-12))
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0, rel=1e-12))
    assert mean_and_error([1.5]) == (1.5, None)


def test_a_variant_is_summed_up_over_its_finished_seeds(tmp_path: Path) -> None:
    runs = [
        write_run(
            Run("v", TINY, tmp_path / "0"),
            [9.0, 1.0],
            router=[(50.0, 0.5)] + [(1.0, 0.0)] * 10,
            speeds=[10.0, 90.0],
        ),
        write_run(
            Run("v", dataclasses.replace(TINY, seed=3), tmp_path / "3"),
            [3.0],
            router=[(2.0, 0.1)] * 10,
            speeds=[30.0],
        ),
        Run("v", dataclasses.replace(TINY, seed=4), tmp_path / "4"),
    ]
    values = result(runs)
    assert values["validation_loss"] == {
        "mean": 2.0,
        "standard_error": pytest.approx(1.0),
        "of_seeds": {0: 1.0, 3: 3.0},
    }
    assert values["worst_max_vio"] == pytest.approx(
        1.5
    )  # the last ten logged steps: the first step's 50 is not among them
    assert values["dropped_fraction"] == pytest.approx(0.05)
    assert values["tokens_per_second"] == 30.0


def test_the_table_has_a_dash_where_nothing_is_known(tmp_path: Path) -> None:
    sparse = dataclasses.replace(
        TINY.model, moe=MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8)
    )
    results = {
        "dense": result([write_run(Run("dense", TINY, tmp_path / "0"), [1.25], speeds=[12345.6])]),
        "sparse": result([Run("sparse", dataclasses.replace(TINY, model=sparse), tmp_path / "1")]),
        "both": {
            "active_parameters": 1000,
            "total_parameters": 20000,
            "training_flops_per_token": 3e6,
            "validation_loss": {
                "mean": 1.5,
                "standard_error": 0.01234,
                "of_seeds": {0: 1.48766, 1: 1.51234},
            },
            "worst_max_vio": 0.123,
            "dropped_fraction": 0.0456,
            "tokens_per_second": 1e3,
        },
    }
    lines = table(results).splitlines()
    assert lines[0] == (
        "| variant | active parameters | total parameters | training FLOPs per token | validation loss (nats per token) | seeds "
        "| worst MaxVio | dropped | tokens/s |"
    )
    # Embeddings 2 x 256 x 16, attention 16 x (2 + 2) x 8 + 2 x 8 x 16, feed-forward 3 x 16 x 24,
    # three norms of 16; no router.
    assert lines[2].startswith("| dense | 10,160 | 10,160 | ") and lines[2].endswith(
        " | 1.2500 | 1 | – | – | 12,346 |"
    )
    # Four experts of 3 x 16 x 8, two of them active, and a router of 16 x 4.
    assert lines[3].startswith("| sparse | 9,840 | 10,608 | ") and lines[3].endswith(
        " | – | 0 | – | – | – |"
    )
    assert (
        lines[4]
        == "| both | 1,000 | 20,000 | 3,000,000 | 1.5000 ± 0.0123 | 2 | 0.12 | 4.6% | 1,000 |"
    )


def test_variants_are_the_base_with_their_fields_set(tmp_path: Path) -> None:
    base = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=9))
    variants, seeds = read_experiment(experiment(tmp_path / "e.py", EXPERIMENT), base)
    assert list(variants) == ["dense", "sparse"] and seeds == (0, 7)
    assert variants["dense"] == base
    assert (
        variants["sparse"].model.moe == MoEConfig(num_experts=4, expert_dim=8)
        and variants["sparse"].train.steps == 9
    )
    runs = plan(variants, seeds, tmp_path)
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
def test_a_mistake_in_an_experiment_is_told_in_one_line(
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
        plan({"dense": TINY}, (1, 1), tmp_path)
    with pytest.raises(ConfigError, match=r"seed=-1 is out of range"):
        plan({"dense": TINY}, (-1,), tmp_path)
    write_run(plan({"dense": TINY}, (0,), tmp_path)[0], [1.0])
    with pytest.raises(
        ConfigError,
        match=r"dense/seed_0 holds a run of another config \(train.log_every is 1 there and 5 here\)",
    ):
        plan(
            {
                "dense": dataclasses.replace(
                    TINY, train=dataclasses.replace(TINY.train, log_every=5)
                )
            },
            (0,),
            tmp_path,
        )


def test_a_comparison_needs_a_run_that_has_begun(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="holds none of the experiment's runs: leave out --report_only"
    ):
        compare(plan({"dense": TINY}, (0,), tmp_path), tmp_path)


def test_the_variants_of_moe_vs_dense_spend_the_same_flops_but_for_the_router() -> None:
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


def test_what_is_unfinished_is_trained_and_a_diverged_run_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan({"one": TINY, "two": TINY}, (0, 7), tmp_path)
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


def test_what_there_is_of_an_experiment_is_written_and_drawn(tmp_path: Path) -> None:
    runs = plan({"one": TINY, "two": TINY, "three": TINY}, (0, 7), tmp_path)
    write_run(runs[0], [2.0], speeds=[10.0, 20.0])
    write_run(runs[3], [4.0], speeds=[10.0])
    write_run(runs[1], [], speeds=[10.0])
    (
        runs[1].workdir / "checkpoints" / "4" / "about.json"
    ).unlink()  # killed while it saved, and not finished
    text = compare(runs, tmp_path)
    assert [line.split(" | ")[4:6] for line in text.splitlines()[2:]] == [
        ["3.0000 ± 1.0000", "2"],
        ["–", "0"],
        ["–", "0"],
    ]
    written = (tmp_path / "comparison.md").read_text()
    assert written.startswith(text) and written.endswith(
        "![Losses by variant, and over steps](comparison.png)\n"
    )
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["one"]["validation_loss"] == {
        "mean": 3.0,
        "standard_error": 1.0,
        "of_seeds": {"0": 2.0, "7": 4.0},
    }
    assert values["three"]["validation_loss"] == {
        "mean": None,
        "standard_error": None,
        "of_seeds": {},
    }
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size == (1650, 600)
        colours = {
            "#" + bytes(pixel[:3]).hex() for _, pixel in image.convert("RGB").getcolors(2**24)
        }
    assert "#1f77b4" in colours and "#2ca02c" not in colours  # nothing of the third has begun


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


def test_a_run_whose_loss_is_not_finite_is_no_result(tmp_path: Path) -> None:
    """It came to its end, and is not trained again; the comparison is of the others, and its JSON
    has no NaN.
    """
    runs = plan({"dense": TINY}, (0, 1), tmp_path)
    for run, loss in zip(runs, (math.nan, 2.0), strict=True):
        finish(run)
        lines = [
            {"step": 4, "train/loss": 2.5, "train/skipped_steps": 0.0},
            {"step": 4, "validation/loss": loss},
        ]
        (run.workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line).replace("NaN", '"NaN"') + "\n" for line in lines)
        )
    assert [(run.finished, run.diverged) for run in runs] == [(True, True), (True, False)]
    compare(runs, tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert results["dense"]["validation_loss"] == {
        "mean": 2.0,
        "standard_error": None,
        "of_seeds": {"1": 2.0},
    }
