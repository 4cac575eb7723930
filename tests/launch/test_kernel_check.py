"""Tests the check of kernels on the first start on a kind of device.

Processes of a few lines stand in for the one that runs a kernel on a device.
"""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import pytest

import launch
from launch import kernel_check
from launch.benchmark import benchmark
from launch.kernel_check import Checker
from moe import files
from moe.config import MoEConfig, RunConfig
from moe.config.model import AttentionConfig
from moe.exit_codes import INTERRUPTED
from moe.kernels.attention import choice
from moe.kernels.benchmarks.first_start import calls_of
from moe.model.attention import without_kernels
from moe.parallel.mesh import make_mesh
from moe.training import trainer
from moe.training.train_step import make_program
from moe.workdir.identity import ABOUT_FILE, write_config
from tests.jobs import wait_until
from tests.parallel.test_distributed import run_processes
from tests.tiny import TINY_MODEL

ROOT = Path(__file__).parents[2]
MODEL = dataclasses.replace(TINY_MODEL, compute_dtype="bfloat16", vocab_size=512)
CONFIG = RunConfig(model=MODEL)
SPARSE = RunConfig(model=dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4)))
OTHER = dataclasses.replace(CONFIG, task="masked_tokens")  # whose attention is not causal
SHORT = 10.0  # seconds, in which a process begins even on a busy machine
CALL = "attention of 2 heads of 8, causal True, bfloat16"

# Tells a chip, and then what BODY tells of a kernel. Each process leaves a line in "asked".
PROCESS = """
import json, os, signal, sys, time
request = json.load(sys.stdin)
kernel = request.get("kernel", "no kernel")
with open("{folder}/asked", "a") as file:
    print(kernel, request.get("operation", ""), file=file)
tell = lambda **found: print(json.dumps(found), flush=True)
tell(chip="{chip}")
if kernel == "no kernel":
    sys.exit()
{body}
"""
RIGHT = "tell(began=True); tell(problem=None)"
WRONG = "tell(began=True); tell(problem='it is wrong' if kernel == 'hopper' else None)"


