"""Flags, --help and exit codes, of a small command that uses all that commands share."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import FieldReference
from ml_collections.config_dict import placeholder

from launch import command_line
from moe.config import ConfigError, RunConfig
from moe.exit_codes import BAD_INPUT
from tests.jobs import answers_within

ROOT = Path(__file__).parents[2]
COMMAND = '''"""Trains nothing.

Example:
    python command.py --config=config.py --workdir=DIR
"""
import sys
from absl import flags
from launch import command_line
from moe.exit_codes import DIVERGED

def main(values):
    config = command_line.read_run_config(values.config)
    if values.workdir == "bug":
        raise ValueError("a bug")
    if values.workdir == "full":
        raise OSError(28, "No space left on device")
    if values.workdir == "no checkpoint":
        raise FileNotFoundError("DIR has no checkpoint:\\nset --workdir to a trained run")
    open(values.workdir).close()
    print(config.train.steps, config.optimizer.learning_rate, config.tracking.tensorboard)
    print("jax" in sys.modules)
    return DIVERGED

if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The run directory.")
    flags.DEFINE_integer("samples", 4, "How many.")
    command_line.run(main, __doc__)
'''
CONFIGS = {
    "config.py": "from moe.config import RunConfig\ndef get_config():\n"
    "    return RunConfig.config_dict()\n",
    "half.py": "def get_config(steps):\n    return {'train': {'steps'\n",
    "name.py": "def get_config():\n    return RunConfig.config_dict()\n",
    "value.py": "def get_config():\n    raise ValueError('no such size')\n",
    "import.py": "import nowhere\n",
    "empty.py": "",
    "file.py": "def get_config():\n    return open('nowhere.txt')\n",
    "exit.py": "import sys\ndef get_config():\n    sys.exit(0)\n",
    "loop.py": "import time\nprint('begun', flush=True)\nwhile True:\n    time.sleep(0.01)\n",
    "none.py": "def get_config():\n    pass\n",
    "dict.py": "def get_config():\n    return [1]\n",
    "few_steps.py": "from moe.config import RunConfig\ndef get_config():\n"
    "    c = RunConfig.config_dict()\n    c.train.steps = 300\n    return c\n",
    "field.py": "from moe.config import RunConfig\ndef get_config():\n"
    "    c = RunConfig.config_dict()\n    c.train.step = 1\n    return c",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("command")
    for name, text in {"command.py": COMMAND, **CONFIGS}.items():
        (directory / name).write_text(text)
    return directory


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "command.py", *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )


WHOLE = ("--config=config.py", "--workdir=config.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Flags.
        ((), "--config is missing: set --config to a config file"),
        (("--config=config.py",), "--workdir is missing: set --workdir=VALUE"),
        ((*WHOLE, "--workdirs=x"), "--workdirs is not a flag: did you mean --workdir?"),
        ((*WHOLE, "--zzz=x"), "--zzz is not a flag: --help lists the flags"),
        (
            (*WHOLE, "--steps=3"),
            "--steps is not a flag: did you mean --config.train.steps?",
        ),
        (
            (*WHOLE, "--confg.train.steps=3"),
            "--confg.train.steps is not a flag: did you mean --config.train.steps?",
        ),
        (
            (*WHOLE, "--noscan_layers"),
            "--noscan_layers is not a flag: did you mean --config.model.scan_layers?",
        ),
        (
            (*WHOLE, "--samples=few"),
            "flag --samples=few: invalid literal for int() with base 10: 'few'",
        ),
        (("--config",), "Missing value for flag --config"),
        (
            ("--workdir=x", "--config.train.steps=3"),
            "--config is missing: set --config to a config file",
        ),
        (
            (*WHOLE, "stray"),
            "'stray' is not a flag: write flags as --name=value, and quote values that have spaces",
        ),
        # Fields.
        (
            (*WHOLE, "--config.train.step=3"),
            "--config.train.step is not a field: did you mean --config.train.steps?",
        ),
        (
            (*WHOLE, "--config.modle.num_heads", "3"),
            "--config.modle.num_heads is not a field: did you mean --config.model.num_heads?",
        ),
        ((*WHOLE, "--config.zzz=3"), "--config.zzz is not a field: --help lists the fields"),
        (
            (*WHOLE, "--config.train.steps=3.5"),
            "--config.train.steps=3.5 has the wrong type: "
            "set config.train.steps to a value of type int",
        ),
        (
            (*WHOLE, "--config.tracking.tensorboard=7"),
            "--config.tracking.tensorboard=7 has the wrong type: "
            "set config.tracking.tensorboard to a value of type bool",
        ),
        (
            (*WHOLE, "--config.model.num_heads=3"),
            "model.num_heads=3 is not a multiple of num_kv_heads=2: "
            "set num_kv_heads to one of 1, 3",
        ),
        # Config files.
        (
            ("--workdir=x", "--config=nowhere.py"),
            "--config=nowhere.py: No such file or directory: set --config to a config file",
        ),
        (
            ("--workdir=x", "--config=."),
            "--config=.: Is a directory: set --config to a config file",
        ),
        (("--workdir=x", "--config=half.py"), "half.py, line 2: SyntaxError: '{' was never closed"),
        (
            ("--workdir=x", "--config=name.py"),
            "name.py, line 2: NameError: name 'RunConfig' is not defined",
        ),
        (
            ("--workdir=x", "--config=value.py", "--config.train.steps=3"),
            "value.py, line 2: ValueError: no such size",
        ),
        (
            ("--workdir=x", "--config=import.py"),
            "import.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (
            ("--workdir=x", "--config=empty.py"),
            "empty.py has no get_config(): "
            "write one that returns RunConfig.config_dict() with your changes",
        ),
        (
            ("--workdir=x", "--config=file.py"),
            "file.py, line 2: FileNotFoundError: [Errno 2] No such file or directory: "
            "'nowhere.txt'",
        ),
        (
            ("--workdir=x", "--config=none.py"),
            "--config: get_config() returned None: "
            "return RunConfig.config_dict() with your changes",
        ),
        (
            ("--workdir=x", "--config=dict.py"),
            "--config: get_config() returned [1]: return RunConfig.config_dict() with your changes",
        ),
        (
            ("--workdir=x", "--config=exit.py"),
            "exit.py, line 3: SystemExit: 0: a config file must return its config, "
            "not end the program",
        ),
        (
            ("--workdir=x", "--config=field.py"),
            "train.step=1 is not a field: did you mean train.steps?",
        ),
        # Paths.
        (
            ("--workdir=config.py/x", "--config=config.py"),
            "[Errno 20] Not a directory: 'config.py/x'",
        ),
        (
            ("--workdir=/proc/x", "--config=config.py"),
            "[Errno 2] No such file or directory: '/proc/x'",
        ),
        (
            (f"--workdir={'x' * 300}", "--config=config.py"),
            f"--workdir='{'x' * 199}... has a name of 300 bytes: "
            "set it to a path whose files and directories have names of at most 255",
        ),
        (
            ("--workdir=no checkpoint", "--config=config.py"),
            "DIR has no checkpoint: set --workdir to a trained run",
        ),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    directory: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(directory, *arguments)
    assert (result.stderr, result.stdout, result.returncode) == (f"error: {message}\n", "", 2)


@pytest.mark.parametrize(
    ("variables", "is_shown"),
    [
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"JOBSET_NAME": "train", "JOB_COMPLETION_INDEX": "3"}, True),  # a pod has its own output
        ({"JAX_PROCESS_ID": "3"}, True),
    ],
)
def test_a_mistake_of_all_processes_of_a_job_is_printed_by_one(
    directory: Path, tmp_path: Path, variables: dict[str, str], is_shown: bool
) -> None:
    """The others have it in their logs, since it may be a mistake of their host alone."""
    done = subprocess.run(
        [sys.executable, directory / "command.py", "--config=nowhere.py", "--workdir=x"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("", 2)
    logs = list(tmp_path.rglob("process-0000[13].log"))
    found = done.stderr if is_shown else logs[0].read_text().split(" | ")[1]
    assert found.startswith("error: --config=nowhere.py") and found.count("\n") == 1
    assert (done.stderr == "", len(logs)) == ((False, 0) if is_shown else (True, 1))


def test_bad_input_is_answered_in_two_seconds(directory: Path) -> None:
    assert answers_within(2.0, lambda: run(directory, *WHOLE, "--config.model.num_heads=3"))


def test_main_gets_the_flags_and_its_exit_code_is_that_of_the_command(directory: Path) -> None:
    overrides = (
        "--config.train.steps=300",
        "--config.optimizer.learning_rate",
        "1",
        "--noconfig.tracking.tensorboard",
    )
    result = run(directory, *WHOLE, *overrides)
    assert (result.stdout, result.stderr, result.returncode) == ("300 1.0 False\nFalse\n", "", 3)


def test_every_command_takes_its_directories_the_same_way() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        assert not re.search(r"DEFINE_string\(\s*\"(workdir|from|init_from)\"", path.read_text()), (
            path
        )


@pytest.mark.parametrize(
    ("workdir", "last_line"),
    [("bug", "ValueError: a bug"), ("full", "OSError: [Errno 28] No space left on device")],
)
def test_an_error_that_is_not_bad_input_keeps_its_traceback(
    directory: Path, workdir: str, last_line: str
) -> None:
    result = run(directory, "--config=config.py", f"--workdir={workdir}")
    lines = result.stderr.splitlines()
    assert (lines[0], lines[-1], result.returncode) == (
        "Traceback (most recent call last):",
        last_line,
        1,
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_teaches_the_command_and_nothing_else(directory: Path, flag: str) -> None:
    result = run(directory, "--workdir=x", flag)
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.startswith(
        """Trains nothing.

