"""Checks one kernel on the device at hand, and says what is wrong with it.

`launch.kernel_check` starts this file in a process of its own, because a kernel that has never run
on a kind of device may end its process, hang, or leave the device in no state to go on. It reads a
request from stdin as JSON:

    {"parent": 1234, "chip": "NVIDIA H200", "run": {"attention": {...}, "experts": null},
     "operation": "attention", "call": "attention of 4 heads ...", "kernel": "hopper"}

Without a "kernel" it only says which device this is. It prints objects, one a line, each as soon as
it is known: {"chip": "NVIDIA H200"}, then {"began": true} right before the kernel runs, and last
{"problem": null}, or what is wrong in a few words.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax

from launch.child_processes import end_with
from moe.kernels.benchmarks import first_start


def main(request: Mapping[str, Any]) -> None:
    """Prints what a request asks for."""
    chip = jax.devices()[0].device_kind
    _tell(chip=chip)
    if "kernel" not in request:
        return
    if chip != request["chip"]:  # JAX falls back to CPUs, in silence, where a TPU is busy
        sys.exit(f"JAX found {chip!r}, not {request['chip']!r}")
    calls = first_start.calls_of(request["run"])[request["operation"]]
    call = next(call for call in calls if call.text == request["call"])
    begin = lambda: _tell(began=True)
    _tell(problem=first_start.what_is_wrong(call, request["kernel"], begin))


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    end_with(asked["parent"])
    main(asked)
