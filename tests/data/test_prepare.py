"""Tests that prepared rows are the documents, whatever kills, damages or shares them."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError, DataConfig
from moe.data import prepare as module
from moe.data import workers
from moe.data.prepare import PreparedRows, open_rows, prepare
from moe.data.tokenizers import make_tokenizer
from tests.data.conftest import TRAIN

TEXTS = [text for text in TRAIN if text]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_targets_are_the_documents(rows: PreparedRows):
    targets = np.concatenate([rows[i]["targets"][rows[i]["loss_mask"]] for i in range(len(rows))])
    expected = [make_tokenizer(DataConfig()).encode_document(text)[1:] for text in TEXTS]
    assert targets.tolist() == np.concatenate(expected).tolist()


def test_metadata_counts_what_is_there(rows: PreparedRows, small: DataConfig):
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (rows.num_documents, rows.num_bytes, rows.num_tokens) == (
        594,
        num_bytes,
        num_bytes + 2 * 594,
    )
    assert rows.num_targets == num_bytes + 594
    # A shard has 256 documents. Every hundredth document from the 50th on is empty.
    shards = [TRAIN[:256], TRAIN[256:512], TRAIN[512:]]
    tokens = [sum(len(text.encode()) + 2 for text in shard if text) for shard in shards]
    assert rows.rows_per_shard == tuple(-(-(count - 1) // 8) for count in tokens)
    assert len(rows) == sum(rows.rows_per_shard)
    assert rows.directory.parent == Path(small.directory, "rows")
    metadata = json.loads((rows.directory / "metadata.json").read_text())
    assert (metadata["source"], metadata["split"], metadata["sequence_length"]) == (
        "small_text/plain/1.2.3",
        "train",
        8,
    )


def test_rows_at_the_edges_of_files(rows: PreparedRows):
    first, second, _ = rows.rows_per_shard
    assert rows[first - 1]["segment_ids"].tolist().count(0) > 0
    assert rows[first]["tokens"][0] == 255
    assert rows[first + second]["tokens"][0] == 255
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match="row"):
            rows[index]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_files_are_the_same_bytes_whatever_the_number_of_workers(
    fresh: DataConfig, rows: PreparedRows, num_workers: int
):
    again = prepare(fresh, "train", num_workers)
    assert again.directory != rows.directory
    assert contents(again.directory) == contents(rows.directory)


def test_rows_can_be_pickled_and_shared_by_threads(rows: PreparedRows):
    expected = [rows[i]["tokens"].tolist() for i in range(len(rows))]
    copy = pickle.loads(pickle.dumps(rows))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: copy[i]["tokens"].tolist(), range(len(rows)))) == expected
    assert copy == rows


def test_rows_are_reused(small: DataConfig, rows: PreparedRows, monkeypatch: pytest.MonkeyPatch):
    # The rows may lie where nothing can be written, so opening them must not take the lock.
    monkeypatch.delattr(module, "hold_lock")
    assert prepare(small, "train") == rows


def test_opening_rows_loads_neither_tfds_nor_jax(tmp_path: Path):
    config = DataConfig(directory=str(tmp_path))
    prepare(config, "validation")
    program = """
