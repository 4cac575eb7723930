"""Tests what a run writes about itself, above all after kills and with damaged files."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe.config import ConfigError, RunConfig, TrackingConfig
from moe.workdir import identity, tensorboard, tracking
from moe.workdir.tracking import MetricWriter, read_metrics, read_router, write_environment

NO_COPIES = TrackingConfig(tensorboard=False)
LINES = (
    '{"step": 10, "train/loss": 2.5, "train/skipped_steps": 0.0}\n'
    '{"step": 20, "train/loss": 1.5, "train/skipped_steps": 3.0}\n'
    '{"step": 20, "validation/loss": 1.75}\n'
)


def write_lines(workdir: Path, step: int = 0) -> None:
    with MetricWriter(workdir, NO_COPIES, step) as writer:
        writer.write(10, {"train/loss": np.float32(2.5), "train/skipped_steps": 0})
        writer.write(20, {"train/loss": jnp.bfloat16(1.5), "train/skipped_steps": jnp.int32(3)})
        writer.write(20, {"validation/loss": 1.75})


def test_a_line_holds_the_metrics_of_a_step_as_soon_as_write_returns(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, NO_COPIES, step=0) as writer:
        writer.write(10, {"train/loss": 2.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10, "train/loss": 2.5}\n'


def test_python_numpy_and_jax_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    write_lines(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == LINES


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, NO_COPIES, step=0) as writer:
        writer.write(1, {"a": jnp.nan, "b": np.float32(np.inf), "c": -jnp.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}\n'
    (line,) = read_metrics(tmp_path)
    assert np.isnan(line["a"]) and line["b"] == np.inf and line["c"] == -np.inf


def test_steps_are_read_as_integers_and_values_as_floats(tmp_path: Path) -> None:
    write_lines(tmp_path)
    metrics = read_metrics(tmp_path)
    assert metrics[1:] == [
        {"step": 20, "train/loss": 1.5, "train/skipped_steps": 3.0},
        {"step": 20, "validation/loss": 1.75},
    ]
    assert [type(value) for value in metrics[1].values()] == [int, float, float]


@pytest.mark.parametrize("interrupted_at", [10, 20])
def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path: Path, interrupted_at: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        LINES + '{"step": 30, "train/loss": 9.0}\n{"step": 40, "trai'
    )
    with MetricWriter(tmp_path, NO_COPIES, step=interrupted_at) as writer:
        if interrupted_at == 10:
            writer.write(20, {"train/loss": 1.5, "train/skipped_steps": 3})
            writer.write(20, {"validation/loss": 1.75})
        writer.write(30, {"train/loss": 1.25})
    assert (tmp_path / "metrics.jsonl").read_text() == LINES + '{"step": 30, "train/loss": 1.25}\n'


LAYERS = (
    '{"step": 10, "load": [[0.33333, 0.66667], [0.0, 1.0]], "max_vio": [0.33333, 1.0]}\n'
    '{"step": 20, "load": [[0.5, 0.5], [0.25, 0.75]], "max_vio": ["NaN", 0.0012346]}\n'
)


def write_layers(workdir: Path, step: int = 0) -> None:
    loads = {10: [[1 / 3, 2 / 3], [0, 1]], 20: [[0.5, 0.5], [0.25, 0.75]]}
    max_vio = {10: [1 / 3, 1], 20: [np.nan, 0.00123456]}
    with MetricWriter(workdir, NO_COPIES, step) as writer:
        for line_step in loads:
            if line_step > step:
                layers = {"load": loads[line_step], "max_vio": max_vio[line_step]}
                arrays = {name: np.float32(values) for name, values in layers.items()}
                writer.write(line_step, {"train/loss": 2.5}, arrays)
        writer.write(20, {"validation/loss": 1.75})


def test_arrays_over_layers_stand_in_a_file_of_their_own_to_five_digits(tmp_path: Path) -> None:
    write_layers(tmp_path)
    assert (tmp_path / "router.jsonl").read_text() == LAYERS
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 20]
    (_, first), (step, second) = read_router(tmp_path)
    np.testing.assert_array_equal(first["load"], np.float32([[0.33333, 0.66667], [0, 1]]))
    np.testing.assert_array_equal(second["max_vio"], np.float32([np.nan, 0.0012346]))
    assert (step, second["load"].shape) == (20, (2, 2))


@pytest.mark.parametrize("interrupted_at", [0, 10, 20])
def test_a_resumed_runs_router_file_reads_like_an_uninterrupted_ones(
    tmp_path: Path, interrupted_at: int
) -> None:
    (tmp_path / "router.jsonl").write_text(
        LAYERS + '{"step": 30, "load": [[1.0, 0.0], [1.0, 0.0]]}\n{"step": 40, "load": [[0.'
    )
    write_layers(tmp_path, interrupted_at)
    assert (tmp_path / "router.jsonl").read_text() == LAYERS


def test_a_run_without_sparse_layers_has_no_router_file(tmp_path: Path) -> None:
    write_lines(tmp_path)
    assert not (tmp_path / "router.jsonl").exists() and list(read_router(tmp_path)) == []


def test_a_damaged_line_of_the_router_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "router.jsonl").write_text('{"step": 10, "load": [[0.5, null]]}\n' + LAYERS)
    with pytest.raises(
        ConfigError,
        match=r"router.jsonl, line 1 is not a JSON object of a step and numbers: delete that line",
    ):
        list(read_router(tmp_path))


def test_a_file_cut_anywhere_keeps_every_whole_line(tmp_path: Path) -> None:
    # A line is whole once its closing brace is there.
    ends = [position for position, letter in enumerate(LINES) if letter == "}"]
    for length in range(len(LINES) + 1):
        (tmp_path / "metrics.jsonl").write_text(LINES[:length])
        whole = sum(end < length for end in ends)
        assert len(read_metrics(tmp_path)) == whole
        MetricWriter(tmp_path, NO_COPIES, step=20).close()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(
            LINES.splitlines(keepends=True)[:whole]
        )


def test_a_kill_while_later_lines_are_dropped_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path)

    def killed(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(os, "replace", killed)
        MetricWriter(tmp_path, NO_COPIES, step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == LINES
    MetricWriter(tmp_path, NO_COPIES, step=10).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [10]


def test_kill_9_loses_no_step_before_the_last(tmp_path: Path) -> None:
    program = """
