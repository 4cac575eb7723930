"""Tests that other people's token files are read in place, exactly, and checked."""

import dataclasses
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ConfigError, DataConfig
from moe.data.packing.concat import pack, unpack
from moe.data.prepare import PreparedRows
from moe.data.rows import JoinedRows
from moe.data.token_files import TokenFileRows, open_token_rows

TYPES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> None:
    """Writes documents, each of several sequences, as Megatron-LM's builder does."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    tokens = np.array([token for sequence in sequences for token in sequence], dtype)
    path.with_suffix(".bin").write_bytes(tokens.tobytes())
    firsts = np.cumsum([0, *map(len, documents)])
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", TYPES[dtype]))
        file.write(struct.pack("<QQ", len(sequences), len(firsts)))
        file.write(np.array(lengths, np.int32).tobytes())
        pointers = np.cumsum([0, *lengths])[:-1] * tokens.itemsize
        file.write(pointers.astype(np.int64).tobytes() + firsts.astype(np.int64).tobytes())


def packed_rows(documents: list[list[int]], length: int) -> list[dict[str, np.ndarray]]:
    """Returns the rows that concat packing makes of documents."""
    arrays = [np.array(document, np.uint16) for document in documents]
    return [unpack(*row, length) for row in pack(arrays, length)]


def assert_rows(rows: TokenFileRows, expected: list[dict[str, np.ndarray]]) -> None:
    assert len(rows) == len(expected)
    for index, row in enumerate(expected):
        for name, field in rows[index].items():
            np.testing.assert_array_equal(field, row[name], err_msg=f"{name} of row {index}")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        dataset=f"tokens:{tmp_path}",
        train_split="my_text_document",
        validation_split="held_out",
        sequence_length=4,
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_megatrons_files_have_documents(config: DataConfig, tmp_path: Path, dtype: str):
    write_megatron(
        tmp_path / "my_text_document", [[[1, 2, 3], [4]], [[5]], [[6, 7, 8, 9, 10, 11]]], dtype
    )
    rows = open_token_rows(config, "my_text_document")
    assert rows.num_tokens == 11 and len(rows) == 3
    assert rows[0]["tokens"].tolist() == [1, 2, 3, 4]
    assert rows[0]["targets"].tolist() == [2, 3, 4, 5]
    assert rows[0]["loss_mask"].tolist() == [True, True, True, False]
    assert rows[1]["tokens"].tolist() == [5, 6, 7, 8]
    assert rows[1]["segment_ids"].tolist() == [1, 2, 2, 2]
    assert rows[1]["positions"].tolist() == [0, 0, 1, 2]
    assert rows[2]["tokens"].tolist() == [9, 10, 11, 0]
    assert rows[2]["loss_mask"].tolist() == [True, True, False, False]
    assert_rows(rows, packed_rows([[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]], 4))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=7), max_size=3), min_size=1),
    st.integers(1, 9),
)
def test_megatrons_documents_are_packed_as_our_own(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], length: int
):
    flat = [[token for sequence in document for token in sequence] for document in documents]
    if sum(map(len, flat)) < 2:
        return
    directory = tmp_path_factory.mktemp("tokens")
    write_megatron(directory / "train", documents)
    config = DataConfig(dataset=f"tokens:{directory}", sequence_length=length)
    assert_rows(open_token_rows(config, "train"), packed_rows([d for d in flat if d], length))


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "int64"])
def test_numpy_files_have_documents_that_end_with_the_boundary(
    config: DataConfig, tmp_path: Path, dtype: str
):
    documents = [[1, 2, 255], [255], [3, 4, 5, 6, 7, 255], [8]]
    np.save(tmp_path / "held_out.npy", np.concatenate(documents).astype(dtype))
    rows = open_token_rows(config, "held_out")
    assert rows.boundary_id == 255
    assert_rows(rows, packed_rows(documents, 4))


def test_rows_can_be_pickled_and_have_a_checksum(config: DataConfig, tmp_path: Path):
    np.save(tmp_path / "held_out.npy", np.arange(200, dtype=np.uint16))
    rows = open_token_rows(config, "held_out")
    again = pickle.loads(pickle.dumps(rows))
    assert again == rows and again.sha256 == rows.sha256
    np.testing.assert_array_equal(again[3]["tokens"], [12, 13, 14, 15])
    np.save(tmp_path / "held_out.npy", np.arange(200, dtype=np.uint16)[::-1])
    assert open_token_rows(config, "held_out").sha256 != rows.sha256
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(IndexError):
        rows[-1]


def test_a_mixture_with_a_token_file_does_not_know_its_bytes(
    config: DataConfig, tmp_path: Path, rows: PreparedRows
):
    np.save(tmp_path / "held_out.npy", np.arange(200, dtype=np.uint16))
    tokens = open_token_rows(config, "held_out")
    joined = JoinedRows({"text": rows, "tokens": tokens})
    assert (joined.num_bytes, len(joined)) == (0, len(rows) + 50)
    assert JoinedRows({"text": rows}).num_bytes == rows.num_bytes > 0
    np.testing.assert_array_equal(joined[len(rows)]["tokens"], [0, 1, 2, 3])


def test_rows_beyond_int32_are_exact(tmp_path: Path):
    """The file has 5e9 tokens of one byte, which are holes that take no room on disk."""
    num_tokens, length = 5 * 10**9 + 1, 1
    path = tmp_path / "train.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (num_tokens,))[-2:] = (7, 9)
    rows = open_token_rows(
        DataConfig(dataset=f"tokens:{tmp_path}", sequence_length=length), "train"
    )
    assert len(rows) == 5 * 10**9 > 2**32
    last = rows[len(rows) - 1]
    assert (last["tokens"].tolist(), last["targets"].tolist()) == ([7], [9])
    assert rows[2**32]["tokens"].tolist() == [0]


def test_documents_beyond_int32_bytes_are_found(tmp_path: Path):
    half = 3 * 10**9  # tokens of 2 bytes
    with (tmp_path / "train.bin").open("wb") as file:
        file.seek(4 * half - 2)
        file.write(b"\x05\x00")
    with (tmp_path / "train.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 4, 3))
        file.write(np.array([half // 2] * 4, np.int32).tobytes())
        file.write((np.arange(4) * half).astype(np.int64).tobytes())
        file.write(np.array([0, 2, 4], np.int64).tobytes())
    rows = open_token_rows(DataConfig(dataset=f"tokens:{tmp_path}", sequence_length=8), "train")
    assert len(rows) == 2 * half // 8
    assert rows[half // 8 - 1]["loss_mask"].tolist() == [True] * 7 + [False]
    assert rows[half // 8]["segment_ids"].tolist() == [1] * 8
    assert rows[len(rows) - 1]["loss_mask"].tolist() == [True] * 7 + [False]  # nothing follows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "no file",
            r"data.dataset='tokens:\S*' has no file my_text_document.bin with .*\(held",
        ),
        ("no index", r"data.dataset='tokens:\S*' has no file my_text_document.bin with"),
        ("no magic", r"\S*/my_text_document.idx is damaged \(it is no index of Megatron-LM\)"),
        ("floats", r"\S*/my_text_document.idx is damaged \(version 1 with type 7 is no index of"),
        ("cut index", r"\S*/my_text_document.idx is damaged \(it was cut, or names no document\)"),
        ("cut tokens", r"\S*/my_text_document.bin is damaged \(it has 18 bytes, and its index sa"),
        ("large id", r"\S*/my_text_document.bin: row 0 has the id 256, and the tokenizer has 256"),
        ("negative id", r"\S*/my_text_document.bin: row 2 has the id -1, and the tokenizer has"),
    ],
)
def test_megatrons_files_are_checked_when_they_are_opened(
    config: DataConfig, tmp_path: Path, change: str, message: str
):
    np.save(tmp_path / "held_out.npy", np.zeros(9, np.uint16))
    path = tmp_path / "my_text_document.idx"
    last = -1 if change == "negative id" else 1
    first = 256 if change == "large id" else 1
    write_megatron(
        path, [[[first, 2, 3, 4, 5]], [[6, 7, 8, 9, last]]], "int32" if last < 0 else "uint16"
    )
    content = path.read_bytes()
    match change:
        case "no file":
            path.with_suffix(".bin").unlink()
        case "no index":
            path.unlink()
        case "no magic":
            path.write_bytes(b"X" + content[1:])
        case "floats":
            path.write_bytes(content[:17] + b"\x07" + content[18:])
        case "cut index":
            path.write_bytes(content[:-1])
        case "cut tokens":
            path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-2])
    with pytest.raises(ConfigError) as error:
        open_token_rows(config, "my_text_document")
    assert re.match(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            np.zeros((2, 9), np.uint16),
            r"holds uint16 of shape \(2, 9\): save its tokens as one",
        ),
        (
            np.zeros(9, np.float32),
            r"holds float32 of shape \(9,\): save its tokens as one",
        ),
        (np.zeros(1, np.uint16), r"holds 1 tokens: set the split to another"),
        (np.array([{}] * 9), r"is damaged \(.*"),
    ],
)
def test_numpy_files_are_checked_when_they_are_opened(
    config: DataConfig, tmp_path: Path, tokens: np.ndarray, message: str
):
    np.save(tmp_path / "held_out.npy", tokens, allow_pickle=True)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/held_out.npy {message}"):
        open_token_rows(config, "held_out")


def test_a_cut_numpy_file_is_refused(config: DataConfig, tmp_path: Path):
    np.save(tmp_path / "held_out.npy", np.zeros(99, np.uint16))
    path = tmp_path / "held_out.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"^{path} is damaged \(.*\): copy or write it again$"):
        open_token_rows(config, "held_out")


@pytest.mark.parametrize("kind", ["empty", "archive", "text"])
def test_what_is_no_numpy_file_is_refused_in_one_line(
    config: DataConfig, tmp_path: Path, kind: str
):
    path = tmp_path / "held_out.npy"
    path.write_bytes(b"text" if kind == "text" else b"")
    if kind == "archive":
        np.savez(tmp_path / "a.npz", np.zeros(9, np.uint16))
        (tmp_path / "a.npz").rename(path)
    with pytest.raises(ConfigError) as error:
        open_token_rows(config, "held_out")
    assert re.fullmatch(rf"{path} is damaged \(.+\): copy or write it again", str(error.value))


@pytest.mark.parametrize("split", ["../outside", "", "/", "a\0"])
def test_a_split_leads_to_no_other_directory(config: DataConfig, tmp_path: Path, split: str):
    np.save(tmp_path / "outside.npy", np.zeros(9, np.uint16))
    inside = dataclasses.replace(config, dataset=f"tokens:{tmp_path / 'inside'}")
    with pytest.raises(ConfigError, match=r"is no name of a file in it: set data.dataset to the"):
        open_token_rows(inside, split)


def test_an_id_in_the_middle_is_told_where_it_is_read(config: DataConfig, tmp_path: Path):
    np.save(tmp_path / "held_out.npy", np.array([1] * 10 + [300] + [1] * 10, np.uint16))
    rows = open_token_rows(config, "held_out")
    with pytest.raises(OSError, match=r"held_out.npy: row 2 has the id 300, and the tokenizer has"):
        rows[2]
    longer = dataclasses.replace(config, sequence_length=5)
    assert len(open_token_rows(longer, "held_out")) == 4