@pytest.fixture(autouse=True)
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_device(tmp_path / "pci", "0000:01:00.0", "0x10de", "0x2330", "0x030200")
    monkeypatch.setattr(kernel_check, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(kernel_check, "_has_cuda", lambda: True)
    # What is announced where a check takes more than a second is not looked at here.
    monkeypatch.setattr(files, "_ANNOUNCE_AFTER", 1e6)


def add_device(folder: Path, address: str, vendor: str, device: str, kind: str) -> None:
    numbers = {"vendor": vendor, "device": device, "subsystem_device": "0x1", "class": kind}
    for name, number in numbers.items():
        path = folder / address / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")


def checker(folder: Path, body: str, limit_s: float = 60.0, **options: Any) -> Checker:
    chip = options.pop("chip", "NVIDIA H200")
    environment = {"CUDA_VISIBLE_DEVICES": "0", "XDG_CACHE_HOME": str(folder)} | options
    code = PROCESS.format(folder=folder, chip=chip, body=body)
    return Checker(environment, (sys.executable, "-c", code), limit_s)


def know_chip(folder: Path, chip: str) -> None:
    """Lets an earlier start have found out which chip is here."""
    checker(folder, RIGHT, chip=chip).check(OTHER)
    asked(folder)


def asked(folder: Path) -> list[str]:
    """Returns what has been asked of processes since the last call."""
    path = folder / "asked"
    lines = [line.strip() for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_what_was_found_right_is_not_checked_again(tmp_path, capsys) -> None:
    first = checker(tmp_path, RIGHT).check(CONFIG)
    assert first == {
        "chip": "NVIDIA H200",
        "found": {f"hopper, {CALL}": None},
        "refused": {"attention": [], "experts": []},
    }
    assert asked(tmp_path) == ["no kernel", "hopper attention"]
    assert checker(tmp_path, "sys.exit(1)").check(CONFIG) == first
    assert asked(tmp_path) == [] and capsys.readouterr().err == ""


def test_a_kernel_that_is_wrong_is_refused_in_a_line_at_each_start(tmp_path, capsys) -> None:
    for processes in (["no kernel", "hopper attention", "cudnn attention"], []):
        answer = checker(tmp_path, WRONG).check(CONFIG)
        assert answer["refused"] == {"attention": ["hopper"], "experts": []}
        assert asked(tmp_path) == processes
        line = capsys.readouterr().err
        start = f"kernel 'hopper' is refused: it is wrong ({CALL}); to check it again, delete "
        assert line.startswith(start) and line.count("\n") == 1
    Path(line.removeprefix(start).strip()).unlink()
    assert checker(tmp_path, RIGHT).check(CONFIG)["refused"]["attention"] == []
    assert asked(tmp_path) == ["hopper attention"]


@pytest.mark.parametrize(
    ("end", "limit_s", "how"),
    [
        ("sys.exit(7)", 60.0, "ended with code 7"),
        ("os.abort()", 60.0, "ended with code -6"),
        # Ten seconds pass before it is killed.
        pytest.param(
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
            SHORT,
            "took more than",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_not_tried_again(
    tmp_path, capsys, end, limit_s, how
) -> None:
    know_chip(tmp_path, "TPU v5")
    for processes in (["tpu attention"], []):
        found = checker(tmp_path, f"tell(began=True); {end}", limit_s).check(CONFIG)
        assert found["refused"]["attention"] == ["tpu"]
        assert asked(tmp_path) == processes
        lines = capsys.readouterr().err.splitlines()
        refused = [line for line in lines if line.startswith("kernel 'tpu' is refused: ")]
        assert len(refused) == 1 and f": its check {how}" in refused[0]


def test_the_next_kernel_after_a_crash_is_kept_as_well(tmp_path) -> None:
    body = "tell(began=True); os.abort()"
    for processes in (["no kernel", "hopper attention", "cudnn attention"], []):
        answer = checker(tmp_path, body).check(CONFIG)
        assert answer["refused"]["attention"] == ["hopper", "cudnn"]
        assert asked(tmp_path) == processes


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_check_that_somebody_else_ended_says_nothing_for_later(
    tmp_path, capsys, signal_name
) -> None:
    body = f"""
signal.signal(signal.SIGINT, signal.SIG_DFL)
tell(began=True)
os.kill(os.getpid(), signal.{signal_name})
"""
    answer = checker(tmp_path, body).check(CONFIG)
    assert answer["refused"]["attention"] == ["hopper", "cudnn"]
    assert "to check it again" not in capsys.readouterr().err
    assert checker(tmp_path, RIGHT).check(CONFIG)["refused"]["attention"] == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sys.exit('no memory')", "ended with code 1 (no memory)"),
        ("os.abort()", "ended with code -6"),
        ("time.sleep(600)", "took more than 1 s"),
    ],
)
def test_a_check_that_cannot_begin_is_told_and_refuses_nothing(tmp_path, capsys, body, why) -> None:
    know_chip(tmp_path, "NVIDIA H200")
    # The last one does not begin, however long it has.
    answer = checker(tmp_path, body, 60.0 if "sleep" not in body else 1.0).check(CONFIG)
    assert answer["refused"] == {"attention": [], "experts": []}
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"kernel 'hopper' was not checked: its process {why}"
    checker(tmp_path, RIGHT).check(CONFIG)
    assert asked(tmp_path)[-1] == "hopper attention"


def test_a_check_that_cannot_be_started_is_told_and_refuses_nothing(tmp_path, capsys) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0", "XDG_CACHE_HOME": str(tmp_path)}
    answer = Checker(environment, (str(tmp_path / "nothing"),)).check(CONFIG)
    assert answer["refused"] == {"attention": [], "experts": []}
    line = capsys.readouterr().err
    assert line.startswith("kernels were not checked: the process that asks for the kind of device")
    assert "could not be started ([Errno 2] No such file or directory" in line
    assert line.count("\n") == 1


def test_what_is_known_is_refused_where_another_check_cannot_begin(tmp_path, capsys) -> None:
    wrong = "tell(began=True); tell(problem='no' if request['operation'] == 'experts' else None)"
    first = checker(tmp_path, wrong, chip="TPU v5").check(SPARSE)
    assert first["refused"] == {"attention": [], "experts": ["tpu"]}
    other = dataclasses.replace(SPARSE, task="masked_tokens")  # whose attention is not known yet
    answer = checker(tmp_path, "sys.exit(1)", chip="TPU v5").check(other)
    assert answer["refused"] == first["refused"]
    assert not any("causal False" in call for call in answer["found"])
    assert capsys.readouterr().err.count("kernel 'tpu' was not checked: ") == 1


def test_what_a_compiler_prints_does_not_end_the_command(tmp_path) -> None:
    body = """
os.write(1, b"{module @a}\\n\\xff\\n")
os.write(2, b"\\xff\\n")
tell(began=True)
os.abort()
"""
    assert checker(tmp_path, body).check(CONFIG)["refused"]["attention"] == ["hopper", "cudnn"]


def test_a_process_that_got_another_device_checks_nothing() -> None:
    """JAX takes a CPU, in silence, where a TPU is busy."""
    run = kernel_check.request_of(CONFIG)
    call = calls_of(run)["attention"][0]
    asked = {"parent": os.getpid(), "chip": "TPU v5", "run": run, "kernel": "blockwise"}
    asked |= {"operation": "attention", "call": call.text}
    command = [sys.executable, "-m", "launch.kernel_process"]
    options = {"capture_output": True, "text": True, "check": False, "cwd": ROOT}
    done = subprocess.run(command, input=json.dumps(asked), **options)
    assert done.returncode == 1 and "began" not in done.stdout
    assert done.stderr.splitlines()[-1] == "JAX found 'cpu', not 'TPU v5'"
    done = subprocess.run(command, input=json.dumps(asked | {"chip": "cpu"}), **options)
    assert json.loads(done.stdout.splitlines()[-1]) == {"problem": None}


def test_operations_are_refused_apart(tmp_path) -> None:
    """Attention and experts both have a kernel "tpu", of which one may be right."""
    body = "tell(began=True); tell(problem=None if request['operation'] == 'attention' else 'no')"
    answer = checker(tmp_path, body, chip="TPU v5").check(SPARSE)
    assert answer["refused"] == {"attention": [], "experts": ["tpu"]}
    assert list(answer["found"].values()) == [None, "no"]


def test_an_earlier_start_finds_nothing_for_other_versions(tmp_path, monkeypatch) -> None:
    checker(tmp_path, WRONG).check(CONFIG)
    asked(tmp_path)
    real = kernel_check.hash_kernels
    monkeypatch.setattr(kernel_check, "hash_kernels", lambda: "other files")
    assert checker(tmp_path, RIGHT).check(CONFIG)["refused"]["attention"] == []
    assert asked(tmp_path) == ["hopper attention"]
    monkeypatch.setattr(kernel_check, "hash_kernels", real)
    assert checker(tmp_path, RIGHT).check(CONFIG)["refused"]["attention"] == ["hopper"]
    assert asked(tmp_path) == []


def test_a_file_of_another_kernel_changes_the_hash(tmp_path, monkeypatch) -> None:
    for name in ("kernels", "launch"):
        (tmp_path / name).mkdir()
    (tmp_path / "launch" / "kernel_process.py").touch()
    monkeypatch.setattr(kernel_check, "ROOT", tmp_path)
    hashes = []
    for name in ("a.py", "blocks.json"):
        (tmp_path / "kernels" / name).write_text(name)
        hashes.append(kernel_check.hash_kernels())
    (tmp_path / "kernels" / "a.py").write_text("b")
    assert len({*hashes, kernel_check.hash_kernels()}) == 3


@pytest.mark.parametrize("content", ["", '{"subject": "NVID', "[]", '{"subject": "x"}', "\xff"])
def test_a_file_that_is_damaged_is_told_and_written_again(tmp_path, capsys, content) -> None:
    checker(tmp_path, RIGHT).check(CONFIG)
    kept = sorted((tmp_path / "moe" / "kernels").iterdir())
    for path in kept:
        path.write_bytes(content.encode("latin-1"))
    asked(tmp_path)
    assert checker(tmp_path, RIGHT).check(CONFIG)["chip"] == "NVIDIA H200"
    assert asked(tmp_path) == ["no kernel", "hopper attention"]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" cannot be read (")[0] for line in lines) == [*map(str, kept)]
    checker(tmp_path, RIGHT).check(CONFIG)
    assert asked(tmp_path) == [] and capsys.readouterr().err == ""


def test_a_home_that_cannot_be_written_is_told_once(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    body = RIGHT.replace("None", "'it is wrong'")
    found = checker(tmp_path, body, XDG_CACHE_HOME=str(tmp_path / "file")).check(CONFIG)
    assert found["refused"]["attention"] == ["hopper", "cudnn"]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(
        f"{tmp_path}/file/moe/kernels cannot be written (Not a directory), so"
    )
    assert told[1:] == [
        f"kernel {name!r} is refused: it is wrong ({CALL})" for name in ("hopper", "cudnn")
    ]


def test_starts_at_the_same_time_lose_nothing(tmp_path, capsys) -> None:
    """Each waits in its check until all are there, and then all write."""
    body = f"""
folder = "{tmp_path}/here"
os.makedirs(folder, exist_ok=True)
open(f"{{folder}}/{{os.getpid()}}", "w").close()
while len(os.listdir(folder)) < 3:
    time.sleep(0.01)
{RIGHT}
"""
    program = f"""
import sys
from pathlib import Path
from launch import kernel_check
from tests.launch.test_kernel_check import CONFIG, checker, dataclasses
kernel_check._PCI = Path("{tmp_path}/pci")
kernel_check._has_cuda = lambda: True
config = dataclasses.replace(CONFIG, task=sys.argv[1])
checker(Path("{tmp_path}"), {body!r}, limit_s=600.0).check(config)
"""
    tasks = ("language_modelling", "masked_tokens", "language_modelling")
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program, task], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for task in tasks
    ]
    written = [start.communicate()[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0], written
    assert not any("cannot be" in text for text in written)
    asked(tmp_path)
    for task in tasks:
        checker(tmp_path, "sys.exit(1)").check(dataclasses.replace(CONFIG, task=task))
    assert asked(tmp_path) == [] and capsys.readouterr().err == ""


def test_gpus_of_several_kinds_are_asked_for_their_kind_at_each_start(tmp_path) -> None:
    add_device(tmp_path / "pci", "0000:02:00.0", "0x10de", "0x20b2", "0x030200")
    for chip in ("NVIDIA H200", "NVIDIA A100"):
        assert checker(tmp_path, RIGHT, chip=chip).check(CONFIG)["chip"] == chip
    assert asked(tmp_path)[::2] == ["no kernel"] * 2


def test_bridges_and_network_cards_are_no_kinds_of_gpus(tmp_path) -> None:
    alone = kernel_check.list_accelerators()
    add_device(tmp_path / "pci", "0000:03:00.0", "0x10de", "0x22a3", "0x068000")
    add_device(tmp_path / "pci", "0000:04:00.0", "0x15b3", "0x1021", "0x020000")
    assert kernel_check.list_accelerators() == alone == "0x10de:0x2330:0x1"
    (tmp_path / "pci" / "0000:01:00.0" / "class").unlink()
    assert kernel_check.list_accelerators() is None


def test_the_process_of_a_check_joins_no_job(tmp_path) -> None:
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "MEGASCALE_COORDINATOR_ADDRESS", "OWN"]
    body = f"tell(began=True); tell(problem=repr([x for x in {names} if x in os.environ]))"
    found = checker(tmp_path, body, **dict.fromkeys(names, "1")).check(CONFIG)["found"]
    assert found[f"hopper, {CALL}"] == "['OWN']"


