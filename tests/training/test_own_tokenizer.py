"""A run with a tokenizer of its own is trained, resumed, evaluated and read without the file."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import evaluate
from launch.generate import generate
from moe.config import ConfigError, DataConfig, RunConfig, TrainConfig
from moe.data.prepare import prepare
from moe.data.sources import open_documents
from moe.data.tokenizers import make_tokenizer
from moe.data.tokenizers.training import train_bpe
from moe.training.trainer import fit
from tests.tiny import TINY_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
TEXTS = [path.read_text() for path in sorted((ROOT / "moe" / "config").glob("*.py"))]
MODEL = dataclasses.replace(TINY_MODEL, vocab_size=512)


def run_of(steps: int, file: Path, data_directory: str) -> RunConfig:
    data = DataConfig(tokenizer=str(file), sequence_length=64, directory=data_directory)
    train = TrainConfig(steps=steps, batch_size=8, eval_every=100, checkpoint_every=2)
    return RunConfig(model=MODEL, data=data, train=train)


def test_a_run_needs_its_own_copy_alone(tmp_path: Path, data_directory: str) -> None:
    file, workdir = tmp_path / "bpe.json", tmp_path / "run"
    merges = train_bpe(TEXTS, 512)
    file.write_text(merges.tokenizer_json(500))
    config = run_of(2, file, data_directory)
    first = fit(config, workdir)
    # Bits per byte counts the bytes of the text, and each document's end as a token to predict.
    tokenizer, rows = make_tokenizer(config.data), prepare(config.data, "validation")
    documents = open_documents(config.data, "validation")
    texts = [document.text for document in documents.between(0, len(documents))]
    assert rows.num_bytes == sum(len(text.encode()) for text in texts)
    assert rows.num_targets == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    file.unlink()
    result = evaluate(workdir)
    expected = result["loss"] * rows.num_targets / rows.num_bytes / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(expected)
    assert result["loss"] == pytest.approx(first["validation/loss"], rel=1e-4)
    assert isinstance(generate(workdir, ["def f"], max_new_tokens=4)[0], str)
    np.save(tmp_path / "validation.npy", np.arange(500, dtype=np.uint16))
    assert evaluate(workdir, datasets=[f"tokens:{tmp_path}"])["loss"] > 0
    fit(run_of(3, file, data_directory), workdir)
    file.write_text(merges.tokenizer_json(490))
    with pytest.raises(ConfigError, match="is another tokenizer than that of"):
        fit(run_of(4, file, data_directory), workdir)
