"""Commands tell a mistake before they check kernels, which may take minutes, and load no JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import ModelConfig, MoEConfig, RunConfig
from moe.workdir.identity import ABOUT_FILE, write_config

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, json, sys, types
from moe.config import ConfigError, RunConfig

command, flags = json.loads(sys.argv[1])
if "config" in flags:
    config = RunConfig.config_dict()
    config.update(flags["config"])
    flags["config"] = config

class Values(types.SimpleNamespace):
    def __getitem__(self, name):
        return types.SimpleNamespace(value=getattr(self, name))

module = importlib.import_module(f"launch.{command}")
module.check_kernels = lambda config: print("checked kernels")
try:
    module.prepare(Values(**flags))
except ConfigError as error:
    print(error)
print("jax" in sys.modules)
"""
EVALUATE = {"step": None, "split": None, "data": [], "slice": None, "tasks": [], "record": False}
EVALUATE |= {"limit": None, "num_fewshot": None, "task_directory": None}
GENERATE = {"step": None, "prompt": ["a"], "suffix": None, "seed": 0, "max_new_tokens": 1}
GENERATE |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
ROUTING = {"step": None, "compare_step": None, "batches": 1}
SOURCES = ("init_from", "init_step", "fork_from", "fork_step")
TRAIN = dict.fromkeys((*SOURCES, "profile_steps")) | {"config": {}}
SPARSE = {"model": {"moe": {"num_experts": 4, "expert_dim": 8}}}
UPCYCLE = {"step": None, "noise": 0.0, "config": SPARSE}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Returns a directory with a dense and a sparse run, which have a checkpoint of step 2 each."""
    root = tmp_path_factory.mktemp("runs")
    for name, num_experts in (("dense", 0), ("sparse", 4)):
        model = ModelConfig(moe=MoEConfig(num_experts=num_experts, expert_dim=8))
        saved = root / name / "checkpoints" / "2"
        saved.mkdir(parents=True)
        (saved / ABOUT_FILE).touch()
        write_config(root / name, RunConfig(model=model))
    return root


def prepare(command: str, flags: dict) -> tuple[str, bool]:
    """Returns what the `prepare` of a command prints, and whether it has loaded JAX."""
    arguments = [sys.executable, "-c", PROGRAM, json.dumps([command, flags])]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    *lines, has_jax = done.stdout.splitlines()
    return "\n".join(lines), has_jax == "True"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("evaluate", EVALUATE | {"step": 3}, "holds no checkpoint of step 3: choose one of its"),
        ("evaluate", EVALUATE | {"split": "tset"}, "split 'tset' is not one of"),
        (
            "evaluate",
            EVALUATE | {"data": ["text:launch"], "split": "tset"},
            "split 'tset' is not one of data.dataset='text:launch'",
        ),
        ("evaluate", EVALUATE | {"data": ["text:/nowhere"]}, "text:/nowhere' does not exist"),
        ("evaluate", EVALUATE | {"tasks": ["x"], "step": 3}, "holds no checkpoint of step 3"),
        ("generate", GENERATE | {"step": 3}, "holds no checkpoint of step 3"),
        ("generate", GENERATE | {"temperature": -1.0}, "temperature=-1.0 is out of range"),
        ("generate", GENERATE | {"top_k": -1}, "top_k=-1 is negative"),
        ("generate", GENERATE | {"top_p": 2.0}, "top_p=2.0 is out of range"),
        ("generate", GENERATE | {"max_new_tokens": 0}, "max_new_tokens=0 is not positive"),
        ("routing", ROUTING | {"batches": -1}, "--batches=-1 is no number of batches"),
        ("routing", ROUTING | {"step": 3}, "holds no checkpoint of step 3"),
        ("routing", ROUTING | {"compare_step": 2}, "--compare_step=2 is no checkpoint before"),
        ("routing", ROUTING | {"workdir": "dense"}, "is a dense run"),
        (
            "train",
            TRAIN
            | {
                "workdir": "new",
                "config": {"data": {"dataset": "text:launch", "train_split": "tset"}},
            },
            "split 'tset' is not one of data.dataset='text:launch'",
        ),
        ("train", TRAIN | {"config": {"seed": 1}}, "holds a run of another config"),
        ("train", TRAIN | {"workdir": "new", "init_from": "new"}, "is no run: set --init_from"),
        (
            "train",
            TRAIN | {"workdir": "new", "init_from": "dense", "init_step": 3},
            "holds no checkpoint of step 3: set --init_step",
        ),
        (
            "train",
            TRAIN | {"workdir": "new", "fork_from": "dense", "fork_step": 2},
            "is a run of another config",
        ),
        ("upcycle", UPCYCLE | {"from": "dense", "step": 3}, "holds no checkpoint of step 3"),
        ("upcycle", UPCYCLE | {"from": "sparse"}, "is sparse already: set --from to a dense run"),
        ("upcycle", UPCYCLE | {"from": "dense", "config": {}}, "leaves every layer dense"),
    ],
)
def test_a_mistake_is_told_before_kernels_are_checked(runs, command, flags, message) -> None:
    names = ("workdir", "from", "init_from", "fork_from")
    default = {"train": "dense", "upcycle": "new"}.get(command, "sparse")
    flags = {"workdir": default} | flags
    flags |= {name: str(runs / flags[name]) for name in names if flags.get(name)}
    told, has_jax = prepare(command, flags)
    assert message in told and "\n" not in told
    assert not has_jax
    assert not (runs / "new").exists()


def test_what_is_right_is_checked(runs) -> None:
    told = prepare("routing", ROUTING | {"workdir": str(runs / "sparse")})
    assert told == ("checked kernels", False)