import sys
from moe.config import DataConfig
from moe.data.prepare import prepare
prepare(DataConfig(directory=sys.argv[1]), "validation")[0]
print({"jax", "tensorflow_datasets", "tensorflow", "torch"} & {*sys.modules})
"""
    assert run(program, config.directory) == "set()\n"


def test_other_rows_lie_elsewhere(fresh: DataConfig):
    longer = dataclasses.replace(fresh, sequence_length=9)
    directories = {
        prepare(fresh, "train").directory,
        prepare(longer, "train").directory,
        prepare(fresh, "validation").directory,
    }
    assert len(directories) == 3


def test_two_names_of_one_data_set_share_their_rows(fresh: DataConfig):
    named = dataclasses.replace(fresh, dataset="small_text/plain:1.2.3")
    assert prepare(named, "validation") == prepare(fresh, "validation")


@pytest.mark.parametrize("split", ["blank", "train[:0]"])
def test_a_split_without_text_is_refused_in_one_line(fresh: DataConfig, split: str):
    with pytest.raises(ConfigError) as error:
        prepare(fresh, split)
    assert (
        str(error.value) == f"split {split!r} of data.dataset='small_text/plain' holds no text: "
        "set the split or the data set to others"
    )
    assert not [path for path in Path(fresh.directory, "rows").iterdir() if path.suffix != ".lock"]


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(
    small: DataConfig, tmp_path: Path
):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=r"^\S*/file/rows cannot be written \([^\n]*\): "
        r"set data.directory to a directory that can$",
    ):
        prepare(dataclasses.replace(small, directory=str(tmp_path / "file")), "train")


def test_a_damaged_file_is_named(fresh: DataConfig):
    rows = prepare(fresh, "train")
    (rows.directory / "rows-00001.array_record").write_bytes(b"")
    assert rows[0]["tokens"][0] == 255
    with pytest.raises(
        OSError, match=r"^\S*/rows-00001.array_record is damaged \([^\n]*\): delete \S*$"
    ):
        rows[rows.rows_per_shard[0]]


def test_only_bytes_that_were_read_are_called_damaged(fresh: DataConfig):
    """Deleting the rows does not help against a limit on open files, or if they are gone."""
    rows = prepare(fresh, "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard)
        )
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match=r"rows-00000\S* cannot be read: Too many open files$"):
            rows[0]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rows[0]["tokens"][0] == 255
    rows = module.open_rows(rows.directory)
    shutil.rmtree(rows.directory)
    with pytest.raises(
        OSError,
        match=r"rows-00000\S* was deleted while it was in use: run the same command again[^\n]*$",
    ):
        rows[0]


def test_each_flipped_byte_of_the_first_rows_is_named_or_changes_nothing(fresh: DataConfig):
    rows = prepare(fresh, "train")
    path = rows.directory / "rows-00000.array_record"
    original = path.read_bytes()
    expected = rows[0]
    for position in range(0, len(original), max(1, len(original) // 40)):
        changed = bytearray(original)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            row = module.open_rows(rows.directory)[0]
        except OSError as error:
            assert re.search(
                r"rows-00000.array_record is damaged \([^\n]*\): delete \S*$", str(error)
            ), error
        else:
            assert all(np.array_equal(row[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "3",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"num_rows"', '"num_cows"'),
        lambda text: text.replace('"num_rows": ', '"num_rows": 1'),
        lambda text: re.sub(r'"num_tokens": \d+', '"num_tokens": "many"', text),
        lambda text: re.sub(r'"num_bytes": \d+', '"num_bytes": null', text),
        lambda text: re.sub(r'"rows_per_shard": \[[^]]*\]', '"rows_per_shard": 3', text),
        lambda text: text.replace("{", '{"more": 1, ', 1),
    ],
)
def test_damaged_metadata_is_named(fresh: DataConfig, change):
    path = prepare(fresh, "train").directory / "metadata.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(OSError, match=r"^\S*/metadata.json is damaged: delete \S*$"):
        prepare(fresh, "train")


def test_another_host_may_write_them_first(
    fresh: DataConfig, rows: PreparedRows, monkeypatch: pytest.MonkeyPatch
):
    directory = Path(fresh.directory, "rows", rows.directory.name)

    def write_shard(job: object, shard: int, advance: object) -> dict:
        shutil.copytree(rows.directory, directory, dirs_exist_ok=True)
        return original(job, shard, advance)

    original = module.write_shard
    monkeypatch.setattr(module, "write_shard", write_shard)
    assert contents(prepare(fresh, "train").directory) == contents(rows.directory)
    assert sorted(path.name for path in directory.parent.iterdir()) == [
        directory.name,
        f"{directory.name}.lock",
    ]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_a_killed_process_leaves_nothing_half_read(
    fresh: DataConfig, rows: PreparedRows, tmp_path: Path, packing: str
):
    config = dataclasses.replace(fresh, packing=packing, sequence_length=24)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "tfds").symlink_to(tmp_path / "tfds")
    directory = str(tmp_path / "whole")
    whole = prepare(dataclasses.replace(config, directory=directory), "train").directory
    program = """
import json, sys, time
from moe.config import DataConfig
from moe.data import prepare, shards
from moe.data.sources import reopen_documents
def write_shard(job, shard, advance):
    if shard == 1:
        print("one shard is written", flush=True)
        time.sleep(600)
    return shards.write_shard(job, shard, advance)
