"""Tests that saved Hugging Face data sets are read in place, by Arrow alone."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe.config import ConfigError, DataConfig
from moe.data.prepare import prepare
from moe.data.sources import check_dataset, open_documents, reopen_documents, source_name
from moe.data.sources.document import Document

TABLES = {
    split: pa.table(
        {
            "text": [f"{split} {i} é" for i in range(count)],
            "n": list(range(count)),
            "messages": [[{"role": "user", "content": str(i)}] for i in range(count)],
        }
    )
    for split, count in (("train", 700), ("test", 20))
}


def save_arrow(path: Path) -> None:
    """Writes what `DatasetDict.save_to_disk` writes, as far as it is read."""
    path.mkdir()
    (path / "dataset_dict.json").write_text(json.dumps({"splits": list(TABLES)}))
    for split, table in TABLES.items():
        (path / split).mkdir()
        names = [f"data-{number:05d}-of-00003.arrow" for number in range(3)]
        state = {"_data_files": [{"filename": name} for name in names], "_split": None}
        (path / split / "state.json").write_text(json.dumps(state))
        size = -(-len(table) // 3)
        for number, name in enumerate(names):
            with pa.ipc.new_stream(path / split / name, table.schema) as writer:
                writer.write_table(table.slice(number * size, size), max_chunksize=50)


def save_parquet(path: Path, name: str = "data/{split}-00000-of-00001.parquet") -> None:
    for split, table in TABLES.items():
        file = path / name.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file, row_group_size=300)


@pytest.fixture(params=["arrow", "parquet"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """Returns the config of a saved data set with the splits train and test."""
    {"arrow": save_arrow, "parquet": save_parquet}[request.param](tmp_path / "saved")
    return DataConfig(
        dataset=f"arrow:{tmp_path / 'saved'}",
        validation_split="test",
        directory=str(tmp_path / "prepared"),
    )


@pytest.mark.parametrize("dataset", ["arrow:saved", "stdlib", "tokens:here"])
def test_skipping_is_refused_where_nothing_is_skipped(dataset: str):
    with pytest.raises(ConfigError, match="skip_bad_documents=True has no effect on dataset='"):
        DataConfig(dataset=dataset, skip_bad_documents=True)


def test_documents_are_read_by_their_numbers(saved: DataConfig):
    check_dataset(saved)
    documents = open_documents(saved, "train")
    again = reopen_documents(saved, "train", documents.directory)
    assert (len(documents), len(open_documents(saved, "test"))) == (700, 20)
    texts = TABLES["train"]["text"].to_pylist()
    for start, stop in ((0, 700), (233, 235), (290, 610), (650, 999), (700, 710), (5, 5)):
        assert [document.text for document in again.between(start, stop)] == texts[start:stop]
    (document,) = open_documents(saved, "test").between(3, 4)
    assert document.text == "test 3 é" and document.fields == {"n": 3}
    assert re.fullmatch(r"(data|test)-00000-of-0000\d\.(arrow|parquet):4", document.origin)


def test_a_list_of_messages_is_json(saved: DataConfig):
    config = dataclasses.replace(saved, text_field="messages")
    (document,) = open_documents(config, "test").between(7, 8)
    assert json.loads(document.text) == [{"role": "user", "content": "7"}]
    assert document.fields == {"text": "test 7 é", "n": 7}


def test_rows_are_made_of_it_and_made_anew_for_changed_files(saved: DataConfig):
    config = dataclasses.replace(saved, sequence_length=64)
    rows = prepare(config, "train", num_workers=2)
    assert (rows.num_documents, rows.source) == (700, source_name(config))
    assert prepare(config, "train") == rows
    save_parquet(Path(saved.dataset.removeprefix("arrow:")))
    file = next(Path(saved.dataset.removeprefix("arrow:")).rglob("*00000*"))
    file.touch()
    assert prepare(config, "train").directory != rows.directory


@pytest.mark.parametrize(
    "name", ["{split}.parquet", "{split}/0000.parquet", "{split}/any-1.parquet"]
)
def test_names_of_parquet_files_and_folders_are_splits(tmp_path: Path, name: str):
    save_parquet(tmp_path / "saved", name)
    config = DataConfig(dataset=f"arrow:{tmp_path / 'saved'}")
    assert [len(open_documents(config, split)) for split in ("train", "test")] == [700, 20]


def test_hugging_faces_own_files_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({name: datasets.Dataset(t) for name, t in TABLES.items()})
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    config = DataConfig(dataset=f"arrow:{tmp_path / 'saved'}")
    documents = open_documents(config, "train").between(0, 999)
    assert [document.text for document in documents] == TABLES["train"]["text"].to_pylist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_field": "words"},
            r"\S+ has no field 'words': set data.text_field to one of",
        ),
        ({"text_field": "n"}, r"/\S*:1 field 'n' holds int, no text: set data.text_field to one"),
        ({"validation_split": "x"}, r"split 'x' is not one of \S+: set the split to '\w+' or '\w"),
        ({"dataset": "arrow:/nonesuch"}, r"data.dataset='arrow:/nonesuch' is no directory: set it"),
        ({"dataset": "arrow:gs://a/b"}, r"data.dataset='gs://a/b' is an address"),
        ({"dataset": f"arrow:{Path(__file__).parent}"}, r"\S+ holds neither dataset_dict.json nor"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    saved: DataConfig, changes: dict[str, str], message: str
):
    config = dataclasses.replace(saved, **changes)
    with pytest.raises(ConfigError) as error:
        check_dataset(config)
        list(open_documents(config, "train").between(0, 1))
    assert re.match(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("end", [0.5, 0.9, 0.999])
def test_a_cut_file_is_refused_before_anything_starts(saved: DataConfig, end: float):
    file = sorted(Path(saved.dataset.removeprefix("arrow:")).rglob("*train*/data-00001*"))
    (file,) = file or Path(saved.dataset.removeprefix("arrow:")).rglob("train-*")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * end)])
    with pytest.raises(ConfigError, match=rf"^{file} is damaged or cannot be read \(.*\): copy"):
        check_dataset(saved)


def test_a_lone_data_set_says_how_to_make_splits(tmp_path: Path):
    save_arrow(tmp_path / "saved")
    config = DataConfig(dataset=f"arrow:{tmp_path / 'saved' / 'train'}")
    with pytest.raises(ConfigError, match=r"has no splits: save `dataset.train_test_split"):
        check_dataset(config)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dataset_dict.json", content)
        for content in ({}, [], {"splits": []}, {"splits": 3}, {"splits": [3]}, "[" * 10**5)
    ]
    + [("dataset_dict.json", {"splits": [name]}) for name in ("../out", "/", "..", "", "a\0")]
    + [("train/state.json", content) for content in ({}, [], {"_data_files": []}, "{")]
    + [
        ("train/state.json", {"_data_files": [name]})
        for name in (3, {}, {"filename": None}, {"filename": "../test/data-00000-of-00003.arrow"})
    ],
)
def test_a_description_that_names_no_data_is_refused_in_one_line(
    tmp_path: Path, file: str, content: object
):
    save_arrow(tmp_path / "saved")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "saved" / file).write_text(text)
    with pytest.raises(ConfigError) as error:
        check_dataset(DataConfig(dataset=f"arrow:{tmp_path / 'saved'}"))
    assert str(error.value).startswith(f"{tmp_path / 'saved' / file} ")
    assert str(error.value).endswith(": save the data set again") and "\n" not in str(error.value)


def test_several_data_sets_in_one_directory_are_refused(tmp_path: Path):
    for language in ("en", "fr"):
        save_parquet(tmp_path / "saved" / language, "{split}-0-of-1.parquet")
    config = DataConfig(dataset=f"arrow:{tmp_path / 'saved'}", validation_split="test")
    with pytest.raises(ConfigError, match=r"holds several data sets, whose split '\w+' is in "):
        check_dataset(config)


def test_the_end_of_an_arrow_file_must_be_there(tmp_path: Path):
    """A file that is cut between two batches can be read, and would lack rows in silence."""
    save_arrow(tmp_path / "saved")
    file = tmp_path / "saved/train/data-00000-of-00003.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    assert len(pa.ipc.open_stream(file.read_bytes()).read_all()) == 234
    with pytest.raises(ConfigError, match="the end of the stream is missing"):
        open_documents(DataConfig(dataset=f"arrow:{tmp_path / 'saved'}"), "train")


def test_a_document_names_its_file(saved: DataConfig):
    (document,) = open_documents(saved, "train").between(699, 700)
    assert document == Document("train 699 é", document.origin, {"n": 699})