import itertools, pathlib, sys
from moe.config import TrackingConfig
from moe.workdir.tracking import MetricWriter
writer = MetricWriter(pathlib.Path(sys.argv[1]), TrackingConfig(tensorboard=False), 0)
for step in itertools.count(1):
    writer.write(step, {"train/loss": 1 / step})
"""
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2]
    ) as process:
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert len(steps) > 1000 and steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    "damage",
    [
        "{oops}",
        "3",
        '{"train/loss": 1.0}',
        '{"step": 15, "train/loss": null}',
        '{"step": 15, "train/loss": "1',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    first, rest = LINES.split("\n", 1)
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{damage}\n{rest}")
    with pytest.raises(
        ConfigError,
        match=r"metrics.jsonl, line 2 is not a JSON object of a step and numbers: delete that line",
    ):
        read_metrics(tmp_path)


def test_no_metrics_yet_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl"):
        read_metrics(tmp_path)


def events(path: Path) -> list[Event]:
    """Returns the events in a TensorBoard file.

    Each record is a length (8 bytes), a checksum (4), the event, and a checksum (4).
    """
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        found.append(Event.FromString(data[position + 12 : position + 12 + length]))
        position += 16 + length
    return found


def test_tensorboard_gets_the_same_values_and_purges_later_steps(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, TrackingConfig(tensorboard=True), step=20) as writer:
        writer.write(30, {"train/loss": 1.5, "validation/loss": 1.75})
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(path)
        for value in event.summary.value
    ]
    assert scalars == [(30, "train/loss", 1.5), (30, "validation/loss", 1.75)]
    assert [
        event.step for event in events(path) if event.session_log.status == SessionLog.START
    ] == [21]


@pytest.mark.parametrize("write", [0, 1, 5])
def test_tensorboard_may_fail_at_any_time_and_metrics_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """A full disk gives one warning, and the run does not wait for room in TensorBoard's queue."""
    (tmp_path / "tensorboard").mkdir()
    calls = iter(range(100))

    def flush(writer: object) -> None:
        if next(calls) >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", -1)
    monkeypatch.setattr(tensorboard.RecordWriter, "flush", flush)
    warnings: list[str] = []
    monkeypatch.setattr(
        tensorboard.logging, "warning", lambda text, *values: warnings.append(text % values)
    )
    with MetricWriter(tmp_path, TrackingConfig(tensorboard=True), step=0) as writer:
        for step in range(1, 31):
            writer.write(step, {"train/loss": 1.0, "train/gradient_norm": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 31))
    assert warnings == [
        f"{tmp_path}/tensorboard gets no more events (No space left on device): metrics.jsonl, "
        "which it copies, goes on"
    ]