Example:
    python command.py --config=config.py --workdir=DIR

Flags:
  --config=...
      Config file; --config.FIELD=VALUE changes one field of it. Required.
  --workdir=...
      The run directory. Required.
  --samples=...
      How many. (default: 4)

Fields of --config, with their default values:
  --config.task=language_modelling
      (language_modelling, fill_in_the_middle, masked_tokens, span_corruption or
      custom)
      What the model learns (docs/data/objectives.md). "custom" means that the
      program which trains it passes a Task to `fit`.
  --config.seed=0
      the seed of the parameters, the row order and all other random numbers

config.model: Describes a Transformer"""
    )
    field = "  --config.model.compute_dtype=bfloat16  (float32 or bfloat16)\n"
    assert f"{field}      The type of activations. " in result.stdout
    assert "logtostderr" not in result.stdout


def test_help_shows_the_values_of_a_config(directory: Path) -> None:
    result = run(
        directory, "--help", "--config=few_steps.py", "--config.train.batch_size=32", "--workdirs=x"
    )
    assert (result.stderr, result.returncode) == ("", 0)
    assert (
        "\nFields of --config, with their values in few_steps.py:\n  --config.task="
        in result.stdout
    )
    assert (
        "  --config.train.steps=300\n" in result.stdout
        and "  --config.train.batch_size=32\n" in result.stdout
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config=value.py", "value.py, line 2: ValueError: no such size"),
        (
            "--config.seed=x",
            "--config.seed=x has the wrong type: set config.seed to a value of type int",
        ),
    ],
)
def test_help_for_a_config_that_cannot_run_says_why(
    directory: Path, argument: str, message: str
) -> None:
    result = run(directory, "--help", "--config=config.py", argument)
    assert (result.stderr, result.stdout, result.returncode) == (f"error: {message}\n", "", 2)


def test_a_reference_that_fails_late_gets_one_line() -> None:
    config: Any = RunConfig.config_dict()
    parts = FieldReference(2)
    config.train.steps = 10 // parts
    parts.set(0)
    with pytest.raises(ConfigError, match=r"^--config: ZeroDivisionError: .*zero"):
        command_line.read_run_config(config)
    config = RunConfig.config_dict()
    config.train.steps = placeholder(int)
    with pytest.raises(ConfigError, match=r"^train\.steps=None has type NoneType"):
        command_line.read_run_config(config)


def test_a_config_that_never_ends_is_named_and_can_be_interrupted(directory: Path) -> None:
    command = [sys.executable, "command.py", "--workdir=x", "--config=loop.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "begun\n"
        assert process.stderr.readline() == "reading loop.py\n"
        process.send_signal(signal.SIGINT)
        assert re.fullmatch(
            r"error: loop\.py, line [34]: KeyboardInterrupt\n", process.stderr.read()
        )
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("", "--workdir='' is empty: set it to a path"),
        (
            "s3://bucket/run",
            "--workdir='s3://bucket/run' is no place for a run, which is a directory or at gs://: "
            "mount the store, and set it to the directory of the mount",
        ),
        (
            "hdfs://name/run",
            "--workdir='hdfs://name/run' is no place for a run, which is a directory or at gs://: "
            "mount the store, and set it to the directory of the mount",
        ),
        (
            "gs://bucket",
            "--workdir='gs://bucket' does not name a bucket and a directory in it: "
            "set it to gs://BUCKET/NAME",
        ),
        (
            "gs://bucket/../run",
            "--workdir='gs://bucket/../run' does not name a bucket and a directory in it: "
            "set it to gs://BUCKET/NAME",
        ),
        (
            "run\udcff",
            "--workdir='run\\udcff' is not UTF-8, or has a NUL: "
            "set it to a path in UTF-8 without NUL",
        ),
        ("~nobody_here/run", "--workdir='~nobody_here/run' names no user's home: set it to a path"),
    ],
)
def test_directories_are_checked_as_flags(directory: Path, workdir: str, message: str) -> None:
    result = run(directory, "--config=config.py", f"--workdir={workdir}")
    assert (result.stderr, result.stdout, result.returncode) == (f"error: {message}\n", "", 2)


def test_a_tilde_that_shells_leave_is_expanded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(directory))
    result = run(directory, "--config=~/config.py", "--workdir=~/config.py")
    assert (result.stdout, result.stderr, result.returncode) == ("1000 0.001 True\nFalse\n", "", 3)


def test_variables_that_jax_cannot_read_end_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_jax(values: flags.FlagValues) -> None:
        raise ValueError('Invalid value "x" for JAX flag jax_num_test')

    assert command_line._exit_code(import_jax, devices=False, prepare=None) == BAD_INPUT
    assert capsys.readouterr().err.startswith("error: JAX_NUM_TEST: ")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
    with pytest.raises(ConfigError, match="JAX_NUM_CPU_DEVICES=0 is no number of devices"):
        command_line._join(flags.FlagValues(), prepare=tuple)
