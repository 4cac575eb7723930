"""Prepares rows of conversations, and reads them back."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.config import ConfigError, DataConfig
from moe.data.prepare import prepare
from moe.data.sources.stdlib_functions import described_functions

ANSWERS = ["one", "twö", "three"]


class Talks(tfds.core.GeneratorBasedBuilder):
    """Has three conversations, and a split whose second document is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        texts = [
            json.dumps(
                [{"role": "user", "content": "n?"}, {"role": "assistant", "content": answer}]
            )
            for answer in ANSWERS
        ]
        damaged = {"damaged": [texts[0], "not messages"], "empty": [texts[0], ""]}
        splits = {"train": texts, **damaged}
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(self, texts: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
        for number, text in enumerate(texts):
            yield number, {"text": text}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    return DataConfig(
        dataset="talks",
        chat_template=str(template),
        packing="best_fit",
        sequence_length=12,
        directory=str(tmp_path),
    )


def test_answers_and_their_ends_are_the_targets_of_prepared_rows(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
):
    rows = prepare(config, "train")
    told = capsys.readouterr().err
    assert f" {rows.num_bytes} bytes of answers, " in told and "bytes per token" not in told
    targets = [rows[i]["targets"][rows[i]["loss_mask"]] for i in range(len(rows))]
    expected = b"".join(answer.encode() + b"\xff" for answer in ANSWERS)
    assert np.concatenate(targets).tolist() == list(expected)
    num_bytes = len("".join(ANSWERS).encode())
    assert (rows.num_documents, rows.num_bytes) == (3, num_bytes)
    assert rows.num_targets == num_bytes + 3


def test_another_template_has_other_rows(config: DataConfig):
    rows = prepare(config, "train")
    assert prepare(config, "train") == rows
    template = Path(config.chat_template)
    template.write_text(template.read_text() + "{# the same output #}")
    assert prepare(config, "train").directory != rows.directory


def test_what_is_wrong_is_named_with_its_place(config: DataConfig):
    with pytest.raises(ConfigError, match=r"damaged.* 1.*: the conversation 'not messages' is no"):
        prepare(config, "damaged")
    with pytest.raises(ConfigError, match=r"empty.* 1.*: the conversation '' is no"):
        prepare(config, "empty")
    short = dataclasses.replace(config, sequence_length=7)
    with pytest.raises(ConfigError, match="conversation has 9 tokens, and a row has room for 8"):
        prepare(short, "train")
    missing = dataclasses.replace(config, chat_template="nowhere.jinja")
    with pytest.raises(
        ConfigError, match=r"chat_template='nowhere.jinja' cannot be read \(No such"
    ):
        prepare(missing, "train")
    assert not list(config.path.glob("rows/*/metadata.json"))


SOURCE = '''
class A:
    def f(self, x):
        """Doubles
        a number.

        Not more.
        """
        # By addition.
        return x + x

    def g(self): return 1

    def h(self): "On one line."; return 1

def only_documented():
    """Does nothing."""
'''


def test_functions_are_asked_for_by_their_docstrings():
    ((request, answer),) = described_functions(SOURCE)
    assert request == "f: Doubles a number."
    assert answer.startswith('def f(self, x):\n    """Doubles\n    a number.\n\n    Not more.\n')
    assert answer.endswith('    """\n    # By addition.\n    return x + x')
    assert list(described_functions("print 'of Python 2'")) == []
