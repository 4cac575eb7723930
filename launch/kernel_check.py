"""Checks the kernels that a command is to use, on this kind of device, before it touches it.

    launch.kernel_process, a process of its own for each kernel, says what is wrong with it
      -> launch.kernel_record, in the user's cache: by device, versions and files of the kernels
      -> every process of the job, whose programs ask `choose` for what is not refused

A kernel of ours may never have run on a kind of device. If it is wrong there, crashes or hangs, one
line says so at each start, and the program takes what `choose` names next. A kernel that the config
names is taken as it is. Machines without an accelerator have no such kernels, and check nothing.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from launch.child_processes import gpu_names
from launch.compilation_cache import user_cache
from launch.kernel_record import Record
from moe.config import RunConfig
from moe.config.objectives import causal_kinds
from moe.files import announce_wait
from moe.parallel.distributed import from_first, on_tpu

if TYPE_CHECKING:
    from moe.kernels.benchmarks.first_start import Call

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300.0
_KILL_SECONDS = 10.0  # a process that waits for a driver may not end at once
_COMMAND = (sys.executable, "-m", "launch.kernel_process")
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _GOOGLE, _DISPLAY = "0x10de", "0x1ae0", "0x03"
# One chip of a host of TPUs, whatever other hosts there are.
_ONE_TPU = {
    "TPU_VISIBLE_CHIPS": "0",
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
}
# Whatever joins a job of several processes, or several slices, is not for a process of its own.
_JOBS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "MEGASCALE_")
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# A process that a signal of these ended was ended by somebody else than its kernel.
_BY_OTHERS = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


class NotChecked(Exception):
    """Says why a process of its own could not check a kernel."""


class Ended(NamedTuple):
    """Says what a process of its own has told, and how it ended."""

    told: Mapping[str, Any]
    how: str
    by_others: bool = False  # whether somebody else than the kernel ended it


def check_kernels(config: RunConfig) -> dict[str, Any]:
    """Returns in every process of a job what process 0 found out about a config's kernels.

    All commands that compute with kernels call it before they touch a device.
    """
    return from_first("a check of kernels", lambda: Checker(os.environ).check(config))


class Checker:
    """Checks kernels on this machine, as the variables of a process show it."""

    def __init__(
        self,
        environment: Mapping[str, str],
        command: Sequence[str] = _COMMAND,
        limit_s: float = LIMIT_SECONDS,
    ):
        self._environment, self._command, self._limit_s = environment, command, limit_s
        self._record = Record(user_cache(environment) / "kernels")

    def check(self, config: RunConfig) -> dict[str, Any]:
        """Returns what is known of a config's kernels, or {} on a machine without accelerators.

        That is the "chip", what was "found" by kernel and call, and which kernels are "refused" by
        operation. A kernel whose process crashes, or has no result in time, is refused.
        """
        run = request_of(config)
        if not has_accelerator(self._environment) or not any(run.values()):
            return {}
        from moe.kernels.benchmarks import first_start  # which loads JAX

        found: dict[str, str | None] = {}
        unchecked: set[str] = set()
        refused: dict[str, list[str]] = {"attention": [], "experts": []}
        answer = {"found": found, "refused": refused}
        try:
            chip = self._find_chip()
            key = f"{chip}, {_versions()}, kernels {hash_kernels()}"
            for operation, calls in first_start.calls_of(run).items():

                def find_problem(call: "Call", name: str) -> str | None:
                    text = f"{name}, {call.text}"
                    if text not in found.keys() | unchecked:
                        asked = {"chip": chip, "run": run, "kernel": name}
                        try:
                            found[text] = self._find_problem(f"{key}: {text}", asked, call)
                        except NotChecked as error:  # what is known of others still holds
                            unchecked.add(text)
                            print(f"kernel {name!r} was not checked: {error}", file=sys.stderr)
                    return found.get(text)

                for name in first_start.right_kernels(calls, chip, find_problem):
                    refused[operation].append(name)
            return {"chip": chip, **answer}
        except NotChecked as error:
            print(f"kernels were not checked: {error}", file=sys.stderr)
            return answer

    def _find_chip(self) -> str:
        """Returns what JAX calls the kind of the devices here, which the record may know."""
        subject = None
        if accelerators := list_accelerators():
            subject = f"accelerators {accelerators}, {_versions()}"
            if finding := self._record.recall(subject):
                return finding["found"]
        with announce_wait("asking JAX which kind of device this is, in a process of its own"):
            ended = self._ask({})
        if "chip" not in ended.told:
            raise NotChecked(f"the process that asks for the kind of device {ended.how}")
        if ended.told["chip"] == "cpu":  # nothing is kept: it may find them at another start
            raise NotChecked("JAX found no accelerator in a process of its own")
        if subject:
            self._record.keep(subject, ended.told["chip"])
        return ended.told["chip"]

    def _find_problem(self, subject: str, asked: Mapping[str, Any], call: "Call") -> str | None:
        """Returns what is wrong with a kernel for a call, or None, and tells it."""
        name = asked["kernel"]
        finding = self._record.recall(subject)
        is_kept = finding is not None
        if finding:
            problem = finding["found"]
        else:
            with announce_wait(
                f"checking kernel {name!r}, which has not run on this kind of device: "
                f"at most {self._limit_s:g} s ({call.text})"
            ):
                ended = self._ask({**asked, "operation": call.operation, "call": call.text})
            if "began" not in ended.told:
                raise NotChecked(f"its process {ended.how}")
            problem = ended.told.get("problem", f"its check {ended.how}")
            is_kept = not ended.by_others and self._record.keep(subject, problem)
        if problem is not None:
            again = f"; to check it again, delete {self._record.path(subject)}" if is_kept else ""
            text = f"kernel {name!r} is refused: {problem} ({call.text}){again}"
            print(text, file=sys.stderr, flush=True)
        return problem

    def _ask(self, request: Mapping[str, Any]) -> Ended:
        """Returns what a process of its own tells of a request, and how it ended."""
        own = {
            name: value for name, value in self._environment.items() if not name.startswith(_JOBS)
        }
        own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (_ONE_TPU if on_tpu(own) else {})
        text = json.dumps({"parent": os.getpid(), **request})
        try:
            # Not pipes, which a compiler that the process has started might hold open.
            file = functools.partial(
                tempfile.TemporaryFile, "w+", encoding="utf-8", errors="replace"
            )
            with file() as output, file() as errors:
                process = subprocess.Popen(
                    self._command,
                    cwd=ROOT,
                    env=own,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=errors,
                    encoding="utf-8",
                    start_new_session=True,
                )
                code = _wait(process, text, self._limit_s)
                return _read(output, errors, code, self._limit_s)
        except OSError as error:
            return Ended({}, f"could not be started ({error})")


def _wait(process: subprocess.Popen[str], request: str, limit_s: float) -> int | None:
    """Sends a process its request, and returns its exit code, or None if it took too long.

    However it ends, nothing of the process is left.
    """
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(request)
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)


def _read(output: IO[str], errors: IO[str], code: int | None, limit_s: float) -> Ended:
    """Returns what a process has told, and how it ended."""
    told: dict[str, Any] = {}
    output.seek(0)
    for line in output:
        if line.startswith("{") and line.endswith("}\n"):
            with contextlib.suppress(ValueError):  # a compiler may have written it
                told |= json.loads(line)
    if code is None:
        return Ended(told, f"took more than {limit_s:g} s")
    how = f"ended with code {code}"
    if "began" not in told:  # then it is no kernel that has failed
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()][-1:]
        how += f" ({last[0][:200]})" if last else ""
    return Ended(told, how, by_others=code in _BY_OTHERS and "problem" not in told)


def has_accelerator(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX may find a GPU or a TPU here, without asking it."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return False
    return (_has_cuda() and bool(gpu_names(environment))) or on_tpu(environment)


def _has_cuda() -> bool:
    """Returns whether a plugin for CUDA is installed where JAX looks for plugins."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return any("cuda" in module.name for module in pkgutil.iter_modules(folders or []))


