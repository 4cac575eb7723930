"""Tests which documents are made of the user's files, in which splits, and what is refused."""

import dataclasses
import datetime
import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard

from moe.config import ConfigError, DataConfig
from moe.data import prepare as prepare_module
from moe.data.prepare import prepare
from moe.data.sources import check_dataset, open_documents, records, reopen_documents, source_name
from moe.data.sources import readers as readers_module
from moe.data.sources.document import Document, Documents
from moe.data.sources.stdlib import is_validation
from tests.jobs import file_size_limit

HELD_OUT = [str(i) for i in range(4000) if is_validation(str(i))]
TRAINED_ON = [str(i) for i in range(4000) if not is_validation(str(i))]
LINES = [json.dumps({"text": text}) for text in (*TRAINED_ON[:30], *HELD_OUT[:5])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns an empty folder for the files of a test."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


def config_for(path: object, **changes: object) -> DataConfig:
    """Returns the config of the files at a path. What is prepared lies beside them."""
    text = str(path)
    directory = re.sub(r"/notes.*", "/prepared", text)
    return dataclasses.replace(DataConfig(dataset=f"text:{text}", directory=directory), **changes)


def read(config: DataConfig, *splits: str) -> list[Document]:
    """Returns the documents of some splits."""
    opened = [open_documents(config, split) for split in splits or ("train", "validation")]
    return [document for some in opened for document in some.between(0, len(some))]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_every_kind_of_file_is_read_in_the_order_of_the_names(folder: Path):
    train, held_out = TRAINED_ON, HELD_OUT
    write(folder / "a.txt", train[0])
    write(folder / "b/a.md", train[1])
    write(folder / "b/b.py", held_out[0])
    lines = "".join(json.dumps({"n": 7, "text": text, "list": [1]}) + "\n" for text in train[2:4])
    write(folder / "c.jsonl", lines + "\n")
    write(
        folder / "d.jsonl.gz",
        gzip.compress(lines[:30].encode()) + gzip.compress(lines[30:].encode()),
    )
    write(folder / "e.jsonl.zst", zstandard.compress(lines.encode()))
    write_rows(
        folder / "f.parquet", [{"text": train[5], "x": 0.5}, {"text": held_out[1], "x": None}]
    )
    expected = [
        Document(train[0], "a.txt", {}),
        Document(train[1], "b/a.md", {}),
        *(
            Document(text, f"{name}:{line}", {"n": 7})
            for name in ("c.jsonl", "d.jsonl.gz", "e.jsonl.zst")
            for line, text in enumerate(train[2:4], 1)
        ),
        Document(train[5], "f.parquet:1", {"x": 0.5}),
    ]
    assert read(config_for(folder), "train") == expected
    assert read(config_for(folder), "validation") == [
        Document(held_out[0], "b/b.py", {}),
        Document(held_out[1], "f.parquet:2", {}),
    ]


def test_documents_are_read_by_their_numbers_from_several_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 100)
    write(folder / "a.jsonl", "".join(f'{{"text": "{text}"}}\n' for text in TRAINED_ON[:350]))
    documents = open_documents(config_for(folder), "train")
    again = reopen_documents(config_for(folder), "train", documents.directory)
    assert len(documents) == 350
    for start, stop in ((0, 350), (99, 101), (150, 340), (340, 1000), (350, 360), (20, 20)):
        texts = [document.text for document in again.between(start, stop)]
        assert texts == TRAINED_ON[start : min(stop, 350)]
    files = sorted(path.name for path in Path(documents.directory).glob("*array_record*"))
    assert [name[-14:] for name in files] == [f"00{i:03d}-of-00004" for i in range(4)]


def test_tfds_reads_what_was_written(folder: Path):
    write(folder / "a.jsonl", '{"text": "é", "n": 1}\n')
    directory = open_documents(config_for(folder), "train").directory
    (example,) = tfds.builder_from_directory(directory).as_data_source("train")
    assert example == {"text": "é".encode(), "origin": b"a.jsonl:1", "fields": b'{"n": 1}'}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_large_plain_file_is_cut_where_lines_end(
    folder: Path, newline: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers_module, "LARGEST_PLAIN", 100)
    lines = [f"line {i} é{newline}" for i in range(1, 60)]
    write(folder / "train/a.txt", "".join(lines))
    write(folder / "train/small.txt", "x" * 100)
    write(folder / "validation/long.txt", "x" + "é" * 100)
    train = read(config_for(folder), "train")
    assert "".join(document.text for document in train[:-1]) == "".join(lines)
    for document in train[:-1]:
        assert len(document.text.encode()) <= 100 and document.text.endswith(newline)
        first = document.text.split()[1]
        assert document.origin == f"train/a.txt:{first}"
    assert train[-1] == Document("x" * 100, "train/small.txt", {})
    # A line that is too long is cut between characters.
    assert [d.text for d in read(config_for(folder), "validation")] == [
        "x" + "é" * 49,
        "é" * 50,
        "é",
    ]