def test_nothing_is_checked_where_nothing_would_be_chosen(tmp_path) -> None:
    on_cpu = checker(tmp_path, RIGHT, JAX_PLATFORMS="cpu")
    assert on_cpu.check(SPARSE) == {}
    moe = MoEConfig(num_experts=4, dispatch="capacity")
    named = AttentionConfig(implementation="hopper")
    model = dataclasses.replace(MODEL, moe=moe, attention=named)
    assert checker(tmp_path, RIGHT).check(RunConfig(model=model)) == {}
    assert asked(tmp_path) == []


def test_accelerators_that_jax_did_not_find_are_asked_for_again(tmp_path, capsys) -> None:
    """As with a driver that was broken, or CUDA_VISIBLE_DEVICES=NoDevFiles."""
    assert checker(tmp_path, RIGHT, chip="cpu").check(CONFIG)["found"] == {}
    assert "kernels were not checked: JAX found no accelerator" in capsys.readouterr().err
    assert checker(tmp_path, RIGHT).check(CONFIG)["found"] == {f"hopper, {CALL}": None}
    assert asked(tmp_path) == ["no kernel", "no kernel", "hopper attention"]


@pytest.mark.parametrize(
    ("plugin", "environment", "expected"),
    [
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "0"}, True),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": ""}, False),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "-1"}, False),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "0,-1"}, True),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, False),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu,cuda"}, False),
        ("xla_cuda13", {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda,cpu"}, True),
        ("xla_other", {"CUDA_VISIBLE_DEVICES": "0"}, False),
        (None, {"CUDA_VISIBLE_DEVICES": "0"}, False),
    ],
)
def test_gpus_count_where_jax_can_use_them(
    plugin, environment, expected, tmp_path, monkeypatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(kernel_check, "on_tpu", lambda environment: False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
    if plugin:
        (tmp_path / "jax_plugins" / plugin).mkdir(parents=True)
        (tmp_path / "jax_plugins" / plugin / "__init__.py").touch()
    assert kernel_check.has_accelerator(environment) is expected


def test_ctrl_c_ends_the_check_and_its_process(tmp_path) -> None:
    hanging = f"""
import json, os, sys, time
json.load(sys.stdin)  # as the real one does, which ends if its parent ends before
open("{tmp_path}/started", "w").write(str(os.getpid()))
time.sleep(600)
"""
    program = f"""
import functools, sys
from launch import command_line, kernel_check
from moe.config import RunConfig
kernel_check.has_accelerator = lambda environment: True
kernel_check.Checker = functools.partial(
    kernel_check.Checker, command=(sys.executable, "-c", {hanging!r})
)
prepare = lambda values: kernel_check.check_kernels(RunConfig())
command_line.run(lambda values, kernels: print("ran"), "", devices=True, prepare=prepare)
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        started = tmp_path / "started"
        wait_until(lambda: started.exists() and started.read_text(), process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (INTERRUPTED, ""), errors
    assert errors.splitlines()[-1] == "interrupted: before there was anything to save"
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not (tmp_path / "cache" / "moe" / "kernels").exists()


# Starts a check whose kernel hangs, says which process that is, and waits for it.
PARENT = """
import json, os, subprocess, sys
text = '''
import sys, time
from launch import kernel_process
from moe.kernels.benchmarks import first_start
first_start.what_is_wrong = lambda *_: time.sleep(600)
import runpy, json
sys.modules.pop("launch.kernel_process")
runpy.run_module("launch.kernel_process", run_name="__main__")
'''
process = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, text=True)
print(process.pid, flush=True)
request = json.loads(sys.argv[1]) | {"parent": os.getpid()}
process.stdin.write(json.dumps(request))
process.stdin.close()
process.wait()
"""


def test_the_process_of_a_check_ends_with_its_parent(tmp_path) -> None:
    """A run that is killed leaves no process that holds the device."""
    request = {
        "run": kernel_check.request_of(CONFIG),
        "operation": "attention",
        "call": CALL,
        "chip": "cpu",
        "kernel": "tpu",
    }
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(request)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert "chip" in json.loads(parent.stdout.readline())  # it has read its request by now
        parent.kill()
    end = time.monotonic() + 60
    wait_until(lambda: not is_running(child) or time.monotonic() > end)
    is_left = is_running(child)
    if is_left:
        os.kill(child, signal.SIGKILL)
    assert not is_left


def is_running(process_id: int) -> bool:
    """Returns whether a process still runs. A zombie does not, and nobody may be there to see."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_real_process_tells_what_is_right(tmp_path) -> None:
    """On a CPU it compares plain JAX with itself. Other tests interpret the kernel of a TPU."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    (call,) = calls_of(kernel_check.request_of(SPARSE))["experts"]
    request = {"run": kernel_check.request_of(SPARSE), "operation": "experts", "call": call.text}
    ended = Checker(environment)._ask(request | {"chip": "cpu", "kernel": "blockwise"})
    assert ended.told == {"chip": "cpu", "began": True, "problem": None}, ended
    assert ended.how == "ended with code 0"


# Commands whose programs run no kernel: matmuls and sums alone, and the first state of a run.
WITHOUT_KERNELS = {"preflight", "upcycle"}


def test_every_command_that_uses_devices_checks_kernels() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "launch").glob("*.py")}
    using = {name for name, text in texts.items() if "devices=True" in text}
    using -= {"command_line"}
    checking = {name for name in using if "check_kernels(" in texts[name]}
    assert using - checking == WITHOUT_KERNELS
    assert all("devices=True, prepare=prepare)" in texts[name] for name in checking)


KERNELS = {"refused": {"attention": ["hopper"], "experts": []}}


class Stopped(Exception):
    """Ends a command where it would make its program."""


class Values(types.SimpleNamespace):
    """Stands in for the flags of a command."""

    def __getitem__(self, name: str) -> Any:
        return types.SimpleNamespace(value=getattr(self, name))


@pytest.mark.parametrize("command", ["train", "evaluate", "tasks", "generate", "routing"])
def test_every_command_hands_on_what_the_check_found(command, tmp_path, monkeypatch) -> None:
    def stop(*args: Any, kernels: Any, **options: Any) -> None:
        raise Stopped(kernels)

    flags: dict[str, Any] = {"workdir": str(tmp_path), "config": RunConfig.config_dict()}
    flags |= dict.fromkeys(("step", "split", "slice", "profile_steps", "compare_step", "suffix"))
    flags |= dict.fromkeys(("init_from", "init_step", "fork_from", "fork_step", "tasks"))
    flags |= {"force": True, "batches": 1, "data": [], "prompt": ["a"], "seed": 0}
    flags |= {"max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if command == "tasks":
        flags |= {"tasks": ["a"], "task_directory": str(tmp_path), "limit": 1, "num_fewshot": 0}
    module = importlib.import_module(f"launch.{command.replace('tasks', 'evaluate')}")
    monkeypatch.setattr(trainer, "fit" if command == "train" else "load_run", stop)
    write_config(tmp_path, SPARSE)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "1" / ABOUT_FILE).touch()
    stand_in = types.SimpleNamespace(find_tasks=lambda *args: None)
    monkeypatch.setitem(sys.modules, "launch.harness", stand_in)
    monkeypatch.setattr(launch, "harness", stand_in, raising=False)
    values = Values(**flags)
    with pytest.raises(Stopped) as stopped:
        module.main(values, KERNELS)
    assert stopped.value.args == (KERNELS,)


def test_a_benchmark_hands_on_what_the_check_found(monkeypatch) -> None:
    def stop(config: RunConfig, refused: Any) -> None:
        raise Stopped(refused)

    monkeypatch.setattr("moe.training.train_step.make_program", stop)
    with pytest.raises(Stopped) as stopped:
        benchmark(CONFIG, kernels=KERNELS)
    assert stopped.value.args == (KERNELS["refused"],)


def test_a_program_takes_no_refused_kernel(monkeypatch) -> None:
    """A CPU has one candidate, so the order of another chip is asked for."""
    monkeypatch.setattr(choice, "obstacle", lambda name, request, chip=None: None)
    monkeypatch.setattr("moe.model.attention.chip", lambda mesh: "NVIDIA H200")
    mesh = make_mesh(SPARSE)

    def named(attention: tuple[str, ...] = (), experts: tuple[str, ...] = ()) -> tuple[str, str]:
        refused = {"attention": attention, "experts": experts}
        model = without_kernels(SPARSE, mesh, refused).model
        return model.attention.implementation, model.moe.implementation

    assert named() == ("auto", "auto")
    assert named(("tpu",)) == ("hopper", "auto")
    assert named(experts=("hopper",)) == ("auto", "blockwise")
    everything = ("tpu", "hopper", "cudnn")
    assert named(everything) == ("blockwise", "auto")
    assert make_program(SPARSE, refused={"attention": everything}).attention == "blockwise"


def test_cudnn_computes_what_hopper_must_not(monkeypatch) -> None:
    monkeypatch.setattr("moe.model.attention.chip", lambda mesh: "NVIDIA H200")
    mesh = make_mesh(CONFIG)
    for task, expected in (
        ("language_modelling", "cudnn"),
        ("masked_tokens", "blockwise"),  # cuDNN computes causal attention alone
        ("span_corruption", "blockwise"),
    ):
        model = dataclasses.replace(MODEL, head_dim=64)
        config = dataclasses.replace(CONFIG, task=task, model=model)
        found = without_kernels(config, mesh, {"attention": ["hopper"]})
        assert found.model.attention.implementation == expected


def test_a_refused_kernel_does_not_touch_experts_without_rows_in_blocks() -> None:
    moe = MoEConfig(num_experts=4, dispatch="capacity")
    config = RunConfig(model=dataclasses.replace(MODEL, moe=moe))
    refused = {"attention": ("hopper",), "experts": ("tpu",)}
    model = without_kernels(config, make_mesh(config), refused).model
    assert model.moe == moe and model.attention.implementation == "blockwise"


@pytest.mark.slow
def test_all_processes_of_a_job_hear_what_process_0_found(tmp_path) -> None:
    """Process 0 alone checks, before any process has touched a device."""
    stand_in = PROCESS.format(folder=tmp_path, chip="NVIDIA H200", body=f"time.sleep(3)\n{WRONG}")
    program = textwrap.dedent(f"""
        import functools, json, sys
        from jax._src import xla_bridge
        from launch import command_line, kernel_check
        from moe.config import ModelConfig, RunConfig

        kernel_check.has_accelerator = lambda environment: True
        kernel_check.list_accelerators = lambda: None
        kernel_check.Checker = functools.partial(
            kernel_check.Checker, command=(sys.executable, "-c", {stand_in!r})
        )

        def prepare(values):
            kernels = kernel_check.check_kernels(RunConfig(model=ModelConfig(head_dim=64)))
            assert not xla_bridge.backends_are_initialized()
            return kernels

        def main(values, kernels):
            import jax
            path = f"{tmp_path}/told{{jax.process_index()}}"
            open(path, "w").write(json.dumps([jax.device_count(), kernels]))

        command_line.run(main, "", devices=True, prepare=prepare)
    """)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MOE_STUCK_SECONDS": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        codes, _, errors = run_processes(program, tmp_path)
    assert codes == [0, 0], errors
    told = [json.loads((tmp_path / f"told{number}").read_text()) for number in range(2)]
    assert told[0] == told[1] and told[0][0] == 2
    assert told[0][1]["refused"] == {"attention": ["hopper"], "experts": []}
    assert asked(tmp_path) == ["no kernel", "hopper attention", "cudnn attention"]
    refusals = re.findall("kernel 'hopper' is refused: it is wrong", errors[0] + errors[1])
    assert len(refusals) == 1
