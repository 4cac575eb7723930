"""Tests the training of BPEs, and the command that trains one."""

import contextlib
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import tokenizer as command
from moe.config import ConfigError, DataConfig
from moe.data.sources import Document
from moe.data.tokenizers import make_tokenizer
from moe.data.tokenizers.training import SMALLEST, sample_texts, train_bpe
from tests.data.tokenizers.conftest import TEXTS

ROOT = Path(__file__).parents[3]


class Numbered:
    """Has documents of ten bytes each, and knows how many of them were read."""

    directory = ""

    def __init__(self, number: int):
        self.number, self.read = number, 0

    def __len__(self) -> int:
        return self.number

    def between(self, start: int, stop: int) -> Iterator[Document]:
        for number in range(start, min(stop, self.number)):
            self.read += 1
            yield Document(f"{number:010d}", "", {})


def test_merges_worked_out_by_hand() -> None:
    """In "abab abab cab" the pair a b is the most frequent one, then ab ab, within words."""
    saved = json.loads(train_bpe(["abab abab cab"], SMALLEST + 2).tokenizer_json(SMALLEST + 2))
    assert saved["model"]["merges"] == [["a", "b"], ["ab", "ab"]]
    assert saved["model"]["vocab"]["<|endoftext|>"] == 0


def test_the_same_text_gives_the_same_bytes_and_smaller_ones_are_beginnings() -> None:
    large = train_bpe(TEXTS, 700)
    assert large.tokenizer_json(700) == train_bpe(iter(TEXTS), 700).tokenizer_json(700)
    assert large.tokenizer_json(400) == train_bpe(TEXTS, 400).tokenizer_json(400)
    assert large.tokenizer_json(SMALLEST) == train_bpe(TEXTS, SMALLEST).tokenizer_json(SMALLEST)


def test_a_text_with_too_few_pairs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^vocab_size=300 is out of range: set it between 257"):
        train_bpe(["ab"], 300).tokenizer_json(300)


def test_a_sample_comes_from_everywhere_within_its_bytes() -> None:
    documents = Numbered(100_000)
    texts = list(sample_texts(documents, 100_000))
    assert texts == list(sample_texts(Numbered(100_000), 100_000))
    assert len(set(texts)) == 10_000 and documents.read < 10_100
    numbers = sorted(map(int, texts))
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 10_000
    assert sorted(map(int, sample_texts(Numbered(1000), 10**6))) == [*range(1000)]


def test_a_document_that_does_not_fit_is_cut() -> None:
    """Without that, a first document that is too large would leave nothing to train on."""
    samples = {room: list(sample_texts(Numbered(64), room)) for room in (5, 10, 12)}
    assert samples == {5: ["0" * 5], 10: ["0" * 10], 12: ["0" * 10, "00"]}


def test_no_character_is_cut() -> None:
    class Accented(Numbered):
        def between(self, start: int, stop: int) -> Iterator[Document]:
            yield Document("éé", "", {})

    assert list(sample_texts(Accented(1), 3)) == ["é"]


def test_the_command_writes_a_file_and_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = {"train": TEXTS, "validation": TEXTS[:2]}

    class Texts(Numbered):
        def __init__(self, split: str):
            super().__init__(len(texts[split]))
            self.split = split

        def between(self, start: int, stop: int) -> Iterator[Document]:
            for text in texts[self.split][start:stop]:
                yield Document(text, "", {})

    monkeypatch.setattr(command, "open_documents", lambda config, split: Texts(split))
    monkeypatch.setattr(command, "SIZES", (300, 400))
    path = tmp_path / "small.json"
    table = command.train_tokenizer(DataConfig(), 350, path, 10**6).splitlines()
    assert path.read_text() == train_bpe(TEXTS, 350).tokenizer_json(350)
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(path)))
    num_bytes = sum(len(text.encode()) for text in TEXTS[:2])
    num_tokens = sum(len(tokenizer.encode(text)) for text in TEXTS[:2])
    assert table[0] == f"{num_bytes:,} held-out bytes:"
    assert [line.split()[0] for line in table[2:]] == ["300", "350", "400"]
    ratio = f"{num_bytes / num_tokens:.3f}"
    assert table[3].split() == ["350", ratio, f"{num_tokens:,}", "<-", "this", "one"]


def test_a_terminal_shows_how_much_text_is_read(tmp_path: Path) -> None:
    """The package counts to 0 if it is not told how many texts there are."""
    for split, count in (("train", 7), ("validation", 1)):
        (tmp_path / "text" / split).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "text" / split / f"{number}.txt").write_text(f"{split} {number}")
    terminal, end = pty.openpty()
    arguments = [f"--data=text:{tmp_path}/text", "--vocab_size=257", f"--out={tmp_path}/x.json"]
    command = [sys.executable, "-m", "launch.tokenizer", *arguments, f"--directory={tmp_path}/data"]
    subprocess.run(command, cwd=ROOT, stderr=end, stdout=subprocess.DEVNULL, check=True)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the end of the terminal
        while chunk := os.read(terminal, 2**16):
            shown += chunk
    os.close(terminal)
    assert re.search(rb"sequences\W+7\s+/\s+7\b", shown), shown


def test_token_files_hold_no_text_to_train_on(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    arguments = ["--data=tokens:tokens", "--vocab_size=300", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.tokenizer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not out.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --data=tokens:tokens holds tokens and no text: set --data to")


def test_out_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out=.* is a directory: set --out to a file"):
        command.read_out(str(tmp_path))
    assert command.read_out(str(tmp_path / "new" / "x.json")).parent.is_dir()