def list_accelerators() -> str | None:
    """Returns the kinds of accelerators on the PCI bus by their numbers, or None if unclear.

    They are unclear where GPUs of several kinds are here, of which JAX may see any.
    """
    gpus, others = set(), set()
    with contextlib.suppress(OSError):
        for device in _PCI.iterdir():
            read = lambda name, device=device: (device / name).read_text(encoding="utf-8").strip()
            if (vendor := read("vendor")) not in (_NVIDIA, _GOOGLE):
                continue
            kind = f"{vendor}:{read('device')}:{read('subsystem_device')}"
            if vendor == _GOOGLE:
                others.add(kind)
            elif read("class").startswith(_DISPLAY):
                gpus.add(kind)
        if len(gpus) <= 1 and gpus | others:
            return " ".join(sorted(gpus | others))
    return None


def request_of(config: RunConfig) -> dict[str, Any]:
    """Returns what a config computes with kernels that it leaves to `choose`, for the check."""
    model, moe = config.model, config.model.moe
    attention = {
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": model.compute_dtype,
        "causal": list(causal_kinds(config.task)),
    }
    is_grouped = moe.num_experts and moe.dispatch == "dropless"
    return {
        "attention": attention if model.attention.implementation == "auto" else None,
        "experts": {"dtype": model.compute_dtype}
        if is_grouped and moe.implementation == "auto"
        else None,
    }


def _versions() -> str:
    """Returns the versions of the packages that compile kernels."""
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def hash_kernels() -> str:
    """Returns a digest of all files of kernels, and of those that check them."""
    digest = hashlib.sha256()
    folder = ROOT / "kernels"
    checking = ROOT / "launch" / "kernel_process.py"
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json"), checking]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
