"""Mistakes in a user's config file are reported as the file's own."""

import os
import re
from pathlib import Path

import pytest

from launch import command_line
from launch.config_file import check_config_file
from moe.config import ConfigError

ROOT = Path(__file__).parents[2]
RAISED = {
    "raise RuntimeError('out of luck')": "line 2: RuntimeError: out of luck",
    "raise RuntimeError('two\\nlines')": "line 2: RuntimeError: two lines",
    "raise StopIteration": "line 2: StopIteration",
    "raise KeyboardInterrupt": "line 2: KeyboardInterrupt",
    "raise MemoryError": "line 2: MemoryError",
    "raise Exception('of any kind')": "line 2: Exception: of any kind",
    "raise GeneratorExit": "line 2: GeneratorExit",
    "return get_config()": "line 2: RecursionError: maximum recursion depth exceeded",
    "import subprocess; subprocess.run(['false'], check=True)": (
        "line 2: subprocess.CalledProcessError: Command '['false']'"
    ),
    "import sys; sys.exit('done')": (
        "line 2: SystemExit: done: a config file must return its config, not end the program"
    ),
    "import os; os.chdir('/'); raise OSError('gone')": "line 2: OSError: gone",
    "import json; json.loads('{')": "line 2: json.decoder.JSONDecodeError: Expecting property name",
    "b'\\xff'.decode()": "line 2: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff",
    "from absl import flags; raise flags.ValidationError('one of absl')": (
        "line 2: absl.flags._exceptions.ValidationError: one of absl"
    ),
    "from moe.config import ModelConfig; ModelConfig(num_heads=3)": (
        "line 2: num_heads=3 is not a multiple of num_kv_heads=2: set num_kv_heads to one of"
    ),
    "import ml_collections; c = ml_collections.ConfigDict(); c.x = c.get_ref('y')": "line 2: ",
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("statement", RAISED)
def test_every_error_of_a_config_file_names_its_path_and_line(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(f"def get_config():\n    {statement}\n")
    with pytest.raises(ConfigError, match=re.escape(f"own.py, {RAISED[statement]}")) as caught:
        command_line._read_named_config(["command", "--config=own.py"], "own.py")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(
            ConfigError,
            match=r"^--config=\S+ is a FIFO, a socket or a device: set --config to a config file$",
        ):
            check_config_file(str(path))
    with pytest.raises(ConfigError, match=r"^--config=a{256}\.py: File name too long: set"):
        check_config_file(f"{'a' * 256}.py")


def test_a_config_of_the_repository_is_found_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf": set --config to {ROOT}/configs/dense_tiny.py, which is there$"
    ):
        check_config_file("configs/dense_tiny.py")
