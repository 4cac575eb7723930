"""Tests launch.sweep: what it trains, skips and reports, with runs that only pretend to train."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import parquet

from launch import sweep, sweep_runs, sweep_table
from launch.compare import compare, group
from launch.fit.__main__ import output_directory
from launch.slurm.job import job_folder
from launch.sweep import describe, train
from launch.sweep_file import Planned, check_runs, distinct, jobs_of, plan, read_sweep
from launch.sweep_process import Slot
from launch.sweep_runs import Sweep, report_rows
from launch.sweep_table import COLUMNS, gather, read_result
from moe.config import ConfigError, OptimizerConfig
from moe.scaling.experiments.sweep import Point
from moe.storage import owner
from moe.storage.paths import RunPath
from moe.workdir.identity import ABOUT_FILE, write_config
from moe.workdir.tracking import read_metrics
from tests.launch.compared_runs import TINY, Rows

ROOT = Path(__file__).parents[2]
SWEEP = """
from moe.config import RunConfig
from moe.scaling.experiments.sweep import Point

def get_config():
    return RunConfig.config_dict()

def get_sweep():
    yield Point("one", {"seed": 1})
    yield Point("two", {"seed": 2, "train.steps": 100})
"""
# Logs a validation of the loss in its second argument, and exits with the code in its third.
PRETENDER = """
import json, pathlib, sys
directory, loss, code, steps = pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:])
lines = [{"step": 1, "train/loss": 3.0, "train/tokens_per_second": 256.0},
         {"step": int(steps), "validation/loss": loss}]
with (directory / "metrics.jsonl").open("w") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines[: 2 if code == 0 else 1])
with (directory / "output.log").open("a") as file:
    file.write("a line\\nerror: the last line\\n")
if code < 0:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""
# Says that it runs, and saves when it is asked to stop.
SAVING = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(flush=True)
signal.pause()
"""


class Pretender:
    """Stands for launch.train: what a run of each name does, and which runs were started."""

    def __init__(self, codes: dict[str, int]):
        self.codes, self.started = codes, []

    def start_run(
        self, arguments: Sequence[str], directory: RunPath, slot: Slot, *, shown: bool
    ) -> subprocess.Popen[bytes]:
        name = directory.name
        self.started.append(name)
        words = [str(directory), "1.25", str(self.codes.get(name, 0)), "4"]
        return subprocess.Popen([sys.executable, "-S", "-c", PRETENDER, *words])


@pytest.fixture
def pretender(monkeypatch: pytest.MonkeyPatch) -> Pretender:
    pretender = Pretender({})
    monkeypatch.setattr(sweep_runs, "start_run", pretender.start_run)
    monkeypatch.setattr(sweep_table, "open_split", lambda config, split: Rows())
    return pretender


def refuse(damaged: Path, workdir: Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run, of which one is damaged."""
    if workdir == damaged:
        raise ConfigError("metrics.jsonl is damaged")
    return read_metrics(workdir)


def planned_runs(*points: Point) -> list[Planned]:
    return plan("sweep.py", TINY, points, [])


def seeds(*names: str) -> list[Planned]:
    """Returns a run of each name with a seed of its own."""
    return planned_runs(*(Point(name, {"seed": seed}) for seed, name in enumerate(names)))


def test_a_sweep_trains_each_run_and_writes_a_table(tmp_path: Path, pretender: Pretender) -> None:
    assert train(seeds("a", "b"), tmp_path, 1) == 0
    assert pretender.started == ["a", "b"]
    rows = parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert list(rows[0]) == list(COLUMNS)
    assert [row["run"] for row in rows] == ["a", "b"] and rows[1]["seed"] == 1
    expected = {"status": "finished", "loss": 1.25, "steps": 4, "batch_tokens": 512, "tokens": 2048}
    # A pretender logs 256 tokens per second, and 640 tokens of text are read 3.2 times.
    expected |= {"step_seconds": 2.0, "repeats": 3.2, "experts": 1, "sparsity": 0.0}
    assert {name: rows[0][name] for name in expected} == expected
    assert "directory" not in json.loads(rows[0]["config"])["data"] and rows[0]["code"]
    with (tmp_path / "runs.csv").open() as file:
        (first, _) = csv.DictReader(file)
    assert first["loss"] == "1.25" and first["reason"] == "" and first["identity"]


