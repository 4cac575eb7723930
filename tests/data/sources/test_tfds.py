"""Tests how documents are read from TFDS, and that each failure is told in one line."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from launch import train
from moe import files
from moe.config import ConfigError, DataConfig, RunConfig
from moe.data.sources import Documents, check_dataset, open_documents, source_name
from tests.data.conftest import TRAIN, SmallText
from tests.jobs import announce_at_once


@pytest.fixture
def empty(small: DataConfig, tmp_path: Path) -> DataConfig:
    return dataclasses.replace(small, directory=str(tmp_path))


def texts(documents: Documents) -> list[str]:
    return [document.text for document in documents.between(0, len(documents))]


def test_documents_by_index(small: DataConfig):
    documents = open_documents(small, "train")
    assert len(documents) == 600
    assert texts(documents) == TRAIN
    assert texts(open_documents(small, "validation")) == ["ab", "cdé"]


@pytest.mark.parametrize(("start", "stop"), [(0, 600), (0, 64), (63, 193), (590, 700), (700, 800)])
def test_documents_read_several_at_a_time(small: DataConfig, start: int, stop: int):
    documents = open_documents(small, "train").between(start, stop)
    assert [document.text for document in documents] == TRAIN[start:stop]


def test_the_source_names_its_version(small: DataConfig):
    assert source_name(small) == "small_text/plain/1.2.3"
    assert source_name(DataConfig()) == "stdlib/" + sys.version.split()[0]
    assert source_name(DataConfig()) == tfds.builder("stdlib").info.full_name


def test_stdlib_is_real_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = DataConfig(directory=str(tmp_path))
    train, validation = (texts(open_documents(config, split)) for split in ("train", "validation"))
    assert Path(dataclasses.__file__).read_text() in {*train, *validation}
    assert 300 < len(train) < 3000
    assert 0.01 < len(validation) / len(train) < 0.1
    assert not {*train} & {*validation}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            "nonesuch",
            "data.dataset='nonesuch': Dataset nonesuch not found: "
            "set data.dataset to a name that TFDS lists",
        ),
        ("stdlib:0.0.1", "data.dataset='stdlib:0.0.1': "),
        ("small_text/other", "data.dataset='small_text/other': "),
        ("../nonesuch", "data.dataset='../nonesuch' is not a name"),
        ("small_text/../../x", "data.dataset='small_text/../../x' is not a name"),
        ("huggingface:abc", "data.dataset='huggingface:abc' is not a name"),
        ("", "data.dataset='' is not a name"),
        (
            "small_text/no_text",
            "data.dataset='small_text/no_text' has no feature 'text' of text: "
            "set data.text_field to 'title'",
        ),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_in_one_line(
    empty: DataConfig, dataset: str, message: str
):
    with pytest.raises(ConfigError) as error:
        open_documents(dataclasses.replace(empty, dataset=dataset), "train")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_text_may_have_another_name(empty: DataConfig):
    config = dataclasses.replace(empty, dataset="small_text/no_text", text_field="title")
    assert texts(open_documents(config, "train")) == TRAIN


@pytest.mark.parametrize("split", ["test", "", "train[:x]", "../train"])
def test_an_unknown_split_is_refused_in_one_line(small: DataConfig, split: str):
    with pytest.raises(ConfigError) as error:
        open_documents(small, split)
    with pytest.raises(ConfigError, match=re.escape(str(error.value))):
        check_dataset(dataclasses.replace(small, validation_split=split))
    options = "'train' or 'validation' or 'blank'"
    assert (
        str(error.value) == f"split {split!r} is not one of data.dataset='small_text/plain': "
        f"set the split to {options}"
    )


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(
    small: DataConfig, tmp_path: Path
):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=r"^\S*file/data/tfds cannot be written \(.*\): "
        r"set data.directory to a directory that can$",
    ):
        open_documents(
            dataclasses.replace(small, directory=str(tmp_path / "file" / "data")), "train"
        )


@pytest.mark.parametrize("kind", [ImportError, RuntimeError])  # ArrayRecord raises the second
def test_a_failure_of_tfds_is_told_in_one_line(
    empty: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    def fail() -> None:
        raise kind("no tensorflow\nand a long explanation")

    monkeypatch.setattr(SmallText, "before_generating", fail)
    with pytest.raises(
        OSError,
        match=r"^data.dataset='small_text/plain' could not be prepared in \S*/1.2.3: "
        r"[^\n]*no tensorflow[^\n]*$",
    ):
        open_documents(empty, "train")


def test_another_host_may_prepare_it_first(
    small: DataConfig, empty: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    finished = Path(open_documents(small, "train").directory)
    destination = Path(empty.directory, finished.relative_to(small.directory))

    def another_host() -> None:
        shutil.copytree(finished, destination, dirs_exist_ok=True)

    monkeypatch.setattr(SmallText, "before_generating", another_host)
    assert texts(open_documents(empty, "train")) == TRAIN


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_may_prepare_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
):
    program = """