def test_the_last_lines_of_a_single_plain_file_are_held_out(folder: Path):
    lines = [f"line {i}\n" for i in range(1, 201)]
    write(folder / "a.txt", "".join(lines))
    for path in (folder, folder / "a.txt", f"{folder}/*.txt"):
        train, validation = read(config_for(path), "train"), read(config_for(path), "validation")
        assert train[0].text + validation[0].text == "".join(lines)
        share = len(validation[0].text) / sum(map(len, lines))
        assert 0.05 <= share < 0.06 and validation[0].text.startswith("line ")
        assert (train[0].origin, validation[0].origin) == ("a.txt:1", "a.txt:191")


def test_folders_may_be_the_splits(folder: Path, capfd: pytest.CaptureFixture[str]):
    write(folder / "train/a.txt", HELD_OUT[0])
    write(folder / "validation/b.txt", TRAINED_ON[0])
    write(folder / "other/c.txt", "c")
    assert [d.text for d in read(config_for(folder))] == [HELD_OUT[0], TRAINED_ON[0]]
    assert ": 2 files are read, and 1 left out, " in capfd.readouterr().err


@pytest.mark.parametrize(("empty", "full"), [("train", "validation"), ("validation", "train")])
def test_a_folder_of_a_split_without_text_is_refused(folder: Path, empty: str, full: str):
    write(folder / full / "a.jsonl", "\n".join(LINES))
    assert len(read(config_for(folder))) == 35  # one folder alone is a folder as any other
    for name in (".hidden.txt", "held.TXT"):
        write(folder / empty / name, "a")
        with pytest.raises(ConfigError, match=rf"and {empty} holds no file of text: convert or"):
            check_dataset(config_for(folder))


def test_files_of_other_kinds_and_hidden_ones_are_counted(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    write(folder / "a.jsonl", "\n".join(LINES))
    for name in ("image.png", ".hidden.txt", ".git/a.txt", "README"):
        write(folder / name, "left out")
    assert len(read(config_for(folder))) == 35
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"text:{folder}: 1 files are read, and 4 left out, which are hidden, of other kinds, or "
        "beside the folders train and validation"
    )


def test_links_are_read_and_change_with_their_files(folder: Path):
    write(folder.parent / "elsewhere.jsonl", "\n".join(LINES))
    (folder / "a.jsonl").symlink_to(folder.parent / "elsewhere.jsonl")
    name = source_name(config_for(folder))
    os.utime(folder.parent / "elsewhere.jsonl", (1, 1))
    assert source_name(config_for(folder)) != name
    assert len(read(config_for(folder))) == 35
    (folder / "b.jsonl").symlink_to(folder.parent / "nonesuch.jsonl")
    with pytest.raises(
        ConfigError, match=rf"^{folder}/b.jsonl cannot be read \(No such file or directory\): make"
    ):
        check_dataset(config_for(folder))


@pytest.mark.parametrize("name", [".#a.txt", ".git/a.txt", "latest", "image.png"])
def test_a_file_that_is_left_out_may_be_a_link_to_nothing(folder: Path, name: str):
    write(folder / "a.jsonl", "\n".join(LINES))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to("user@host.1234")  # as Emacs marks a file that is being edited
    assert len(read(config_for(folder))) == 35


def test_a_name_that_is_not_utf8_is_refused_before_anything_starts(folder: Path):
    write(folder / "a.jsonl", "\n".join(LINES))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("a")
    for skips in (False, True):
        with pytest.raises(ConfigError) as error:
            check_dataset(config_for(folder, skip_bad_documents=skips))
        assert str(error.value).encode().endswith(b"' is not UTF-8: rename it")
        assert f"{folder}/caf" in str(error.value)
    os.rename(os.fsencode(folder) + b"/caf\xe9.txt", os.fsencode(folder) + b"/caf\xe9.png")
    check_dataset(config_for(folder))


