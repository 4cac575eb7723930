"""Tests which kernels a run is found to use, and that wrong ones are told from right ones."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from launch.kernel_check import request_of
from moe.config import MoEConfig, RunConfig
from moe.kernels import attention
from moe.kernels.attention.table import IMPLEMENTATIONS
from moe.kernels.benchmarks import first_start
from moe.kernels.benchmarks.first_start import Call, calls_of, right_kernels, what_is_wrong
from tests.tiny import TINY_MODEL

ROOT = Path(__file__).parents[3]
MODEL = dataclasses.replace(TINY_MODEL, moe=MoEConfig(num_experts=4))
CALLS = calls_of(request_of(RunConfig(model=MODEL)))
TPU = "TPU v5"


def refused(find_problem: Callable[[Call, str], str | None]) -> list[str]:
    """Returns the kernels of attention that are refused on a TPU."""
    return list(right_kernels(CALLS["attention"], TPU, find_problem))


@pytest.fixture
def change_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that puts another forward pass into the row of the TPU's kernel."""
    row = IMPLEMENTATIONS["tpu"]

    def change(forward: Callable[..., Any]) -> None:
        changed = lambda *args, **static: forward(*row.forward(*args, **static))
        monkeypatch.setitem(IMPLEMENTATIONS, "tpu", row._replace(forward=changed))

    return change


def test_a_right_kernel_is_not_refused() -> None:
    """A CPU interprets the kernel of a TPU."""
    (call,) = CALLS["attention"]
    assert call.text == "attention of 2 heads of 8, causal True, float32"
    assert call.choose(TPU, ()) == "tpu" and refused(what_is_wrong) == []


def test_a_wrong_kernel_is_refused_and_the_next_one_taken(change_forward) -> None:
    change_forward(lambda output, lse: (output.at[:, -1].set(0), lse))
    problem = what_is_wrong(CALLS["attention"][0], "tpu")
    assert problem and problem.startswith("result 0 is wrong by")
    names = refused(lambda call, name: problem)
    q = jnp.zeros((1, 64, 2, 8))
    assert attention.choose(TPU, q, q, q, causal=True, refused=names).name == "blockwise"


def test_a_kernel_that_raises_is_refused(change_forward) -> None:
    def fail(output: Any, lse: Any) -> None:
        raise NotImplementedError("this chip has no such instruction\nat 0x1234")

    change_forward(fail)
    problem = what_is_wrong(CALLS["attention"][0], "tpu")
    assert problem == "it raised NotImplementedError: this chip has no such instruction"


def test_what_fails_before_the_kernel_runs_is_not_its_fault(monkeypatch) -> None:
    def fail(*args: Any, **static: Any) -> None:
        raise RuntimeError("the device is gone")

    row = IMPLEMENTATIONS["blockwise"]._replace(forward=fail)
    monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", row)
    begun = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        what_is_wrong(CALLS["attention"][0], "tpu", lambda: begun.append(True))
    assert begun == []


def test_plain_jax_agrees_with_the_reference_on_experts() -> None:
    (call,) = CALLS["experts"]
    assert call.text == "experts of 256 x 256, float32"
    assert call.choose(TPU, ()) == "tpu" and what_is_wrong(call, "blockwise") is None


def stand_in(text: str, *able: str) -> Call:
    """Returns a call that these kernels can compute, the fastest first."""

    def choose(chip: str, refused: Collection[str]) -> str:
        return next((name for name in able if name not in refused), "blockwise")

    return Call("attention", text, choose, lambda name, dtype: (), "float32")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({("b", "hopper")}, ["hopper"]),
        ({("b", "hopper"), ("a", "cudnn")}, ["hopper", "cudnn"]),
        ({("a", "hopper"), ("b", "cudnn")}, ["hopper"]),
    ],
)
def test_every_call_has_a_right_kernel_in_the_end(wrong, expected) -> None:
    """Where a later call refuses a kernel, the earlier ones take another, which is checked too."""
    calls = [stand_in("a", "hopper", "cudnn"), stand_in("b", "hopper")]
    asked = []

    def find_problem(call: Call, name: str) -> str | None:
        asked.append((call.text, name))
        return "it is wrong" if (call.text, name) in wrong else None

    assert list(right_kernels(calls, "a chip", find_problem)) == expected
    for call in calls:
        name = call.choose("a chip", expected)
        assert name == "blockwise" or (
            (call.text, name) in asked and (call.text, name) not in wrong
        )


def test_asking_which_kernels_to_check_touches_no_device() -> None:
    """A process that has touched a TPU keeps it from the processes that check."""
    request = json.dumps(request_of(RunConfig(model=MODEL)))
    text = f"""
import json
from jax._src import xla_bridge
from moe.kernels.benchmarks.first_start import calls_of, right_kernels
for calls in calls_of(json.loads({request!r})).values():
    print(*right_kernels(calls, "TPU v5", lambda call, name: "it is wrong"))
print(xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "tpu\ntpu\nFalse\n", done


def test_plain_jax_is_trusted() -> None:
    never = lambda call, name: pytest.fail(f"{name} was checked")
    assert list(right_kernels(CALLS["attention"], "cpu", never)) == []
    assert set(first_start.TRUSTED) == {"reference", "blockwise"}