@pytest.mark.parametrize("has_lock", [True, False])
def test_no_run_can_have_the_name_of_what_is_written_beside_it(
    tmp_path: Path, pretender: Pretender, monkeypatch: pytest.MonkeyPatch, has_lock: bool
) -> None:
    """The names are those that the commands write, not a list of this test."""
    # On a mount the sweep's process holds a lease, a folder that its end leaves there.
    monkeypatch.setattr(owner, "file_system", lambda path: "tmpfs" if has_lock else "nfs4")
    planned = planned_runs(Point("a/seed_0", {}), Point("b/seed_0", {"train.log_every": 2}))
    assert train(planned, tmp_path, 1) == 0
    compare(group(planned), tmp_path)
    fitted = SimpleNamespace(output=None, runs=str(tmp_path / "runs.csv"), law="clark")
    written = {path.name for path in tmp_path.iterdir()} - {"a", "b"}
    written |= {job_folder(str(tmp_path)).name, output_directory(fitted).name}  # pyright: ignore[reportArgumentType]
    assert len(written) >= 10
    for name in sorted(written):
        with pytest.raises(ConfigError, match=f"{name} cannot name a run's directory"):
            planned_runs(Point(name, {}))


def test_what_is_done_is_not_trained_again(tmp_path: Path, pretender: Pretender) -> None:
    pretender.codes = {"b": 3, "c": 1}
    assert train(seeds("a", "b", "c"), tmp_path, 1) == 1
    pretender.codes, pretender.started = {"b": 3}, []
    # A failed run is tried again. A diverged one would diverge again.
    assert train(seeds("a", "b", "c"), tmp_path, 1) == 3
    assert pretender.started == ["c"]
    # A result is found by content, under whatever name.
    pretender.started = []
    assert train(seeds("renamed"), tmp_path, 1) == 0 and pretender.started == []
    assert gather([seeds("renamed")[0].run], tmp_path)[0]["run"] == "renamed"


def test_equal_runs_are_trained_once(tmp_path: Path, pretender: Pretender) -> None:
    planned = planned_runs(Point("a", {"seed": 5}), Point("same", {"seed": 5}), Point("b", {}))
    assert train(planned, tmp_path, 1) == 0
    assert pretender.started == ["a", "b"]
    assert len(parquet.read_table(tmp_path / "runs.parquet")) == 2
    assert "same (the same as a)" in describe(planned, tmp_path, None)


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path: Path, pretender: Pretender) -> None:
    pretender.codes = {"a": 1, "b": -9, "c": 3}
    assert train(seeds("a", "b", "c", "d"), tmp_path, 2) == 1
    rows = gather([one.run for one in seeds("a", "b", "c", "d")], tmp_path)
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("failed", "error: the last line"),
        ("failed", "killed by SIGKILL, as if memory was full"),
        ("diverged", "error: the last line"),
        ("finished", None),
    ]
    text = report_rows(rows)
    assert text.splitlines()[0] == "4 runs: 2 failed, 1 diverged, 1 finished"
    assert "failed: a: error: the last line" in text


def test_an_interrupted_run_ends_the_sweep(tmp_path: Path, pretender: Pretender) -> None:
    """So it is before the time limit of a job, when every run would stop at once."""
    pretender.codes = {"a": 75}
    assert train(seeds("a", "b"), tmp_path, 1) == 75
    assert pretender.started == ["a"]
    rows = gather([one.run for one in seeds("a", "b")], tmp_path)
    assert [row["status"] for row in rows] == ["interrupted", "waiting"]


def test_a_fork_waits_for_its_trunk(tmp_path: Path, pretender: Pretender) -> None:
    points = [
        Point("fork", {"train.steps": 3}, "trunk", 2),
        Point("trunk", {}),
        Point("other", {"seed": 3}),
    ]
    planned = planned_runs(*points)
    assert [[one.name for one in job] for job in jobs_of(planned)] == [["trunk", "fork"], ["other"]]
    assert train(planned, tmp_path / "a", 1) == 0
    assert pretender.started == ["trunk", "fork", "other"]
    words = planned[0].arguments(tmp_path)
    assert words[-2:] == [f"--fork_from={tmp_path / 'trunk'}", "--fork_step=2"]
    pretender.codes, pretender.started = {"trunk": 3}, []
    assert train(planned, tmp_path / "b", 2) == 1
    assert set(pretender.started) == {"trunk", "other"}
    row = read_result(tmp_path / "b", planned[0].run)
    assert row and row["reason"] == "trunk, from which it starts, is diverged"