def test_a_glob_names_the_files(folder: Path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl", "deep/a3.jsonl"):
        write(folder / name, "\n".join(LINES))
    assert {d.origin.split(":")[0] for d in read(config_for(folder / "a*.jsonl"))} == {
        "a1.jsonl",
        "a2.jsonl",
    }
    deep = {d.origin.split(":")[0] for d in read(config_for(folder / "**/a*.jsonl"))}
    assert deep == {"a1.jsonl", "a2.jsonl", "deep/a3.jsonl"}


def test_a_name_may_have_the_letters_of_a_glob(folder: Path):
    write(folder / "[a] b?.jsonl", "\n".join(LINES))
    assert len(read(config_for(folder / "[a] b?.jsonl"))) == 35


def test_changed_files_are_prepared_anew_and_old_rows_stay(folder: Path):
    config = config_for(folder)
    write(folder / "a.jsonl", "\n".join(LINES))
    first = open_documents(config, "train")
    name = source_name(config)
    assert source_name(config) == name
    copy = folder.parent / "notes2"
    shutil.copytree(folder, copy)
    copied = source_name(dataclasses.replace(config, dataset=f"text:{copy}"))
    assert copied.rpartition("-")[2] == name.rpartition("-")[2]  # the times were copied as well
    write(folder / "a.jsonl", "\n".join([*LINES, LINES[0]]))
    second = open_documents(config, "train")
    assert source_name(config) != name
    assert (len(first), len(second)) == (30, 31)
    assert [d.text for d in first.between(0, 99)] == TRAINED_ON[:30]
    os.utime(folder / "a.jsonl", (1, 1))
    assert open_documents(config, "train").directory != second.directory


def test_prepared_text_is_read_without_its_files(folder: Path):
    write(folder / "a.jsonl", "\n".join(LINES))
    config = config_for(folder, sequence_length=8)
    rows = prepare(config, "train")
    assert rows.source == source_name(config)
    assert (rows.num_documents, prepare(config, "validation").num_documents) == (30, 5)


TIME = datetime.datetime(2026, 1, 2)


def test_rows_of_files_that_change_before_they_are_read_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write(folder / "a.jsonl", "\n".join(LINES))
    config = config_for(folder, sequence_length=8)

    def change_and_open(config: DataConfig, split: str) -> Documents:
        write(folder / "a.jsonl", "\n".join(LINES[1:]))
        return open_documents(config, split)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "open_documents", change_and_open)
        with pytest.raises(ConfigError, match=r"has changed while its rows were made: run the"):
            prepare(config, "train")
    assert prepare(config, "train").source == source_name(config)
    assert prepare(config, "train").num_documents == 29


BAD = {
    "a.txt": (b"one\ntwo\xff\n", r"a.txt:2 is not UTF-8 \(byte 0xff\): convert the file"),
    "b.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"b.jsonl:2 is not UTF-8 \(byte 0xe9\)"),
    "c.jsonl": (b'{"text": "a"}\n\n{"text" "b"}\n', r"c.jsonl:3 is not JSON \(Expecting ':'"),
    "d.jsonl": (b'{"words": "a", "n": 1}\n', r"d.jsonl:1 field 'text' is missing: .* \(words, n\)"),
    "e.jsonl": (b'{"text": 3}\n', r"e.jsonl:1 field 'text' holds int, no text"),
    "f.jsonl": (b'{"text": "\\ud800"}\n', r"f.jsonl:1 has half a character, '\\ud800'"),
    "g.jsonl": (b"[1]\n", r"g.jsonl:1 is no JSON object: write one object a line"),
    "h.jsonl": (b"[" * 10**5, r"h.jsonl:1 is not JSON"),
    "i.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], r"i.jsonl.gz:\d+ is damaged, as a"),
    "j.jsonl.gz": (b"text", r"j.jsonl.gz:1 is damaged"),
    "empty.jsonl.gz": (
        b"",
        r"empty.jsonl.gz:1 is damaged, as a file that was cut is \(it has no by",
    ),
    "empty.jsonl.zst": (b"", r"empty.jsonl.zst:1 is damaged"),
    "k.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 9)[:-2], r"k.jsonl.zst:\d+ is damaged"),
    "l.parquet": (b"PAR1 and no more", r"l.parquet:1 is damaged, as a file that was cut is \("),
    "m.parquet": ([{"words": "a"}], r"m.parquet:1 field 'text' is missing: .* \(words\)"),
    "o.parquet": ([{"text": [TIME]}], r"o.parquet:1 field 'text' holds a list that is no JSON"),
    "p.parquet": ([{"text": [{"content": b"a"}]}], r"p.parquet:1 field 'text' holds a list that"),
    "n.parquet": ([{"text": "a"}, {"text": None}], r"n.parquet:2 field 'text' holds NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told_in_one_line_or_counted(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
):
    content, message = BAD[name]
    write(folder / "z.jsonl", "\n".join(LINES))
    if isinstance(content, list):
        write_rows(folder / name, content)
    else:
        write(folder / name, content)
    with pytest.raises(ConfigError) as error:
        open_documents(config_for(folder), "train")
    assert re.match(rf"{folder}/{message}", str(error.value))
    assert str(error.value).endswith(
        "or set data.skip_bad_documents to count and skip such documents"
    )
    assert "\n" not in str(error.value)
    assert not list(folder.parent.glob("prepared/**/*.unfinished"))

    capfd.readouterr()
    documents = open_documents(config_for(folder, skip_bad_documents=True), "train")
    assert len(documents) >= 30
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"text:{folder}: 1 documents were skipped, such as {folder}/{message}", line)
    assert Path(documents.directory, "skipped.txt").read_text().count("\n") == 1


