"""The first page of docs/data.md: from a folder of the user's files to a sample."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import SMALL_MODEL

ROOT = Path(__file__).parents[2]
CHANGES = {**SMALL_MODEL, "data.sequence_length": 32, "train.batch_size": 8, "train.steps": 2}


def run(command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of launch/ from the root, as the page says."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def train(tmp_path: Path, dataset: str, **changes: object) -> subprocess.CompletedProcess[str]:
    values = CHANGES | {"data.dataset": dataset, "data.directory": tmp_path / "data"} | changes
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return run("train", "--config=configs/text_tiny.py", f"--workdir={tmp_path / 'run'}", *flags)


@pytest.mark.slow
def test_a_folder_of_files_becomes_a_sample(tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(100):
        (notes / f"{number}.md").write_text(f"# Note {number}\n\nThe weather was fine.\n")
    trained = train(tmp_path, f"text:{notes}")
    assert trained.returncode == 0, trained.stderr
    assert "validation/bits_per_byte" in (tmp_path / "run/metrics.jsonl").read_text()
    sampled = run(
        "generate", f"--workdir={tmp_path / 'run'}", "--prompt=# Note", "--max_new_tokens=8"
    )
    assert sampled.returncode == 0 and "\n# Note" in sampled.stdout, sampled.stderr


@pytest.mark.slow
def test_a_bad_file_ends_the_command_with_one_line(tmp_path: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    for dataset, message in (
        (f"text:{notes}/nonesuch", r"error: data.dataset='text:\S*' does not exist: .*"),
        (f"text:{notes}", rf"error: {notes}/a.jsonl:2 field 'text' is missing: .*"),
        ("tokens:/nonesuch", r"error: data.dataset='tokens:/nonesuch' has no file train.bin .*"),
        ("arrow:/nonesuch", r"error: data.dataset='arrow:/nonesuch' is no directory: .*"),
    ):
        refused = train(tmp_path, dataset)
        assert refused.returncode == 2
        assert re.fullmatch(message, refused.stderr.strip().splitlines()[-1]), refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"error: data.chat_template='\S*' cannot be read \(No such file .*"),
        ("{{ messages }", r"error: data.chat_template='\S*': line 1: unexpected '}': .*"),
    ],
)
def test_a_bad_template_is_told_before_anything_starts(
    tmp_path: Path, command: str, source: str | None, message: str
):
    template = tmp_path / "chat.jinja"
    if source is not None:
        template.write_text(source)
    flags = ["--config=configs/chat_tiny.py", f"--config.data.chat_template={template}"]
    flags += [f"--workdir={tmp_path / 'run'}"] * (command == "train")
    refused = run(command, *flags)
    assert refused.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = refused.stderr.splitlines()
    assert re.fullmatch(message, line)
