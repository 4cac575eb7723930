"""Tests that a command has large pages, and when it leaves its process as it is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.large_pages import SETTING, VALUE, VARIABLE, use_large_pages

ON_REQUEST = "always [madvise] never"


@pytest.mark.parametrize(
    ("setting", "environment", "value"),
    [
        (ON_REQUEST, {"HOME": "x"}, VALUE),
        ("[always] madvise never", {}, None),
        ("always madvise [never]", {}, None),
        (ON_REQUEST, {VARIABLE: ""}, None),
        (None, {}, None),
    ],
)
def test_a_command_starts_again_where_large_pages_are_given_on_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
    environment: dict[str, str],
    value: str | None,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["../python", "-m", "launch.train", "--flag=a b"])
    if setting:
        (tmp_path / "enabled").write_text(setting)
    use_large_pages(environment, tmp_path / "enabled")
    arguments = [sys.executable, "-m", "launch.train", "--flag=a b"]
    again = (sys.executable, arguments, environment | {VARIABLE: VALUE})
    assert started == ([again] if value else [])


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this system does not give large pages on request",
)
def test_a_command_has_large_pages_before_it_reads_its_config(tmp_path: Path) -> None:
    seen, config = tmp_path / "seen", tmp_path / "config.py"
    config.write_text(
        "import os\n"
        "from moe.config import RunConfig\n"
        f"with open({str(seen)!r}, 'a') as file:\n"
        f"    print(os.getpid(), os.environ.get({VARIABLE!r}), file=file)\n"
        "def get_config():\n"
        "    config = RunConfig.config_dict()\n"
        "    config.model.num_kv_heads = 3\n"  # a mistake, so that the command ends soon
        "    return config\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    command = [sys.executable, "-m", "launch.benchmark", f"--config={config}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert set(seen.read_text().splitlines()) == {f"{process.pid} {VALUE}"}
