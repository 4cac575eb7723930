"""Tests how rows of every task are shown, and counts of documents against plain ones."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from launch import data_statistics
from launch.data import Look, duplicates_line, html_page, look, text_page
from launch.data_rows import read_row, row_html, row_text
from launch.data_statistics import Source, count_documents, histogram, source_table
from moe.config import DataConfig, RunConfig
from moe.data.packing.concat import unpack
from moe.data.packing.targets import mark_targets
from moe.data.sources import Document
from moe.data.tokenizers import make_tokenizer

TOKENIZER = make_tokenizer(DataConfig(special_tokens=("<|end|>", "[MASK]")))
B, END, MASK = 255, 256, 257


def shown(fields: Mapping[str, np.ndarray], *, predicts_next: bool = True) -> list[str]:
    """Returns the lines of a row without the rules around documents."""
    streams = read_row(fields, TOKENIZER, predicts_next=predicts_next)
    lines = row_text(streams, in_colour=False).split("\n")
    return [line.rstrip("─ ") for line in lines]


def test_a_row_of_packed_documents():
    tokens = np.array([B, *"é".encode(), B, B, *b"ab", B])
    fields = unpack(tokens, np.array([4, 4]), 10)
    assert shown(fields) == [
        "── document 1, 4 tokens",
        "<boundary>é<boundary>",
        "── document 2, 4 tokens",
        "<boundary>ab<boundary>",
        "── 2 of padding",
    ]


def test_a_row_that_ends_in_padding_hides_nothing():
    fields = unpack(np.array([B, *b"ab", B]), np.array([4]), 8)
    fields["targets"][3] = 0
    assert shown(fields)[1] == "<boundary>ab<boundary>"


def test_the_answers_of_a_conversation_are_marked():
    tokens = np.array([B, *b"2+2?", *b"4", END, B])
    is_target = np.isin(np.arange(len(tokens)), [5, 6])
    fields = unpack(mark_targets(tokens, is_target), np.array([8]), 7)
    # The last token is neither predicted nor an input, so it is not in the row.
    assert shown(fields)[1] == "<boundary>2+2?«4»«<|end|>»"


def test_hidden_tokens_are_shown_with_what_they_hide():
    fields = {
        "tokens": np.array([B, *b"a", MASK, MASK, *b"d", B]),
        "targets": np.array([B, *b"abcd", B]),
        "loss_mask": np.array([0, 0, 1, 1, 0, 0], bool),
        "segment_ids": np.ones(6, np.int32),
    }
    assert shown(fields, predicts_next=False)[1] == "<boundary>a{[MASK][MASK] → bc}d<boundary>"
    page = row_html(read_row(fields, TOKENIZER, predicts_next=False))
    assert "<span class=hidden>[MASK][MASK]</span><span class=target>bc</span>" in page


def test_a_hidden_token_may_equal_the_next_one():
    """Only the task can say that the target is not the next token, which is the same."""
    fields = {
        "tokens": np.array([B, MASK, *b"a", B]),
        "targets": np.array([B, *b"aa", B]),
        "loss_mask": np.array([0, 1, 0, 0], bool),
        "segment_ids": np.ones(4, np.int32),
    }
    assert shown(fields, predicts_next=False)[1] == "<boundary>{[MASK] → a}a<boundary>"


def test_an_encoder_has_a_sequence_of_its_own():
    fields = {
        "encoder_tokens": np.array([*b"ab", 0]),
        "encoder_segment_ids": np.array([1, 1, 0]),
        "tokens": np.array([B, *b"x"]),
        "targets": np.array([*b"x", B]),
        "loss_mask": np.ones(2, bool),
        "segment_ids": np.ones(2, np.int32),
    }
    assert shown(fields) == [
        "── encoder document 1, 2 tokens",
        "ab",
        "── 1 of padding",
        "── document 1, 3 tokens",
        "<boundary>x<boundary>",
    ]


def test_colours_end_with_each_line_and_no_text_steers_the_terminal():
    fields = unpack(np.array([B, *b"a\nb\x1b[2J", B]), np.array([9]), 8)
    text = row_text(read_row(fields, TOKENIZER), in_colour=True)
    assert "\033[32ma\033[0m\n\033[32mb\\x1b[2J\033[0m" in text
    assert all(line.count("\033") == 2 * line.count("\033[0m") for line in text.split("\n"))
    assert "<boundary>" not in row_html(read_row(fields, TOKENIZER))  # it is escaped


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"index {number}", {}) for number, text in enumerate(texts)]


def test_documents_are_counted():
    counts = count_documents(documents(["a", "bb", "a", "", "ccé", "a"]))
    assert counts[:4] == (6, 9, 2, 1)
    assert counts.lengths[:4] == [3, 1, 1, 0]
    assert histogram(counts, row_bytes=3.0) == [
        ("1 B to 2 B", 3, ""),
        ("2 B to 4 B", 1, "about the length of a row"),
        ("4 B to 8 B", 1, ""),
    ]
    assert "6 documents of 9 bytes, of which 2 (33.3%)" in duplicates_line(counts)
    assert count_documents([])[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_distinct_hashes_are_counted_in_parts(at_once: int):
    """Bounded memory must not change the count: parts are exclusive and cover all hashes."""
    numbers = np.random.default_rng(0).integers(0, 50, 200).astype("<u8")
    file = io.BytesIO(numbers.tobytes())
    found = data_statistics._count_distinct(file, len(numbers), at_once)
    assert found == len(set(numbers.tolist()))


def test_the_table_says_what_is_unknown():
    class Unknown:
        def __len__(self) -> int:
            return 3

    known = Source("code", 2, 100, 50, 1, 0.985, 0)
    head, rows = source_table([known, Source.of_rows("other", Unknown())])
    assert len(head) == len(rows[0])
    assert rows[0] == ("code", "2", "100", "50", "2.000", "1", "98.5%", "0", "25.0%")
    assert rows[1] == ("other", "?", "?", "?", "?", "3", "?", "?", "75.0%")


def test_token_files_are_shown_as_rows(tmp_path: Path):
    """They have no documents, and nothing of them is known but their tokens and rows."""
    for split in ("train", "validation"):
        np.save(tmp_path / f"{split}.npy", np.array([*b"abcd", B, *b"ef", B], np.uint16))
    data = DataConfig(dataset=f"tokens:{tmp_path}", sequence_length=4)
    text = text_page(look(RunConfig(data=data), "train", 1), in_colour=False)
    assert "train row 0" in text and "abcd<boundary>" in text
    assert text.splitlines()[-1].split() == ["all", "?", "?", "8", "?", "2", "?", "?", "100.0%"]


def test_bytes_per_token_of_conversations_are_unknown():
    """Their bytes are those of the answers, and their tokens are those of whole conversations."""

    class Known:
        num_documents, num_bytes, num_tokens, fullness, num_cut = 2, 100, 50, 0.985, 0

        def __len__(self) -> int:
            return 1

    found = Source.of_rows("chats", Known(), are_conversations=True)
    assert found == Source("chats", 2, None, 50, 1, 0.985, 0)
    ((*_, per_token, _, _, _, _),) = source_table([found])[1]
    assert per_token == "?"
    assert Source.of_rows("chats", Known()).num_bytes == 100


def test_a_config_is_shown_whole(tmp_path: Path):
    """Both pages name every part, for data that is prepared on the way."""
    texts = "".join(f'{{"text": "<b>number {n % 7}"}}\n' for n in range(200))
    (tmp_path / "a.jsonl").write_text(texts)
    data = DataConfig(
        dataset=f"text:{tmp_path}/a.jsonl", sequence_length=32, directory=str(tmp_path / "cache")
    )
    found = look(RunConfig(data=data), "train", 2)
    assert [heading for heading, _ in found.rows] == ["train row 0", "train row 1"]
    text, page = text_page(found, in_colour=False), html_page(found, "Data of a")
    for part in ("train row 1", "<boundary><b>number", "bytes/token", "have exactly the text"):
        assert part in text
    assert "&lt;b&gt;number" in page and "<b>number" not in page
    assert isinstance(found, Look) and found.counts is not None
