"""Tests what another project gets from the wheel, and what the Makefile installs on a machine."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import moe

ROOT = Path(__file__).parents[1]
PACKAGED = (
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "requirements.txt",
    "setup.py",
    "configs",
    "kernels",
    "launch",
    "moe",
)

IN_ANOTHER_PROJECT = """
import importlib.util, sys
import jax, jax.numpy as jnp
from moe import ModelConfig, Transformer

batch = {"tokens": jnp.zeros((2, 8), jnp.int32)}
widths = dict(model_dim=32, feed_forward_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
model = Transformer(ModelConfig(num_layers=2, **widths))
variables = model.init(jax.random.key(0), batch)
output = model.apply(variables, batch)

print(sys.modules["moe"].__file__)
print(output.hidden.shape)
print(sorted({"tensorflow", "torch"} & sys.modules.keys()))
print([name for name in ("kernels", "launch", "configs") if importlib.util.find_spec(name)])
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Returns what a command prints.

    Its environment knows nothing of this checkout, nor of the make that started the tests.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "PYTHON", "ACCELERATOR"))
    }
    done = subprocess.run(command, cwd=cwd, env=inherited | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_loads_neither_jax_nor_flax() -> None:
    program = """
import sys
import moe, moe.config, moe.kernels
print(sorted({"jax", "flax", "numpy"} & sys.modules.keys()))
"""
    assert run(sys.executable, "-c", program, cwd=ROOT) == "[]\n"


def test_the_package_offers_its_names() -> None:
    assert [getattr(moe, name).__name__ for name in moe.__all__] == moe.__all__
    assert set(moe.__all__) <= set(dir(moe))
    with pytest.raises(AttributeError, match="module 'moe' has no attribute 'Transfomer'"):
        _ = moe.Transfomer  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the sources, and adds a kernel's package with tuning tables of its own."""
    copy = tmp_path_factory.mktemp("tree")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                copy / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, copy)
    probe = copy / "kernels" / "probe"
    (probe / "tables").mkdir(parents=True)
    (probe / "__init__.py").write_text("")
    (probe / "tuning.json").write_text("{}")
    (probe / "tables" / "chip.json").write_text("{}")
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Builds the wheel from the source distribution, and returns its path."""
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    [wheel] = (tree / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_moe_and_the_kernels_and_nothing_else(tree: Path, wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [
        path
        for folder in ("moe", "kernels")
        for pattern in ("*.py", "*.json")
        for path in (tree / folder).rglob(pattern)
    ]
    names = {path.relative_to(tree).as_posix() for path in files}
    names = {
        name.replace("kernels/", "moe/kernels/", 1) if name.startswith("kernels/") else name
        for name in names
    }
    assert packed == names | {"moe/py.typed", "moe/scaling/programs/h200.textproto"}
    assert {"moe/kernels/probe/tuning.json", "moe/kernels/probe/tables/chip.json"} <= packed


@pytest.mark.slow
def test_the_wheel_requires_what_requirements_txt_lists(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    required = {"": set(), "run": set()}
    for line in metadata.get_all("Requires-Dist"):
        extra = re.search(r"extra == .(\w*)", line)
        required.setdefault(extra[1] if extra else "", set()).add(re.match(r"[\w.-]+", line)[0])
    base, run = (ROOT / "requirements.txt").read_text().split("\n\n")
    for extra, text in (("", base), ("run", run)):
        assert required[extra] == {
            re.match(r"[\w.-]+", line)[0] for line in text.splitlines() if line[0] != "#"
        }
    assert {"jax", "flax", "optax", "einops", "ml-collections", "numpy"} == required[""]
    extras = {"aot", "cpu", "cuda13", "gcs", "run", "test", "tpu"}
    assert set(metadata.get_all("Provides-Extra")) == extras


@pytest.mark.slow
def test_the_wheel_holds_the_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert email.message_from_bytes(archive.read(path))["License-Expression"] == "Apache-2.0"
    license_path = path.replace("METADATA", "licenses/LICENSE")
    assert archive.read(license_path).decode() == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_another_project_applies_a_model_in_three_lines(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    # The dependencies are those installed here. They come after the environment's own packages, and
    # .pth files among them are not read.
    [installed] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = run(python, "-c", IN_ANOTHER_PROJECT, cwd=empty).splitlines()
    assert printed == [str(installed / "moe" / "__init__.py"), "(2, 8, 32)", "[]", "[]"]


WITH_ITS_OWN_DEPENDENCIES = """
import sys
import moe.parallel.collectives.expert, moe.parallel.mesh, moe.inference.generate
import moe.kernels.attention, moe.kernels.grouped_matmul
import moe.losses, moe.training.optimizer, moe.model.routing
import moe.training.train_step, moe.interop.upcycle
from moe import ConfigError, MoE, MoEConfig, ModelConfig, RunConfig, Transformer

unneeded = {"matplotlib", "tensorboardX", "tensorflow_datasets", "grain", "tqdm"}
print(sorted(unneeded & sys.modules.keys()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_brings_what_importing_needs_and_no_more(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel, cwd=tmp_path)
    assert run(python, "-c", WITH_ITS_OWN_DEPENDENCIES, cwd=tmp_path, JAX_PLATFORMS="cpu") == "[]\n"
    [installed] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    unneeded = {"matplotlib", "tensorboardX", "tensorflow_datasets", "grain", "array_record"}
    assert not unneeded & {path.name for path in installed.iterdir()}


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """Makes a folder with the Makefile and no .venv, in which make is asked what it would do."""
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("accelerator", ["cuda13", "tpu", "cpu"])
def test_make_installs_the_accelerator_that_is_asked_for(makefile: Path, accelerator: str) -> None:
    commands = run("make", "--dry-run", "train", f"ACCELERATOR={accelerator}", cwd=makefile)
    assert f'--editable ".[{accelerator},run]"' in commands


def test_make_finds_an_nvidia_gpu(makefile: Path) -> None:
    smi = makefile / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    path = f"{makefile}:{os.environ['PATH']}"
    commands = run("make", "--dry-run", "train", cwd=makefile, PATH=path)
    assert '--editable ".[cuda13,run]"' in commands


def test_make_passes_config_and_arguments_on(makefile: Path) -> None:
    commands = run(
        "make",
        "--dry-run",
        "train",
        "CONFIG=configs/dense_1b.py",
        "ARGS=--config.train.steps=100",
        cwd=makefile,
    )
    train = '-m launch.train --config="configs/dense_1b.py" --workdir="runs/dense_1b"'
    assert f"{train} --config.train.steps=100\n" in commands
    generate = '-m launch.generate --workdir="runs/dense_1b" --prompt="def " --temperature=0.5'
    assert f"{generate}\n" in commands


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        (
            "ACCELERATOR=cuda12",
            "*** ACCELERATOR=cuda12 is not known: set it to cuda13, tpu or cpu.  Stop.",
        ),
        ("PYTHON=false", "PYTHON=false is not Python 3.11 or later: set PYTHON to one that is"),
    ],
)
def test_make_refuses_what_it_cannot_use(makefile: Path, assignment: str, expected: str) -> None:
    done = subprocess.run(
        ["make", "train", assignment], cwd=makefile, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert any(line.endswith(expected) for line in (done.stdout + done.stderr).splitlines())
    assert not (makefile / ".venv").exists()
