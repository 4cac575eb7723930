"""Tests the check of kernels on the first start on a kind of device."""

import dataclasses
import json
import sys
from typing import Any

import jax.numpy as jnp
import pytest

from launch import kernel_check
from moe.config import MoEConfig, RunConfig
from moe.kernels import attention
from moe.kernels.attention import choice
from moe.kernels.attention.table import IMPLEMENTATIONS
from moe.kernels.benchmarks import first_start
from moe.model.attention import without_kernels
from moe.parallel.mesh import make_mesh
from moe.training.train_step import make_program
from tests.tiny import TINY_MODEL

CONFIG = RunConfig(model=TINY_MODEL)
SPARSE = dataclasses.replace(
    CONFIG, model=dataclasses.replace(TINY_MODEL, moe=MoEConfig(num_experts=4))
)


def calls(config: RunConfig) -> list[first_start.Call]:
    request = kernel_check.request_of(config)
    found = list(first_start.attention_calls(request["attention"]))
    return [*found, *first_start.expert_calls(request["experts"])] if request["experts"] else found


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the TPU's kernel forget a part of the output."""
    row = IMPLEMENTATIONS["tpu"]

    def forward(*args: Any, **static: Any) -> Any:
        output, lse = row.forward(*args, **static)
        return output.at[:, -1].set(0), lse

    monkeypatch.setitem(IMPLEMENTATIONS, "tpu", row._replace(forward=forward))


def test_a_right_kernel_is_found_right() -> None:
    """The TPU's kernel, interpreted on a CPU, where `choose` is asked for a TPU."""
    found, refused = first_start.check_calls(calls(CONFIG), "TPU v5", {}, ())
    assert list(found.values()) == [None] and refused == ()
    assert next(iter(found)).startswith("tpu, attention of 2 heads of 8, causal True")
    again, _ = first_start.check_calls(calls(CONFIG), "TPU v5", found, ())
    assert again == {}


def test_a_wrong_kernel_is_refused_and_the_next_one_taken(wrong_kernel) -> None:
    found, refused = first_start.check_calls(calls(CONFIG), "TPU v5", {}, ())
    assert refused == ("tpu",)
    assert [text for text in found.values() if text] and "is wrong by" in str(found)
    q = jnp.zeros((1, 64, 2, 8))
    assert attention.choose("TPU v5", q, q, q, causal=True, refused=refused).name == "blockwise"


def test_a_kernel_that_raises_is_refused(monkeypatch) -> None:
    def forward(*args: Any, **static: Any) -> Any:
        raise NotImplementedError("this chip has no such instruction")

    row = IMPLEMENTATIONS["tpu"]._replace(forward=forward)
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu", row)
    found, refused = first_start.check_calls(calls(CONFIG), "TPU v5", {}, ())
    assert refused == ("tpu",) and "no such instruction" in str(found)


def test_plain_jax_agrees_with_the_reference_on_experts() -> None:
    *_, experts = calls(SPARSE)
    assert first_start.what_is_wrong(experts, "blockwise") is None


ANSWER = {"key": "a GPU, jax 1, kernels 0", "chip": "a GPU", "found": {"hopper, x": None}}
READ = "import json, sys, time; request = json.load(sys.stdin)\n"
TELL = "print('checking hopper, x', flush=True)\n"


def ask(tmp_path, code: str, limit_s: float = 60.0) -> dict[str, Any]:
    environment = {"CUDA_VISIBLE_DEVICES": "0", "XDG_CACHE_HOME": str(tmp_path)}
    command = (sys.executable, "-c", READ + code)
    return kernel_check.check_kernels(SPARSE, environment, command, limit_s)


def test_what_was_found_is_kept_for_the_next_start(tmp_path) -> None:
    answer = ANSWER | {"refused": []}
    assert ask(tmp_path, f"print(json.dumps({answer!r}))") == answer
    kept = json.loads((tmp_path / "moe" / "kernels.json").read_text())
    assert kept == {ANSWER["key"]: ANSWER["found"]}
    known = "print(json.dumps({'key': '', 'found': {}, 'refused': [str(request['known'])]}))"
    assert ask(tmp_path, known)["refused"] == [str(kept)]


@pytest.mark.parametrize(
    ("end", "limit_s", "how"),
    [
        ("sys.exit(7)", 60.0, "ended with code 7"),
        ("import os; os.abort()", 60.0, "ended with code -6"),
        ("time.sleep(600)", 3.0, "took more than 3 s"),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_refused(tmp_path, capsys, end, limit_s, how) -> None:
    code = TELL + f"if not request['refused']: {end}\n"
    code += "print(json.dumps({'key': 'k', 'found': {}, 'refused': request['refused']}))"
    assert ask(tmp_path, code, limit_s)["refused"] == ["hopper"]
    expected = f"kernel 'hopper' is refused: its check {how} (hopper, x)\n"
    assert capsys.readouterr().err == expected


def test_a_check_that_cannot_begin_is_told_and_refuses_nothing(tmp_path, capsys) -> None:
    assert ask(tmp_path, "sys.exit(1)") == {}
    assert capsys.readouterr().err == "kernels were not checked: the check ended with code 1\n"


def test_a_machine_without_accelerators_checks_nothing(tmp_path) -> None:
    environment = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    assert kernel_check.check_kernels(CONFIG, environment, ("false",)) == {}


def test_a_program_takes_no_refused_kernel(monkeypatch) -> None:
    """A CPU has one candidate, so the order of another chip is asked for."""
    monkeypatch.setattr(choice, "obstacle", lambda name, request, chip=None: None)
    monkeypatch.setattr("moe.model.attention.chip", lambda mesh: "NVIDIA H200")
    mesh = make_mesh(SPARSE)

    def named(*refused: str) -> tuple[str, str]:
        model = without_kernels(SPARSE.model, mesh, 64, refused)
        return model.attention.implementation, model.moe.implementation

    assert named() == ("auto", "auto")
    assert named("tpu") == ("hopper", "blockwise")
    assert named("tpu", "hopper", "cudnn") == ("blockwise", "blockwise")
    assert make_program(SPARSE, refused=("tpu", "hopper", "cudnn")).attention == "blockwise"
