"""Checks the kernels that a run is to use, on this kind of device, before the run touches it.

    request -> moe.kernels.benchmarks.first_start, a process of its own -> answer
                 on one device, which it frees when it ends
    answer  -> the user's cache, by device, version of JAX and contents of the kernels
            -> every process of the run, which asks `choose` for what is not refused

A kernel of ours may never have run on a kind of device. If it is wrong there, crashes or hangs, one
line says so, and the run takes what `choose` names next. Machines without an accelerator have no
such kernels, and check nothing.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.child_processes import gpu_names
from launch.compilation_cache import user_cache
from moe.config import RunConfig
from moe.files import write_whole
from moe.kernels.benchmarks.first_start import CHECKING
from moe.parallel.distributed import on_tpu

LIMIT_SECONDS = 300.0
_COMMAND = (sys.executable, "-m", "moe.kernels.benchmarks.first_start")
# One chip of a host of TPUs, whatever other hosts there are.
_ONE_TPU = {
    "TPU_VISIBLE_CHIPS": "0",
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
}
# Whatever joins a job of several processes is not for a process of its own.
_JOBS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def check_kernels(
    config: RunConfig,
    environment: Mapping[str, str],
    command: Sequence[str] = _COMMAND,
    limit_s: float = LIMIT_SECONDS,
) -> dict[str, Any]:
    """Returns what the check answers (`_COMMAND`), or {} on a machine without accelerators.

    A kernel at which the process crashes, or that has no result within `limit_s`, is refused.
    """
    if environment.get("JAX_PLATFORMS") == "cpu":
        return {}
    if not gpu_names(environment) and not on_tpu(environment):
        return {}
    path = record_path(environment)
    known = json.loads(path.read_text()) if path.exists() else {}
    request = request_of(config) | {"known": known, "refused": []}
    while True:
        answer, checking, how = _ask(request, environment, command, limit_s)
        if answer is not None:
            break
        if checking is None:
            print(f"kernels were not checked: the check {how}", file=sys.stderr)
            return {}
        name = checking.split(",")[0]
        print(f"kernel {name!r} is refused: its check {how} ({checking})", file=sys.stderr)
        request["refused"] = [*request["refused"], name]
    for call, problem in answer["found"].items():
        if problem is not None:
            name = call.split(",")[0]
            print(f"kernel {name!r} is refused: {problem} ({call})", file=sys.stderr)
    if answer["found"]:
        known[answer["key"]] = known.get(answer["key"], {}) | answer["found"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1) + "\n")
    return answer


def request_of(config: RunConfig) -> dict[str, Any]:
    """Returns what a run computes with kernels, as the check reads it."""
    model = config.model
    causal = {"masked_tokens": [False], "span_corruption": [True, False]}.get(config.task, [True])
    return {
        "attention": {
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "dtype": model.compute_dtype,
            "causal": causal,
        },
        "experts": {"dtype": model.compute_dtype} if model.moe.num_experts else None,
    }


def record_path(environment: Mapping[str, str]) -> Path:
    """Returns the file of all that was found out on this machine, in the user's cache."""
    return user_cache(environment) / "kernels.json"


def _ask(
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    command: Sequence[str],
    limit_s: float,
) -> tuple[dict[str, Any] | None, str | None, str]:
    """Returns the answer, or None with what was being checked, and how the process ended."""
    own = {name: value for name, value in environment.items() if name not in _JOBS}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (_ONE_TPU if on_tpu(own) else {})
    process = subprocess.Popen(
        command,
        env=own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(request))
        lines = process.stdout.read().splitlines()
        process.wait()
    except BrokenPipeError:  # it ended before it read the request
        lines = []
    finally:
        is_late = not timer.is_alive()
        timer.cancel()
        process.kill()  # which does nothing to a process that has ended, and ends what Ctrl-C left
        process.stdout.close()
    code = process.wait()
    if code == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1]), None, ""
    checked = [line.removeprefix(CHECKING) for line in lines if line.startswith(CHECKING)]
    how = f"took more than {limit_s:g} s" if is_late else f"ended with code {code}"
    return None, checked[-1] if checked else None, how