def test_one_job_has_the_exit_code_of_its_run(tmp_path: Path, pretender: Pretender) -> None:
    pretender.codes = {"a": 76}
    (job,) = jobs_of(seeds("a"))
    assert Sweep(job, tmp_path, 1, shown=True).train() == 76
    assert not (tmp_path / "runs.parquet").exists()  # an array would race on it


def test_another_version_of_the_code_is_said(
    tmp_path: Path,
    pretender: Pretender,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep_runs, "code_version", lambda: "old")
    train(seeds("a", "b"), tmp_path, 1)
    monkeypatch.setattr(sweep_runs, "code_version", lambda: "new")
    assert train(seeds("a", "b", "c"), tmp_path, 1) == 0
    errors = capsys.readouterr().err
    assert "2 of 3 runs are done already" in errors
    assert "2 of the runs that have begun did so with another version of the code (old)" in errors


def test_flags_make_the_config_of_a_run(tmp_path: Path) -> None:
    changes = {"optimizer.learning_rate": 1e-05, "model.scan_layers": False, "data.dataset": "x y"}
    (one,) = planned_runs(Point("a", changes))
    assert one.arguments(tmp_path) == [
        "--config=sweep.py",
        f"--workdir={tmp_path / 'a'}",
        "--config.model.scan_layers=False",
        "--config.data.dataset=x y",
        "--config.optimizer.learning_rate=1e-05",
    ]


