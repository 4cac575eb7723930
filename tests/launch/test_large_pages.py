"""Tests that a command has large pages, and when it leaves its process as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.large_pages import VALUE, VARIABLE

# Stands for a command: prints who it is, once it has large pages or does without.
PROGRAM = """
import json, os, sys, types
sys.modules["__main__"].__spec__ = types.SimpleNamespace(name=sys.argv[2])
from pathlib import Path
from launch.large_pages import use_large_pages
use_large_pages(os.environ, Path(sys.argv[1]))
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), os.getpid(), sys.argv[3:]]))
"""


def start(setting: Path, name: str, **variables: str) -> object:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | variables
    command = [sys.executable, "-c", PROGRAM, str(setting), name, "--flag=a b"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    value, process_id, arguments = json.loads(output)  # one line: it printed once
    assert (process_id, arguments) == (process.pid, ["--flag=a b"])
    return value


@pytest.mark.parametrize(
    ("setting", "name", "variables", "value"),
    [
        ("always [madvise] never", "launch.train", {}, VALUE),
        ("[always] madvise never", "launch.train", {}, None),
        ("always madvise [never]", "launch.train", {}, None),
        ("always [madvise] never", "pytest.__main__", {}, None),
        ("always [madvise] never", "launch.train", {VARIABLE: ""}, ""),
    ],
)
def test_a_command_has_large_pages_where_they_are_given_on_request(
    tmp_path: Path, setting: str, name: str, variables: dict[str, str], value: str | None
) -> None:
    path = tmp_path / "enabled"
    path.write_text(setting)
    assert start(path, name, **variables) == value


def test_a_system_without_the_setting_is_left_alone(tmp_path: Path) -> None:
    assert start(tmp_path / "missing", "launch.train") is None


def test_commands_on_devices_ask_for_large_pages(tmp_path: Path) -> None:
    """A config file is read again by the command that was started again."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give large pages on request")
    seen, config = tmp_path / "seen", tmp_path / "config.py"
    config.write_text(
        "import os\n"
        "from moe.config import RunConfig\n"
        f"with open({str(seen)!r}, 'a') as file:\n"
        f"    print(os.environ.get({VARIABLE!r}), file=file)\n"
        "def get_config():\n"
        "    config = RunConfig.config_dict()\n"
        "    config.model.num_kv_heads = 3\n"  # a mistake, so that the command ends soon
        "    return config\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    command = [sys.executable, "-m", "launch.benchmark", f"--config={config}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    lines = seen.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("None", VALUE)
