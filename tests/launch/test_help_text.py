"""What --help says of the fields of a config."""

import pytest

from launch.help_text import config_fields, field_comments, help_text
from moe.config import MoEConfig, RunConfig


def test_every_field_has_a_line_of_help_within_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    lines = help_text("", RunConfig()).splitlines()
    for name, _ in config_fields(RunConfig()):
        (number,) = [number for number, line in enumerate(lines) if line.startswith(f"  --{name}=")]
        assert lines[number + 1].startswith("      ") and len(lines[number + 1].strip()) > 5, (
            f"{name} has no comment"
        )
    assert max(len(line) for line in lines if not line.startswith(("  --", "Fields of"))) <= 70


def test_a_terminal_of_one_column_gets_the_help_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    assert "sparse layer" in help_text("", RunConfig())


def test_comments_above_and_beside_a_field_are_its_help() -> None:
    comments = field_comments(MoEConfig)
    assert comments["num_experts"] == (
        "The number of routed experts in a sparse layer. 0 makes every layer dense."
    )
    assert (
        comments["router"].startswith("How a router scores experts")
        and "divide a token" not in comments["router"]
    )