def test_a_full_disk_is_not_told_as_an_error_of_the_file_that_is_read(folder: Path):
    """The list of skipped documents is written while the file of documents is read."""
    write(folder / "a.jsonl", "{\n" * 300)
    with file_size_limit(4096), pytest.raises(OSError) as error:
        open_documents(config_for(folder, skip_bad_documents=True), "train")
    assert re.search(
        r"could not be prepared in .* File too large: '/\S*/skipped.txt'$", str(error.value)
    )


def test_a_full_disk_under_the_records_is_not_told_of_the_skipped_documents(folder, monkeypatch):
    def write_record(writer, document):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(folder / "a.jsonl", json.dumps({"text": "one"}) + "\n")
    monkeypatch.setattr(records.RecordWriter, "write", write_record)
    with pytest.raises(OSError, match="No space left on device") as error:
        open_documents(config_for(folder, skip_bad_documents=True), "train")
    assert "skipped.txt" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(("count", "size"), [(600, 300), (400, 3000)])  # bytes: 0.4 and 2.4 MB
def test_the_documents_before_a_cut_stay(folder: Path, name: str, count: int, size: int):
    random = np.random.default_rng(0)
    texts = [f"{i} {random.bytes(size).hex()}" for i in range(count)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    compress = gzip.compress if name.endswith(".gz") else zstandard.compress
    whole = compress("".join(lines).encode())
    write(folder / "train" / name, whole[: len(whole) * 2 // 3])
    write(folder / "validation/b.txt", "b")
    config = config_for(folder, skip_bad_documents=True)
    documents = read(config, "train")
    # Of zstandard, the block of 128 KiB in which the cut is cannot be read.
    assert count / 4 < len(documents) < count * 3 / 4
    assert [document.text for document in documents] == texts[: len(documents)]
    skipped = Path(open_documents(config, "train").directory, "skipped.txt").read_text()
    assert skipped.startswith(f"{folder}/train/{name}:{len(documents) + 1} is damaged")


def test_columns_that_python_cannot_hold_are_not_read(folder: Path):
    columns = {
        "text": pa.array([TRAINED_ON[0]]),
        "late": pa.array([2**60], pa.timestamp("us")),  # beyond the year 9999
        "exact": pa.array([1], pa.timestamp("ns")),
        "raw": pa.array([b"\xff"]),
        "n": pa.array([1], pa.uint8()),
        "flag": pa.array([True]),
        "name": pa.array(["a"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), folder / "a.parquet")
    (document,) = read(config_for(folder), "train")
    assert document.fields == {"n": 1, "flag": True, "name": "a"}


def test_rows_beside_one_that_is_not_utf8_are_read(folder: Path):
    values = pa.array([b"0", b"\xff", b"2"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": values}), folder / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet:2 is not UTF-8 \(byte 0xff\)"):
        open_documents(config_for(folder), "train")
    skipping = config_for(folder, skip_bad_documents=True)
    assert [d.origin for d in read(skipping, "train")] == ["a.parquet:1", "a.parquet:3"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "has no path: set it to text:PATH"),
        ("nonesuch", "does not exist: set it to text:PATH, where PATH is a file, a directory or"),
        ("nonesuch/*.txt", "does not exist"),
        ("https://example.org/a.txt", "is an address of another kind: set it to a local path, or"),
        ("{folder}", "holds no file of text: its 1 files are hidden or of other kinds than .txt"),
        ("{folder}/a.pdf", "holds no file of text"),
        ("{folder}/empty", "holds no file of text: its 0 files are"),
    ],
)
def test_a_path_without_text_is_refused_before_anything_starts(
    folder: Path, path: str, message: str
):
    write(folder / "a.pdf", "x")
    (folder / "empty").mkdir()
    config = DataConfig(dataset=f"text:{path.format(folder=folder)}", directory=str(folder / "new"))
    for ask in (check_dataset, source_name, lambda config: open_documents(config, "train")):
        with pytest.raises(ConfigError) as error:
            ask(config)
        assert str(error.value).startswith(f"data.dataset='{config.dataset}' {message}")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("skips", [False, True])
def test_files_without_any_document_are_told_as_such(folder: Path, skips: bool):
    """Advice to divide them into two folders would not help."""
    write(folder / "a.jsonl", "not JSON\n" * skips)
    with pytest.raises(ConfigError, match=r"^data.dataset='text:\S*' holds no text: its files are"):
        open_documents(config_for(folder, skip_bad_documents=skips), "train")


def test_an_empty_split_says_how_to_make_one(folder: Path):
    write(folder / "a.jsonl", "\n".join(LINES[:3]))
    with pytest.raises(
        ConfigError,
        match=r"^split 'validation' of data.dataset='text:\S*' holds no document, since 5 % of all "
        r"are validation: make a directory with the folders train and validation$",
    ):
        open_documents(config_for(folder), "validation")
    with pytest.raises(ConfigError, match=r"^split 'test' is not one of .* 'train' or 'valid"):
        open_documents(config_for(folder), "test")


def test_a_single_line_says_how_to_make_the_split(folder: Path):
    write(folder / "a.txt", "one line\n")
    config = DataConfig(dataset=f"text:{folder}/a.txt", directory=str(folder / "cache"))
    assert len(open_documents(config, "validation")) == 1
    with pytest.raises(ConfigError, match=r"^split 'train' .* make a directory with the folders"):
        open_documents(config, "train")


def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write(folder / "a.jsonl", "\n".join(LINES))
    original = records.RecordWriter.write

    def write_and_change(self: records.RecordWriter, document: Document) -> None:
        original(self, document)
        write(folder / "b.jsonl", LINES[0])

    monkeypatch.setattr(records.RecordWriter, "write", write_and_change)
    with pytest.raises(ConfigError, match=r"has changed while it was read: run the same command"):
        open_documents(config_for(folder), "train")


def test_a_killed_preparation_leaves_nothing_that_is_read(folder: Path):
    write(folder / "a.jsonl", "\n".join(LINES))
    program = """
import os, signal, sys
from moe.config import DataConfig
from moe.data.sources import open_documents, records
original, seen = records.RecordWriter.write, []
def write(self, document):
    original(self, document)
    seen.append(document)
    if len(seen) == 20: os.kill(os.getpid(), signal.SIGKILL)
records.RecordWriter.write = write
open_documents(DataConfig(dataset=sys.argv[1], directory=sys.argv[2]), "train")
"""
    config = config_for(folder)
    command = [sys.executable, "-c", program, config.dataset, config.directory]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -9
    assert list(Path(config.directory).glob("tfds/**/*.unfinished"))
    assert [document.text for document in read(config, "train")] == TRAINED_ON[:30]
    assert not list(Path(config.directory).glob("tfds/**/*.unfinished"))


def test_a_damaged_record_file_is_told_in_one_line(folder: Path):
    write(folder / "a.jsonl", "\n".join(LINES))
    documents = open_documents(config_for(folder), "train")
    (path,) = Path(documents.directory).glob("*train*")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match=rf"^{path} is damaged \([^\n]*\): delete {path.parent}$"):
        list(documents.between(0, 9))
