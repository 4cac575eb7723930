"""Tests what each packing leaves on disk, and that any number of rows needs few open files."""

import dataclasses
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError, DataConfig, SourceConfig
from moe.data import prepare as module
from moe.data.prepare import PreparedRows, prepare
from moe.data.rows import JoinedRows
from moe.data.tokenizers import make_tokenizer
from moe.data.workers import write_in_processes
from tests.data.conftest import TRAIN
from tests.data.test_prepare import contents

DOCUMENTS = make_tokenizer(DataConfig()).encode_documents([text for text in TRAIN if text])


def packed(config: DataConfig, packing: str, length: int = 24) -> DataConfig:
    return dataclasses.replace(config, packing=packing, sequence_length=length)


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_other_packings_have_the_same_bytes_whatever_the_number_of_workers(
    fresh: DataConfig, tmp_path: Path, packing: str
):
    config = packed(fresh, packing)
    alone = prepare(config, "train", 1)
    moved = tmp_path / "moved"
    alone.directory.rename(moved)
    assert contents(prepare(config, "train", 2).directory) == contents(moved)


def test_few_large_documents_are_shared_by_processes(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    """A large plain file is cut into documents of a mebibyte, of which a gibibyte has few."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    asked = []

    def write(job, num_workers, advance):
        asked.append((job.num_shards, num_workers))
        return write_in_processes(job, num_workers, advance)

    monkeypatch.setattr(module, "write_in_processes", write)
    prepare(packed(fresh, "concat", 32), "train")
    assert asked == []  # 594 small documents
    monkeypatch.setattr(module, "_BYTES_PER_SHARD", 200)
    monkeypatch.setattr(module, "_BYTES_PER_WORKER", 1000)
    rows = prepare(packed(fresh, "concat"), "train")
    ((num_shards, num_workers),) = asked
    assert num_shards > 20 and num_workers == 2
    assert rows.num_documents == len(DOCUMENTS)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_metadata_says_how_full_rows_are_and_how_many_documents_are_cut(
    fresh: DataConfig, packing: str, capsys: pytest.CaptureFixture[str]
):
    rows = prepare(packed(fresh, packing), "train")
    fields = [rows[i] for i in range(len(rows))]
    # A row of T inputs has T + 1 places, and only the last target may be in the last one.
    num_placed = sum(
        np.count_nonzero(row["segment_ids"]) + int(row["loss_mask"][-1]) for row in fields
    )
    assert abs(rows.num_placed - num_placed) <= len(rows)
    assert rows.fullness == rows.num_placed / (25 * len(rows))
    longer = sum(len(document) > 25 for document in DOCUMENTS)
    assert longer and (rows.num_cut > longer if packing == "concat" else rows.num_cut == longer)
    found = sorted(np.concatenate([row["targets"][row["loss_mask"]] for row in fields]).tolist())
    assert found == sorted(np.concatenate([document[1:] for document in DOCUMENTS]).tolist())
    told = capsys.readouterr().err
    assert "prepared small_text/plain/1.2.3, train: 594 documents" in told
    assert f"{rows.fullness:.1%} full, {rows.num_cut:,} documents cut" in told
    assert {"concat": 0.97, "best_fit": 0.8, "pad": 0.6}[packing] < rows.fullness <= 1


def test_best_fit_fills_rows_of_2048_with_the_standard_library(tmp_path: Path):
    config = DataConfig(packing="best_fit", sequence_length=2048, directory=str(tmp_path))
    rows = prepare(config, "train")
    assert rows.fullness > 0.98
    assert rows.num_cut < rows.num_documents


def test_rows_of_the_first_format_are_read_as_they_are(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    """Version 1 had more shards, and its metadata did not know how full rows are."""
    monkeypatch.setattr(module, "_FORMAT_VERSION", 1)
    monkeypatch.setattr(module, "_DOCUMENTS_PER_SHARD", 100)
    old = prepare(fresh, "train")
    metadata = json.loads((old.directory / "metadata.json").read_text())
    del metadata["num_cut"], metadata["num_placed"]
    (old.directory / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.undo()
    found = prepare(fresh, "train")
    assert (found.directory, found.fullness, len(found)) == (old.directory, None, len(old))
    shutil.rmtree(old.directory)
    assert prepare(fresh, "train").fullness is not None


def open_files(directory: str) -> int:
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(directory)
        except FileNotFoundError:  # that of the listing itself
            continue
    return count


def test_at_most_64_files_are_open_whatever_is_read(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_DOCUMENTS_PER_SHARD", 6)
    monkeypatch.setattr(module, "_MAX_SHARDS", 100)
    sources = [prepare(packed(fresh, packing), "train", 1) for packing in ("concat", "pad")]
    assert [len(rows.rows_per_shard) for rows in sources] == [100, 100]
    joined = JoinedRows(dict(zip("ab", sources, strict=True)))
    most = 0

    def read(index: int) -> int:
        nonlocal most
        tokens = joined[index]["tokens"]
        if index % 50 == 0:
            most = max(most, open_files(fresh.directory))
        return int(tokens[0])

    expected = [int(rows[i]["tokens"][0]) for rows in sources for i in range(len(rows))]
    order = np.random.default_rng(0).permutation(len(joined))
    with ThreadPoolExecutor(4) as threads:
        found = dict(zip(order.tolist(), threads.map(read, order.tolist()), strict=True))
    assert [found[index] for index in range(len(joined))] == expected
    assert 30 < most <= 64


def test_a_document_that_a_worker_refuses_is_told_as_a_mistake(
    fresh: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\necho '{\"num_read\": 1}'\n"
        'echo \'{"refused": "a.txt:3 is not UTF-8: mend it"}\'\n'
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    with pytest.raises(ConfigError, match=r"^a\.txt:3 is not UTF-8: mend it$"):
        prepare(packed(fresh, "pad"), "train", 2)
    assert not list(Path(fresh.directory, "rows").glob(".*"))


def test_a_mixture_is_prepared_source_by_source(fresh: DataConfig):
    source = SourceConfig("a", "small_text/plain", weights=(1.0,))
    mixed = DataConfig(mixture=(source,), directory=fresh.directory, sequence_length=8)
    with pytest.raises(ConfigError, match=r"^data\.mixture has several sources"):
        prepare(mixed, "validation")
    rows = prepare(mixed.for_source(source), "validation")
    assert isinstance(rows, PreparedRows) and rows == prepare(fresh, "validation")