import fcntl, sys
from moe.config import DataConfig
from moe.data.prepare import prepare
def refuse(file, operation): raise OSError(95, "no locks")
if sys.argv[2] == "False": fcntl.flock = refuse
print(prepare(DataConfig(directory=sys.argv[1]), "validation").sha256)
"""
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path), str(locks)]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    told = "".join(error for _, error in outputs).splitlines()
    told = [line for line in told if not line.startswith("waiting for data worker ")]  # a slow one
    waiting = [line for line in told if line.startswith("waiting for ")]
    assert len(waiting) <= 2 * locks, told
    assert all(line.startswith("prepared stdlib/") for line in told if line not in waiting), told
    left = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert len(left) == 2
    assert left[1] == left[0] + ".lock"


def test_waiting_for_a_lock_says_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    path = tmp_path / "lock"
    program = """
import sys
from pathlib import Path
from moe.files import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], text=True, env=_environment(), **pipes
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        announce_at_once(monkeypatch, then=holder.stdin.close)
        with files.hold_lock(path) as alone:
            assert alone
    assert (
        capfd.readouterr().err
        == f"waiting for {path}, which process {holder.pid} on {socket.gethostname()} holds\n"
    )
    with files.hold_lock(path):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_preparation_left_is_removed_under_the_lock(
    empty: DataConfig, monkeypatch: pytest.MonkeyPatch, locks: bool
):
    def refuse(file: object, operation: int) -> None:
        raise OSError(95, "no locks")

    if not locks:
        monkeypatch.setattr("fcntl.flock", refuse)
    stale = Path(empty.directory, "tfds", "small_text", "plain", "incomplete.ABC123_1.2.3")
    stale.mkdir(parents=True)
    (stale / "half").touch()
    open_documents(empty, "train")
    assert stale.exists() != locks  # without a lock another process may be at work there


def test_a_download_is_told_before_anything_starts(
    empty: DataConfig, capfd: pytest.CaptureFixture[str]
):
    check_dataset(dataclasses.replace(empty, dataset="imdb_reviews", validation_split="test"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "data.dataset='imdb_reviews' is not prepared yet: TFDS downloads up to 84.1 MB "
        "before training"
    )
    check_dataset(empty)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["lm1b", "tiny_shakespeare"])
def test_a_data_set_that_needs_tensorflow_is_refused_before_anything_starts(
    empty: DataConfig, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)  # as it is not installed
    with pytest.raises(
        ConfigError,
        match=rf"^data.dataset='{name}' needs tensorflow to be prepared, which is not installed: "
        r"prepare it where it is, by `tfds build --file_format=array_record`, and copy it to \S+$",
    ):
        check_dataset(dataclasses.replace(empty, dataset=name))
    assert not list(Path(empty.directory).iterdir())


def test_a_data_set_without_text_is_refused_before_it_is_prepared(
    empty: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SmallText, "before_generating", lambda: pytest.fail("it is prepared"))
    for check in (check_dataset, lambda config: open_documents(config, "train")):
        with pytest.raises(
            ConfigError,
            match=r"^data\.dataset='small_text/no_text' has no feature 'text' of text: ",
        ):
            check(dataclasses.replace(empty, dataset="small_text/no_text"))
    assert not list(Path(empty.directory).iterdir())


def test_a_command_checks_the_data_set_before_it_loads_jax(
    empty: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "moe.training.trainer", None)  # importing it fails
    config = RunConfig.config_dict()
    config.data.update(dataset="nonesuch", directory=empty.directory)
    flags = unittest.mock.MagicMock(
        config=config,
        workdir=f"{empty.directory}/run",
        profile_steps=None,
    )
    flags.__getitem__.return_value.value = None  # no other run to start from
    with pytest.raises(
        ConfigError, match=r"^data\.dataset='nonesuch': Dataset nonesuch not found: "
    ):
        train.prepare(flags)
    assert not list(Path(empty.directory).iterdir())


def test_a_lock_is_free_again_when_it_is_left(tmp_path: Path):
    for _ in range(2):
        with files.hold_lock(tmp_path / "directory" / "lock") as alone:
            assert alone


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_another_field_of_text_is_another_source(small: DataConfig):
    name = source_name(small)
    assert source_name(dataclasses.replace(small, text_field="title")) != name
    assert source_name(DataConfig()) != source_name(DataConfig(text_field="path"))
