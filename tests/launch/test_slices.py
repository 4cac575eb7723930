"""Tests evaluations of other data than the run's, and of slices, up to the numbers themselves."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from launch.evaluate import (
    check_flags,
    define_flags,
    evaluate,
    evaluated_data,
    with_perplexities,
)
from launch.generate import generate
from launch.recorded_evaluations import read_evaluations
from launch.slices import MAX_SLICES, check_documents, divide, open_slices, splits_of
from moe.config import ConfigError, DataConfig, RunConfig, TrainConfig
from moe.data.rows import Rows
from moe.data.sources import Document, check_dataset, open_documents
from moe.data.token_files import open_token_rows
from tests.jobs import file_size_limit
from tests.tiny import TINY_MODEL


def documents(values: list[object]) -> list[Document]:
    return [Document(f"text {n}", f"a.jsonl:{n + 1}", {"by": v}) for n, v in enumerate(values)]


def test_documents_are_divided_by_their_values(tmp_path: Path):
    folders = divide(documents(["x", 3, "x"]), "by", tmp_path)
    assert folders.keys() == {"x", "3"}
    lines = (folders["x"] / "validation" / "documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["text 0", "text 2"]
    data = DataConfig(dataset=f"text:{folders['x']}", directory=str(tmp_path / "cache"))
    assert splits_of(data, None) == ("validation",) and splits_of(data, "train") == ("train",)


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_slice_that_does_not_fit_the_disk_is_named(size: int, tmp_path: Path):
    """A text of 10 characters is written when the file is closed, a longer one at once."""
    long = [Document(size * "a", "a.jsonl:1", {"by": value}) for value in "xy"]
    with file_size_limit(5), pytest.raises(OSError, match="File too large") as caught:
        divide(long, "by", tmp_path)
    slices = {str(tmp_path / f"slice{n}/validation/documents.jsonl") for n in range(2)}
    assert caught.value.filename in slices


def test_an_error_of_reading_documents_names_no_slice(tmp_path: Path):
    def read():
        yield Document("text", "a.jsonl:1", {"by": "x"})
        raise OSError(errno.EIO, "Input/output error")  # read() names no file

    with pytest.raises(OSError, match="Input/output error") as caught:
        divide(read(), "by", tmp_path)
    assert caught.value.filename is None


def test_a_field_must_be_there_and_have_few_values(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"--slice=on is no field of a.jsonl:1, which has by: set"
    ):
        divide(documents(["x"]), "on", tmp_path)
    with pytest.raises(ConfigError, match=r"--slice=by has more than 50 values, such as '50'"):
        divide(documents(list(range(MAX_SLICES + 1))), "by", tmp_path)


def test_empty_documents_make_no_slice(tmp_path: Path):
    """Rows leave them out, so a slice of nothing else would have no rows."""
    empty = Document("", "a.jsonl:9", {"by": "y"})
    assert divide([*documents(["x"]), empty], "by", tmp_path).keys() == {"x"}


def test_a_data_set_that_a_mixture_names_twice_is_sliced_twice(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "by": "x"}\n')
    data = DataConfig(dataset=f"text:{tmp_path}", directory=str(tmp_path / "cache"))
    (split,) = splits_of(data, None)
    found = []

    def open_rows(config: RunConfig, split: str) -> Rows:
        documents = open_documents(config.data, split)
        found.extend(document.text for document in documents.between(0, len(documents)))
        return StandInRows()

    with open_slices(RunConfig(), [(data, [split])] * 2, open_rows, "by") as slices:
        assert list(slices.sources) == ["by=x"]
    assert found == ["one", "one"]


class StandInRows:
    """Stands in for the rows of a slice that nothing reads."""

    sha256 = ""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {}


def test_tokens_have_no_fields_to_slice_by():
    data = DataConfig(dataset="tokens:here")
    with pytest.raises(ConfigError, match="--slice=by needs documents, and tokens:here holds only"):
        check_documents(data, "by")


def test_slices_are_opened_before_anything_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "by": "x"}\n')
    data = DataConfig(
        dataset=f"text:{tmp_path}", validation_split="train", directory=str(tmp_path / "cache")
    )
    config = RunConfig(data=data)
    rows = lambda config, split: StandInRows()
    program = types.SimpleNamespace(task=types.SimpleNamespace(rows=rows))
    loaded = (config, program, {}, 1)
    monkeypatch.setattr("launch.evaluate.read_config", lambda workdir: config)
    monkeypatch.setattr("launch.evaluate.saved_step", lambda workdir, step: 1)
    monkeypatch.setattr("moe.training.trainer.load_run", lambda workdir, step, kernels: loaded)
    with pytest.raises(ConfigError, match="--slice=on is no field"):
        evaluate(tmp_path, split="train", slice_by="on")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=a", "--data=text:b"], r"--data=\['text:b'\] has no effect with --tasks"),
        (["--tasks=a", "--split=train"], "--split='train' has no effect with --tasks"),
        (["--tasks=a", "--slice=by"], "--slice='by' has no effect with --tasks: leave --slice out"),
        (["--limit=3"], "--limit=3 has no effect without --tasks"),
        (["--num_fewshot=0"], "--num_fewshot=0 has no effect without --tasks"),
        (["--task_directory=d"], "--task_directory='d' has no effect without --tasks"),
        (["--tasks=a", "--limit=0"], "--limit=0 is too small: set it to 1 or more"),
        (["--tasks=a", "--num_fewshot=-1"], "--num_fewshot=-1 is too small: set it to 0 or more"),
    ],
)
def test_flags_that_could_not_be_heeded_are_refused(arguments: list[str], message: str):
    values = flags.FlagValues()
    define_flags(values)
    values(["evaluate", *arguments])
    with pytest.raises(ConfigError, match=message):
        check_flags(values)


def test_every_loss_has_its_perplexity():
    found = with_perplexities({"loss": 1.0, "text:a/loss": 0.0, "by=x/loss": 1e9, "bits": 2.0})
    assert found["perplexity"] == pytest.approx(math.e)
    assert (found["text:a/perplexity"], found["bits"]) == (1.0, 2.0)
    assert math.isfinite(found["by=x/perplexity"])
    json.dumps(found, allow_nan=False)


def test_other_data_keeps_the_runs_tokenizer():
    data = DataConfig(special_tokens=("<a>",), sequence_length=32)
    other = evaluated_data(data, None, ["text:a", "stdlib"])
    assert [(name, one.dataset) for name, one in other.items()] == [
        ("text:a", "text:a"),
        ("stdlib", "stdlib"),
    ]
    assert all(one.special_tokens == ("<a>",) for one in other.values())
    assert evaluated_data(data, "train", [])[""].validation_split == "train"
    skipping = dataclasses.replace(data, dataset="text:a", skip_bad_documents=True)
    others = evaluated_data(skipping, None, ["text:b", "stdlib"]).values()
    assert [one.skip_bad_documents for one in others] == [True, False]


@pytest.mark.parametrize("split", ["validation", "train"])
def test_token_files_of_one_split_are_evaluated(tmp_path: Path, split: str):
    """The other split is not read, so it need not be there."""
    np.save(tmp_path / f"{split}.npy", np.arange(64, dtype=np.uint16) % 250)
    name = f"tokens:{tmp_path}"
    asked = None if split == "validation" else split
    run = DataConfig(packing="pad", sequence_length=8, chat_template="chat.jinja")
    data = evaluated_data(run, asked, [name])[name]
    check_dataset(data)
    assert len(open_token_rows(data, splits_of(data, asked)[0])) == 8


MODEL = dataclasses.replace(TINY_MODEL, vocab_size=260)


def conversations(directory: Path) -> DataConfig:
    """Writes conversations of two kinds, and a template, and returns the config of this data."""
    template = directory / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    lines = [
        {
            "text": [
                {"role": "user", "content": f"{n} + 1?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ],
            "kind": "odd" if n % 2 else "even",
        }
        for n in range(80)
    ]
    for split, part in (("train", lines[:60]), ("validation", lines[60:])):
        (directory / "text" / split).mkdir(parents=True)
        path = directory / "text" / split / "a.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in part))
    return DataConfig(
        dataset=f"text:{directory}/text",
        chat_template=str(template),
        packing="pad",
        special_tokens=("<|user|>", "<|assistant|>", "<|end|>"),
        sequence_length=64,
        directory=str(directory / "cache"),
    )


@pytest.mark.slow
def test_a_run_on_conversations_is_evaluated_and_answers(tmp_path: Path):
    """It is trained for two steps, and needs nothing but its directory afterwards."""
    from moe.training.trainer import fit

    data = conversations(tmp_path)
    train = TrainConfig(batch_size=8, steps=2, eval_every=2, checkpoint_every=2)
    workdir = tmp_path / "run"
    fit(RunConfig(model=MODEL, data=data, train=train), workdir)
    Path(data.chat_template).unlink()
    command = [sys.executable, "-m", "launch.evaluate", f"--workdir={workdir}", "--slice=kind"]
    printed = subprocess.run([*command, "--record"], check=True, stdout=subprocess.PIPE).stdout
    values = json.loads(printed)
    (recorded,) = read_evaluations(workdir)
    assert {"step": recorded.step, **recorded.values} == values and recorded.slice_by == "kind"
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    # The slices have as many answers of as many bytes, and cover all of them.
    slices = [values[f"kind={kind}/loss"] for kind in ("even", "odd")]
    assert sum(slices) / 2 == pytest.approx(values["loss"], rel=0.05)
    whole = evaluate(workdir, datasets=[data.dataset])
    assert whole[f"{data.dataset}/loss"] == whole["loss"] != values["loss"]
    (text,) = generate(workdir, ["1 + 1?"], max_new_tokens=5)
    assert isinstance(text, str)