def test_set_changes_every_run(tmp_path: Path) -> None:
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    planned = read_sweep(str(path), ["train.steps=7", "data.directory=/d", "seed=3"])
    assert [one.run.config.train.steps for one in planned] == [7, 7]
    assert planned[1].run.config.data.directory == "/d" and planned[1].run.same_as == "one"
    assert planned[0].base.train.steps == 1000


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("def get_sweep", "def sweep", "has no get_sweep(): write one, as the files"),
        ("def get_config", "def config", "has no get_config(): write one, as the files"),
        (
            "RunConfig.config_dict()",
            "{}",
            "get_config() returned {}: return RunConfig.config_dict()",
        ),
        ('"train.steps": 100', '"train.step": 100', "two: train.step=100 is not a field: did you"),
        ('"train.steps": 100', '"train.steps": 0', "two: train.steps=0 must be positive"),
        ('"two"', '"one"', "one names two runs"),
        ('"two"', '"runs.csv"', "runs.csv cannot name a run's directory, since launch.sweep"),
        ('"two"', '"results/x"', "results/x cannot name a run's directory, since launch.sweep"),
        ('"two"', '"fit_x"', "fit_x cannot name a run's directory, since launch.fit writes fit_x"),
        ('yield Point("one"', 'x = 1 / 0; yield Point("one"', "line 9: ZeroDivisionError"),
        ("Point", "Dot", "ImportError: cannot import name 'Dot'"),
        ("    yield", "    return []\n    yield", "get_sweep() yields no run"),
        ('Point("two"', '("two",); 1, ("x"', "get_sweep() yielded ('two',): yield Point"),
    ],
)
@pytest.mark.parametrize("changes", [[], ["train.eval_batches=3"]])
def test_a_mistake_in_a_sweep_gets_one_line(
    tmp_path: Path, before: str, after: str, message: str, changes: list[str]
) -> None:
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        read_sweep(str(path), changes)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("repeat([], 3)", "line 9: seeds=3 is one value, not several: set seeds to a list"),
        ("grid({'seed': 3})", "line 9: seed=3 is one value, not several: set seed to a list"),
        # These are computed once get_sweep has returned. So the line is where that begins.
        ("map(int, 'x')", "line 8: ValueError: invalid literal for int() with base 10: 'x'"),
        ("tuning_grid(RunConfig(), [], [])", "line 8: learning_rates=[]: set learning_rates to"),
    ],
)
def test_a_mistake_of_an_iterator_names_the_line_of_the_file(
    tmp_path: Path, result: str, message: str
) -> None:
    path = tmp_path / "sweep.py"
    head, _, _ = SWEEP.replace("import Point", "import *").partition("    yield")
    imported = "from moe.scaling.experiments.ladders import *"
    path.write_text(f"{imported}{head}    return {result}\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep(str(path), [])
    assert str(caught.value).startswith(f"{path}, {message}")


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (one,) = planned_runs(Point("a", {"train.log_every": 5}))
    (tmp_path / "a").mkdir()
    write_config(tmp_path / "a", TINY)
    with pytest.raises(ConfigError, match=r"a holds a run of another config .train.log_every is 1"):
        check_runs([one], tmp_path)


def test_none_cannot_take_the_place_of_a_value() -> None:
    """No flag of launch.train can say None."""
    base = dataclasses.replace(TINY, optimizer=OptimizerConfig(warmup_steps=2))
    with pytest.raises(ConfigError, match=r"s.py: a: optimizer.warmup_steps=None cannot take"):
        plan("s.py", base, [Point("a", {"optimizer.warmup_steps": None})], [])


def test_a_run_of_other_learning_rates_is_refused(tmp_path: Path) -> None:
    """A run by hand may go on with more steps. In a sweep it would be no planned run."""
    (one,) = planned_runs(Point("a", {"train.steps": 9}))
    (tmp_path / "a").mkdir()
    write_config(tmp_path / "a", TINY)
    check_runs([one], tmp_path)  # nothing is trained yet
    step = tmp_path / "a" / "checkpoints" / "2"
    step.mkdir(parents=True)
    (step / ABOUT_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"a has trained 2 steps with train.steps=4, at other"):
        check_runs([one], tmp_path)
    check_runs(planned_runs(Point("a", {})), tmp_path)


def test_damaged_metrics_fail_one_run(
    tmp_path: Path, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pretender writes its metrics anew, and those of a run would stay damaged.
    monkeypatch.setattr(sweep_table, "read_metrics", functools.partial(refuse, tmp_path / "a"))
    assert train(seeds("a", "b"), tmp_path, 1) == 1
    rows = gather([one.run for one in seeds("a", "b")], tmp_path)
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert rows[0]["reason"] == "metrics.jsonl is damaged"
    assert Sweep(seeds("a"), tmp_path, 1, shown=True).train() == 2


def test_an_error_lets_the_runs_save(
    tmp_path: Path, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start_run(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no room is left")
        process = subprocess.Popen([sys.executable, "-c", SAVING], stdout=subprocess.PIPE)
        assert process.stdout
        with process.stdout as output:
            output.readline()
        started.append(process)
        return process

    monkeypatch.setattr(sweep_runs, "start_run", start_run)
    with pytest.raises(OSError, match="no room is left"):
        train(seeds("a", "b"), tmp_path, 2)
    assert started[0].returncode == 75


@pytest.mark.parametrize(("restarts", "waits"), [("0", 0.0), ("1", 300.0)])
def test_a_sweep_that_is_started_again_waits_for_its_directory(
    tmp_path: Path,
    pretender: Pretender,
    monkeypatch: pytest.MonkeyPatch,
    restarts: str,
    waits: float,
) -> None:
    """The host of the start before may be slow to end it."""
    waited: list[float] = []

    def own(workdir: RunPath, seconds: float) -> contextlib.AbstractContextManager[None]:
        waited.append(seconds)
        return contextlib.nullcontext()

    monkeypatch.setattr(sweep, "own_run", own)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert train(seeds("a"), tmp_path, 1) == 0 and waited == [waits]


def test_ctrl_z_stops_the_runs_too(
    tmp_path: Path, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[int] = []

    def start_run(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTSTP)
        return pretender.start_run(*arguments, **options)

    monkeypatch.setattr(sweep_runs, "start_run", start_run)
    monkeypatch.setattr(sweep_runs, "pause", lambda processes: paused.append(len(processes)))
    assert train(seeds("a"), tmp_path, 1) == 0 and paused == [1]


def test_a_fork_of_a_diverged_run_is_not_restarted(tmp_path: Path, pretender: Pretender) -> None:
    planned = planned_runs(Point("trunk", {}), Point("fork", {"train.steps": 3}, "trunk", 2))
    pretender.codes = {"trunk": 3}
    assert [Sweep(planned, tmp_path, 1, shown=True).train() for _ in range(2)] == [3, 3]


def test_a_diverged_run_is_not_left(tmp_path: Path, pretender: Pretender) -> None:
    pretender.codes = {"a": 3}
    train(seeds("a"), tmp_path, 1)
    assert "0 finished; 0 FLOPs are left" in describe(seeds("a"), tmp_path, None)


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    (one,) = seeds("a")
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / f"{one.run.identity}.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not what was written: delete it"):
        read_result(tmp_path, one.run)


@pytest.mark.parametrize(
    "damage",
    [
        {"loss": "1.25"},
        {"loss": [1.25]},
        {"loss": True},
        {"steps": 1.5},
        {"steps": 2**63},
        {"flops": 2**64},
        {"status": 1},
        {"dataset": {}},
        {"another": 1},
        {"loss": 1.35},  # a digit that is another one
        {"sha256": "0"},
    ],
)
def test_a_result_with_other_values_is_refused(
    tmp_path: Path, pretender: Pretender, damage: dict[str, Any]
) -> None:
    (one,) = seeds("a")
    train([one], tmp_path, 1)
    path = tmp_path / "results" / f"{one.run.identity}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ConfigError, match="is not what was written: delete it"):
        read_result(tmp_path, one.run)


def test_a_result_of_another_version_is_read_if_it_means_the_same(
    tmp_path: Path, pretender: Pretender
) -> None:
    (one,) = seeds("a")
    train([one], tmp_path, 1)
    path = tmp_path / "results" / f"{one.run.identity}.json"
    row = json.loads(path.read_text())
    config = json.loads(row["config"])
    # That version had neither this column nor this field, and wrote no checksum.
    del row["sha256"], row["memory_bytes"], config["data"]["tokenizer"]
    path.write_text(json.dumps(row | {"config": json.dumps(config)}))
    found = read_result(tmp_path, one.run)
    assert found and found["memory_bytes"] is None and found["loss"] == 1.25
    # Its default was another one, and its config therefore says so.
    config["optimizer"]["beta2"] = 0.5
    path.write_text(json.dumps(row | {"config": json.dumps(config)}))
    with pytest.raises(ConfigError, match="another config, since a default has changed"):
        read_result(tmp_path, one.run)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.sweep", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_lists_the_runs_and_their_cost(tmp_path: Path) -> None:
    done = command(
        "--sweep=configs/sweeps/isoflop_tiny.py",
        f"--workdir={tmp_path / 'new'}",
        "--dry_run",
        "--flops_per_second=1e11",
    )
    assert done.returncode == 0, done.stderr
    _, *lines, totals = done.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines))) and len(lines) >= 20
    assert "hours at 1e+11 FLOP/s, from --flops_per_second" in totals
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=DIR"], "--sweep is missing: set --sweep=VALUE"),
        (["--sweep=nowhere.py", "--workdir=DIR"], "--sweep=nowhere.py: No such file or directory"),
        (["--sweep=SWEEP", "--workdir=DIR", "--index=2"], "--index=2 is no job of the sweep"),
        (["--sweep=SWEEP", "--workdir=DIR", "--set=steps"], "--set=steps sets nothing: write"),
        (["--sweep=SWEEP", "--workdir=DIR", "--jobs=0"], "--jobs"),
        (["--sweep=SWEEP", "--workdir=DIR", "--report_only"], "new holds no results of a sweep"),
        (
            ["--sweep=SWEEP", "--workdir=DIR", "--set=data.dataset=nothing"],
            "data.dataset='nothing'",
        ),
    ],
)
def test_bad_input_gets_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    words = [
        word.replace("SWEEP", str(path)).replace("DIR", str(tmp_path / "new")) for word in flags
    ]
    done = command(*words)
    assert done.returncode == 2 and message in done.stderr, done
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "new").exists()


def test_a_distinct_run_is_the_first_of_its_content() -> None:
    planned = planned_runs(Point("a", {}), Point("b", {"seed": 0}), Point("c", {"seed": 1}))
    assert [one.name for one in distinct(planned)] == ["a", "c"]


@pytest.mark.parametrize("path", ["launch/sweep.py", "docs/scaling_laws/sweeps.md"])
def test_the_arrays_of_the_examples_train_every_job(path: str) -> None:
    found = re.findall(
        r"--array=0-(\d+)%\d+ [^`]*?launch\.sweep --sweep=(\S+)", (ROOT / path).read_text()
    )
    assert found
    for last, file in found:
        assert int(last) == len(jobs_of(read_sweep(file, []))) - 1