prepare.write_shard = write_shard
prepare.source_name = lambda config: "small_text/plain/1.2.3"
prepare.open_documents = lambda config, split: reopen_documents(config, split, sys.argv[2])
prepare.prepare(DataConfig(**json.loads(sys.argv[1])), "train")
"""
    source = str(Path(fresh.directory, "tfds", rows.source))
    command = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config)), source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout.readline() == "one shard is written\n"
        process.send_signal(signal.SIGKILL)
    left = Path(fresh.directory, "rows")
    (half,) = left.glob(".*")
    assert [path.name for path in half.iterdir()] == ["rows-00000.array_record"]
    assert not (left / whole.name).exists()
    assert contents(prepare(config, "train").directory) == contents(whole)
    assert not half.exists()


def test_a_failing_worker_is_reported_and_leaves_nothing(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match=r"^preparing the data failed in a worker process"):
        prepare(fresh, "train", num_workers=2)
    assert not list(Path(fresh.directory, "rows").glob(".*"))


def worker_script(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes prepare start its workers through a shell script, whose "$@" are Python's arguments."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_killed_worker_is_reported_with_its_signal_and_file(
    fresh: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker_script(tmp_path, f'[ "$5" = 1 ] && kill -9 $$; exec {sys.executable} "$@"', monkeypatch)
    with pytest.raises(
        OSError,
        match=r"killed by SIGKILL while it wrote rows-00001.array_record \(as the system does "
        r"where memory runs out",
    ):
        prepare(fresh, "train", num_workers=2)
    worker_script(tmp_path, "kill -TERM $$", monkeypatch)
    with pytest.raises(
        OSError, match=r"killed by SIGTERM while it wrote rows-0000[01].array_record$"
    ):
        prepare(fresh, "train", num_workers=2)
    assert not list(Path(fresh.directory, "rows").glob(".*"))


def test_a_worker_that_does_not_end_is_ended(
    fresh: DataConfig, rows: PreparedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its rows are all there, and threads of libraries may keep it for ever."""
    worker_script(tmp_path, f'{sys.executable} "$@"; exec sleep 6000', monkeypatch)
    assert contents(prepare(fresh, "train", num_workers=2).directory) == contents(rows.directory)


def test_a_stopped_worker_is_named(
    fresh: DataConfig,
    rows: PreparedRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    worker_script(tmp_path, f'kill -STOP $$; exec {sys.executable} "$@"', monkeypatch)
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    describe = workers._describe

    def wake(stopped: list[subprocess.Popen[bytes]], left: list[list[int]]) -> str:
        """Lets the workers go on once they have been described."""
        monkeypatch.setattr(workers, "_describe", describe)
        for worker in stopped:
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
        text = describe(stopped, left)
        for worker in stopped:
            worker.send_signal(signal.SIGCONT)
        return text

    monkeypatch.setattr(workers, "_describe", wake)
    assert contents(prepare(fresh, "train", num_workers=2).directory) == contents(rows.directory)
    told = capfd.readouterr().err
    name = (
        r"data worker (\d+) writing rows-0000%d.array_record, "
        r"which is stopped \(kill -CONT \1 lets it go on\)"
    )
    assert re.search(f"^waiting for {name % 0}; ", told) and re.search(name % 1, told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(
    rows: PreparedRows, small: DataConfig, tmp_path: Path, number: signal.Signals
):
    program = """
import json, sys
from moe.config import DataConfig
from moe.data import shards, workers
from moe.data.sources import reopen_documents
config = DataConfig(**json.loads(sys.argv[1]))
job = shards.ShardJob(config, "train", sys.argv[2], sys.argv[3], 1, 10**6)
for _ in workers.write_in_processes(job, 2, lambda num_read: None):
    print("begun", flush=True)
"""
    source = str(Path(small.directory, "tfds", rows.source))
    command = [
        sys.executable,
        "-c",
        program,
        json.dumps(dataclasses.asdict(small)),
        source,
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as process:
        assert process.stdout.readline() == "begun\n"
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        process.stdout.read()
    assert len(workers) == 2 and process.returncode != 0
    deadline = time.monotonic() + 100
    # A process that has ended has no exe, even before its parent collects it.
    while alive := [worker for worker in workers if Path(f"/proc/{worker}/exe").exists()]:
        assert time.monotonic() < deadline, f"{alive} are left"
        time.sleep(0.05)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), check=True
    ).stdout


def test_special_tokens_are_part_of_what_rows_are(fresh: DataConfig):
    """Their order gives them their ids."""
    names = ("<a>", "<b>")
    one, other = (
        prepare(dataclasses.replace(fresh, special_tokens=tokens), "validation")
        for tokens in (names, names[::-1])
    )
    assert one.directory != other.directory
    assert open_rows(one.directory) == one
