"""Tests that a run directory has its own copy of its tokenizer's file."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from moe.config import ConfigError, DataConfig, RunConfig
from moe.storage.paths import RunPath, run_path
from moe.storage.tokenizer import FIELDS, local_copy, names_file, read_stored, store_tokenizer
from moe.workdir.identity import use_stored_tokenizer, write_config
from moe.workdir.source import Source, find_origin
from moe.workdir.tracking import check_workdir


def config_with(tokenizer: Path | str, **fields: object) -> RunConfig:
    config = RunConfig()
    data = dataclasses.replace(config.data, tokenizer=str(tokenizer), **fields)
    return dataclasses.replace(config, data=data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_bytes(b"a tokenizer's file \xff")
    return path


def begin(workdir: RunPath, config: RunConfig) -> None:
    """Does what the start of a run does with its directory."""
    check_workdir(workdir, config)
    write_config(workdir, config)


def test_a_new_run_keeps_a_copy_which_is_used_from_then_on(tmp_path: Path, file: Path) -> None:
    workdir, config = tmp_path / "run", config_with(file)
    assert use_stored_tokenizer(workdir, config) == config
    begin(workdir, config)
    copy = workdir / "tokenizer" / "mine.json"
    assert copy.read_bytes() == file.read_bytes()
    file.unlink()
    moved = tmp_path / "moved"
    shutil.move(workdir, moved)
    check_workdir(moved, config)
    used = use_stored_tokenizer(moved, config)
    assert used == config_with(moved / "tokenizer" / "mine.json")
    assert use_stored_tokenizer(moved, config_with("/elsewhere/mine.json")) == used


def test_a_template_whose_file_is_called_byte_is_kept_too() -> None:
    named = DataConfig(chat_template="byte", packing="pad")
    assert [names_file(named, field) for field in FIELDS] == [False, True]
    assert not any(names_file(DataConfig(), field) for field in FIELDS)


def test_a_file_of_the_name_that_the_description_has_is_kept_too(tmp_path: Path) -> None:
    file = tmp_path / "about.json"
    file.write_text("a tokenizer's file")
    workdir, config = tmp_path / "run", config_with(file)
    begin(workdir, config)
    used = use_stored_tokenizer(workdir, config)
    assert used == config_with(workdir / "tokenizer" / "copy-about.json")
    assert Path(used.data.tokenizer).read_text() == file.read_text()
    check_workdir(workdir, config)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_run_does_not_start_from_one_with_another_tokenizer(
    tmp_path: Path, file: Path, is_file: bool
) -> None:
    other = tmp_path / "other.json"
    other.write_text("another file")
    begin(tmp_path / "source", config_with(file))
    source = Source(tmp_path / "source", step=None, is_fork=False)
    new = config_with(other if is_file else "byte")
    with pytest.raises(ConfigError, match=r"^data.tokenizer=\S+ is another tokenizer than"):
        find_origin(tmp_path / "new", new, source)
    # The same tokenizer gets as far as the checkpoint, which is not there.
    with pytest.raises(ConfigError, match=r"holds no checkpoint"):
        find_origin(tmp_path / "new", config_with(file), source)


def test_bytes_have_no_file(tmp_path: Path) -> None:
    begin(tmp_path / "run", RunConfig())
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert use_stored_tokenizer(tmp_path / "run", RunConfig()) == RunConfig()


def test_another_tokenizer_is_refused_and_the_same_elsewhere_is_not(
    tmp_path: Path, file: Path
) -> None:
    workdir, same, other = tmp_path / "run", tmp_path / "same", tmp_path / "other.json"
    begin(workdir, config_with(file))
    same.write_bytes(file.read_bytes())
    check_workdir(workdir, config_with(same))
    other.write_text("another file")
    message = (
        rf"^data.tokenizer={other} is another tokenizer than that of {workdir} \(SHA-256 "
        rf"[0-9a-f]{{12}} here, [0-9a-f]{{12}} there\): set data.tokenizer to {workdir}/tokenizer/"
        "mine.json, or set another workdir$"
    )
    with pytest.raises(ConfigError, match=message):
        check_workdir(workdir, config_with(other))
    assert (workdir / "tokenizer" / "mine.json").read_bytes() == file.read_bytes()
    # A command that reads the run uses its copy, whatever has become of the file.
    used = use_stored_tokenizer(workdir, config_with(other), must_match=False)
    assert Path(used.data.tokenizer) == workdir / "tokenizer" / "mine.json"
    for config in (
        RunConfig(),
        config_with(file, split_pattern="x"),
        config_with(file, special_tokens=("<a>",)),
    ):
        with pytest.raises(ConfigError, match="holds a run of another config"):
            check_workdir(workdir, config)


def test_what_a_start_that_did_not_become_a_run_has_left_is_replaced(
    tmp_path: Path, file: Path
) -> None:
    workdir = tmp_path / "run"
    check_workdir(workdir, config_with(file))  # and no config.json
    other = tmp_path / "other.json"
    other.write_text("another file")
    begin(workdir, config_with(other))
    stored = read_stored(workdir)
    assert stored and stored.path == workdir / "tokenizer" / "other.json"


def test_damage_is_told(tmp_path: Path, file: Path) -> None:
    workdir, config = tmp_path / "run", config_with(file)
    begin(workdir, config)
    (workdir / "tokenizer" / "mine.json").write_bytes(b"a tokenizer's file")
    with pytest.raises(ConfigError, match=r"is not the file that was stored .* restore it"):
        use_stored_tokenizer(workdir, config)
    about = workdir / "tokenizer" / "about.json"
    for text in ("{", "{}", "[]"):
        about.write_text(text)
        with pytest.raises(ConfigError, match=f"^{re.escape(str(about))} is not what was written"):
            use_stored_tokenizer(workdir, config)
    # Without the copy, the file is stored again.
    shutil.rmtree(about.parent)
    check_workdir(workdir, config)
    assert json.loads(about.read_text())["file"] == "mine.json"


def test_a_run_at_gs_keeps_a_copy_too(workdir: str, tmp_path: Path, file: Path) -> None:
    run = run_path(workdir)
    config = config_with(file, directory=str(tmp_path / "data"))
    begin(run, config)
    assert (run / "tokenizer" / "mine.json").read_bytes() == file.read_bytes()
    content = file.read_bytes()
    file.unlink()
    path = Path(use_stored_tokenizer(run, config).data.tokenizer)
    assert path.is_relative_to(tmp_path / "data" / "tokenizers") and path.name == "mine.json"
    assert path.read_bytes() == content
    path.write_bytes(b"damaged")
    stored = read_stored(run)
    assert stored and local_copy(stored, config.data).read_bytes() == content


def test_a_file_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store_tokenizer(tmp_path / "run", config_with(tmp_path / "none.json").data)
    assert not (tmp_path / "run").exists()