def test_without_tensorboard_there_is_no_such_directory(tmp_path: Path) -> None:
    write_lines(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_every_start_adds_its_environment(tmp_path: Path) -> None:
    write_environment(tmp_path, "blockwise")
    write_environment(tmp_path, "blockwise")
    first, second = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert first["devices"] == {"platform": "cpu", "kinds": ["cpu"], "count": 8, "processes": 1}
    assert first["packages"]["numpy"] == np.__version__
    assert first["command"] == sys.argv and first["attention"] == "blockwise"
    assert first | {"time": second["time"]} == second


def test_half_a_line_of_a_killed_start_does_not_swallow_the_next(tmp_path: Path) -> None:
    write_environment(tmp_path, "blockwise")
    path = tmp_path / "environment.jsonl"
    path.write_text(path.read_text()[:50])
    write_environment(tmp_path, "blockwise")
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["attention"] == "blockwise"


NO_OBJECTS = ("", "{", "3", "[]", "null", '"a"', "[" * 100_000)


@pytest.mark.parametrize(
    "line", [*NO_OBJECTS, '{"a": 1}', '{"step": "3"}', '{"step": 1.5}', '{"step": null}']
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "router.jsonl"])
def test_a_damaged_line_is_named_in_one_line(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text(f'{{"step": 1, "load": 1}}\n{line}\n{{"step": 2, "load": 1}}\n')
    read = {
        "metrics.jsonl": read_metrics,
        "router.jsonl": lambda workdir: list(read_router(workdir)),
    }[name]
    for attempt in (read, lambda workdir: MetricWriter(workdir, NO_COPIES, step=9)):
        with pytest.raises(
            ConfigError,
            match=rf"{name}, line 2 is not a JSON object of a step and numbers: delete that line$",
        ):
            attempt(tmp_path)


@pytest.mark.parametrize(
    "text", [*NO_OBJECTS, '{"model": 3}', '{"model": [1]}', '{"train": {"steps": null}}']
)
def test_a_damaged_config_json_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for attempt in (
        identity.read_config,
        lambda workdir: tracking.check_workdir(workdir, RunConfig()),
    ):
        with pytest.raises(ConfigError, match=r"config\.json") as error:
            attempt(tmp_path)
        assert "\n" not in str(error.value)


def test_a_directory_that_another_command_did_not_finish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unfinished.txt").write_text("launch.upcycle from runs/a did not finish\n")
    with pytest.raises(
        ConfigError,
        match=r"is no run yet \(launch.upcycle from runs/a did not finish\): delete it, "
        r"and make it again",
    ):
        tracking.check_workdir(tmp_path, RunConfig())


def git(directory: Path, *arguments: str) -> str:
    identity = (
        "-c",
        "user.name=nobody",
        "-c",
        "user.email=nobody@example.com",
        "-c",
        "commit.gpgsign=false",
    )
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def recorded_git(workdir: Path) -> object:
    write_environment(workdir, "blockwise")
    return json.loads((workdir / "environment.jsonl").read_text().splitlines()[-1])["git"]


def test_the_commit_is_that_of_the_checkout_which_tracks_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "tracking.py"
    library.write_text("original")
    monkeypatch.setattr(tracking, "__file__", str(library))
    assert recorded_git(tmp_path) is None
    git(tmp_path, "init")
    git(
        tmp_path,
        "commit",
        "--allow-empty",
        "-m",
        "somebody's project, with the library installed inside",
    )
    assert recorded_git(tmp_path) is None
    git(tmp_path, "add", "tracking.py")
    git(tmp_path, "commit", "-m", "the library")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert recorded_git(tmp_path) == {"commit": commit, "dirty": False}
    library.write_text("changed")
    assert recorded_git(tmp_path) == {"commit": commit, "dirty": True}
