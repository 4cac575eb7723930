"""Holds the rules of docs/design.md against the source.

They say which file may import which, what no file may call, and how large things may grow.
"""

import ast
import dataclasses
import graphlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe import config

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "kernels", "launch", "moe")

# The folders and files of moe/, the lowest floor first. A file imports from its own folder, without
# a cycle, and from floors below.
FLOORS = (
    ("kernels", "files", "exit_codes"),
    ("config",),
    ("parameters", "data", "scaling", "storage"),
    ("parallel",),
    ("losses", "cross_entropy"),
    ("model", "interop"),
    ("inference", "tasks", "workdir"),
    ("training",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS, start=-1) for name in names}
# These stand beside the model. They import config and the ground, and nothing else.
BESIDE = ("data", "scaling")

FORBIDDEN_IMPORTS = {
    **dict.fromkeys(
        ("cloudpickle", "dill", "marshal", "pickle", "shelve"),
        "runs what is in a file: write JSON, ArrayRecord or Orbax",
    ),
    **dict.fromkeys(("tensorflow", "torch"), "is not a dependency"),
    **dict.fromkeys(
        ("jax.experimental.pjit", "jax.experimental.shard_map"),
        "is deprecated: use jax.jit and jax.shard_map",
    ),
    "kernels": "would be a second copy of its modules: import moe.kernels",
}
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "__import__"), "runs text as code"),
    "sow": "is lost or doubled under scan, remat and vmap: return the value",
    "make_rng": "depends on the call order: fold keys from (seed, step, layer, row)",
}


def module_name(path: Path) -> str:
    """Returns the one name by which a file is imported. For kernels/x.py it is moe.kernels.x."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("moe", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*rooms: str) -> dict[str, ast.Module]:
    """Returns the parsed files of some rooms, by module name."""
    return {
        module_name(path): ast.parse(path.read_text(), str(path)) for path in source_files(*rooms)
    }


def source_files(*rooms: str) -> list[Path]:
    """Returns the files of some rooms, each once. Those of moe/kernels, a link, are in kernels/."""
    paths = sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))
    return [path for path in paths if "moe/kernels" not in path.as_posix()]


def is_within(name: str, *packages: str) -> bool:
    """Returns whether a dotted name is one of the packages, or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and dotted name of each import, also of those inside functions.

    The name of `from moe import losses` is moe.losses.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}")
                for alias in node.names
            )


def wrong_import(module: str, imported: str) -> str | None:
    """Returns why `module` may not import `imported`, or None if it may."""
    top = imported.split(".")[0]
    if is_within(module, "tests"):
        # Tests may import everything else, even pickle, for what they wrote themselves.
        return FORBIDDEN_IMPORTS["kernels"] if top == "kernels" else None
    if imported.startswith("."):
        return "is relative: write the whole name"
    for name, reason in FORBIDDEN_IMPORTS.items():
        if is_within(imported, name):
            return reason
    if is_within(module, "moe.kernels"):
        allowed = (
            is_within(imported, "jax", "numpy", "moe.kernels") or top in sys.stdlib_module_names
        )
        return None if allowed else "is not for kernels: they import jax, numpy and one another"
    if is_within(module, "configs"):
        allowed = (
            is_within(imported, "ml_collections", "moe.config", "moe.scaling", "configs")
            or top in sys.stdlib_module_names
        )
        return None if allowed else "is not for configs: they import moe.config, moe.scaling"
    if is_within(module, "moe.config"):
        allowed = (
            is_within(imported, "ml_collections", "moe.config") or top in sys.stdlib_module_names
        )
        return None if allowed else "is not for moe.config, which is used before JAX is imported"
    if top in ("launch", "configs", "tests"):
        allowed = is_within(module, "launch") and top != "tests"
        return None if allowed else f"is above {module}"
    return (
        wrong_floor(module, imported)
        if top == "moe" and is_within(module, "moe") and module != "moe"
        else None
    )


def wrong_floor(module: str, imported: str) -> str | None:
    """Returns why a file of moe/ may not import another file of moe/, or None if it may."""
    room, other = module.split(".")[1], f"{imported}.".split(".")[1]
    if other not in FLOOR:
        return "is no file of moe/: import a name from the file that defines it"
    if room == other:
        return None
    if room in BESIDE:
        allowed = FLOOR[other] <= FLOOR["config"]
        return None if allowed else f"is not for moe.{room}: it imports moe.config alone"
    if FLOOR.get(room, -1) <= FLOOR[other]:
        return f"is on floor {FLOOR[other]}, not below floor {FLOOR.get(room)} of moe.{room}"
    return None


def import_graph(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Maps each module to the modules that it imports while it is being loaded."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, tree in modules.items():
        # An import inside a function runs later, when the function is called.
        loaded = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for _, name in imports(ast.Module(loaded, [])):
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules:
                graph[module].add(found)
    return graph


def import_cycle(modules: dict[str, ast.Module]) -> list[str]:
    """Returns modules that import each other in a circle, or an empty list if there are none."""
    try:
        tuple(graphlib.TopologicalSorter(import_graph(modules)).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def wrong_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the reason of each call or handler that no file may contain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            if {"everything", "Exception", "BaseException"} & set(caught.strip("()").split(", ")):
                yield node.lineno, f"except {caught} hides mistakes: name the errors"
        elif isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"{name}() {FORBIDDEN_CALLS[name]}"
            if name == "get" and "config" in ast.unparse(node.func).lower():
                yield node.lineno, f"{ast.unparse(node)}: all defaults live in moe/config/"
            for keyword in node.keywords:
                if keyword.arg in ("mutable", "allow_pickle"):
                    yield (
                        node.lineno,
                        f"{keyword.arg}= is against the laws: return values; write plain arrays",
                    )


def test_the_rooms_are_found() -> None:
    modules = sources(*ROOMS)
    assert {"moe", "moe.config", "moe.kernels", "moe.data"} <= modules.keys()
    assert (ROOT / "moe" / "kernels").is_symlink()


def test_every_file_of_moe_has_a_floor() -> None:
    assert {
        module.split(".")[1] for module in sources("moe") if module != "moe"
    } - FLOOR.keys() == set()


def test_files_import_only_what_their_floor_allows() -> None:
    wrong = [
        f"{module}:{line}: {imported} {reason}"
        for module, tree in sources(*ROOMS, "tests").items()
        for line, imported in imports(tree)
        if (reason := wrong_import(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert import_cycle(sources("moe", "kernels")) == []


def test_a_circle_of_imports_is_found() -> None:
    texts = {"moe.a": "from moe.b import x", "moe.b": "import moe.a", "moe.c": "import moe.a"}
    circle = import_cycle({name: ast.parse(text) for name, text in texts.items()})
    assert set(circle) == {"moe.a", "moe.b"}


def test_no_file_makes_a_forbidden_call() -> None:
    wrong = [
        f"{module}:{line}: {reason}"
        for module, tree in sources(*ROOMS).items()
        for line, reason in wrong_calls(tree)
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_never_look_at_the_attached_device() -> None:
    """The benchmarks are commands about the attached device, so they may."""
    names = {"default_backend", "devices", "device_count", "local_devices"}
    wrong = [
        f"{module}:{node.lineno}: jax.{node.attr}: the chip is an argument"
        for module, tree in sources("kernels").items()
        if not is_within(module, "moe.kernels.benchmarks")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and ast.unparse(node.value) == "jax"
    ]
    assert not wrong, "\n".join(wrong)


def uses_pallas(tree: ast.Module) -> bool:
    """Returns whether a file imports Pallas, as those with kernel bodies do."""
    return any(is_within(name, "jax.experimental.pallas") for _, name in imports(tree))


def is_launcher(function: ast.FunctionDef) -> bool:
    """Returns whether a function starts a Pallas kernel, by `pallas_call` or `kernel`."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("pallas_call", "kernel")
        for node in ast.walk(function)
    )


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Yields a message for each function of a file that is too long.

    A function may have 40 lines, decorators not counted, and a kernel body 80. Kernel bodies are
    the functions of a file with Pallas kernels that do not start one.
    """
    has_kernels = uses_pallas(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = 80 if has_kernels and not is_launcher(node) else 40
            if length > limit:
                yield f"{node.lineno}: {node.name} has {length} lines, more than {limit}"


def test_functions_have_at_most_40_lines_and_kernel_bodies_80() -> None:
    wrong = [
        f"{module}:{message}"
        for module, tree in sources(*ROOMS, "tests").items()
        for message in long_functions(tree)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("header", "last_line", "num_lines", "is_too_long"),
    [
        ("import jax", "pass", 40, False),
        ("import jax", "pass", 41, True),
        ("from jax.experimental import pallas as pl", "pass", 80, False),
        ("from jax.experimental import pallas as pl", "pass", 81, True),
        ("from jax.experimental.pallas import tpu as pltpu", "pass", 80, False),
        ("from jax.experimental import pallas as pl", "pl.pallas_call(f)()", 41, True),
    ],
)
def test_a_long_function_is_found(
    header: str, last_line: str, num_lines: int, is_too_long: bool
) -> None:
    body = "\n".join(["    pass"] * (num_lines - 2) + [f"    {last_line}"])
    tree = ast.parse(f"{header}\ndef f():\n{body}\n")
    assert bool(list(long_functions(tree))) == is_too_long


def line_counts(*rooms: str) -> dict[str, int]:
    """Returns how many lines of each file are not blank. Comments and docstrings count."""
    return {
        module_name(path): sum(bool(line.strip()) for line in path.read_text().splitlines())
        for path in source_files(*rooms)
    }


def test_files_have_at_most_350_lines() -> None:
    counts = line_counts(*ROOMS)
    assert {module: count for module, count in counts.items() if count > 350} == {}


def test_folders_of_moe_and_kernels_have_at_most_10_files() -> None:
    """The `__init__.py` of a folder is not counted."""
    files = [path for path in source_files("moe", "kernels") if path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files)
    assert {folder: count for folder, count in counts.items() if count > 10} == {}


def room_line_counts() -> Counter[str]:
    """Returns how many lines each folder and each single file of moe/ has, kernels aside."""
    counts: Counter[str] = Counter()
    for module, count in line_counts("moe").items():
        counts[module.split(".")[1] if module != "moe" else module] += count
    return counts


def test_what_a_step_runs_has_less_than_8000_lines() -> None:
    """Whoever reads these has read all that trains a model, on one process or on many."""
    rooms = ("config", "parameters", "parallel", "losses", "cross_entropy", "model", "tasks")
    # These connect processes, and watch whether they live.
    processes = ("cluster", "devices", "distributed", "hub", "rendezvous", "watch")
    connecting = sum(line_counts("moe")[f"moe.parallel.{name}"] for name in processes)
    counted = sum(room_line_counts()[room] for room in (*rooms, "training"))
    assert 0 < counted - connecting < 8_000


def test_a_room_of_moe_has_less_than_5000_lines() -> None:
    assert {room: count for room, count in room_line_counts().items() if count >= 5_000} == {}


def config_fields() -> list[tuple[type, str]]:
    """Returns the dataclass and the name of each config field."""
    classes = [
        cls
        for _, cls in inspect.getmembers(config, inspect.isclass)
        if dataclasses.is_dataclass(cls)
    ]
    return [(cls, field.name) for cls in classes for field in dataclasses.fields(cls)]


def test_there_are_at_most_120_config_fields() -> None:
    assert 0 < len(config_fields()) <= 120


def test_every_config_field_is_read() -> None:
    """Fields are told by name only: one passes if any attribute of its name is read.

    It has to be read in moe/ or launch/. In moe/config/ only the properties count, since its checks
    read every field.
    """
    modules = sources("moe", "launch")
    properties = [
        node
        for module in [name for name in modules if is_within(name, "moe.config")]
        for node in ast.walk(modules.pop(module))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    trees = [*modules.values(), *properties]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # The fields of the mesh are read together, as `sizes`.
    unread = [
        f"{cls.__name__}.{name}"
        for cls, name in config_fields()
        if cls is not config.MeshConfig and name not in read
    ]
    assert not unread, f"nothing reads {unread}"
    assert "sizes" in read


@pytest.mark.parametrize(
    ("module", "statement", "reason"),
    [
        ("moe.model.layers", "from moe import training", "floor"),
        ("moe.losses", "import moe.model.layers", "floor"),
        ("moe.model.layers", "from moe.training.train_step import TrainState", "floor"),
        ("moe.model.layers", "def f():\n    import moe.training.trainer", "floor"),
        ("moe.model.layers", "from moe import ModelConfig", "no file"),
        ("moe.model.layers", "from .config import ModelConfig", "relative"),
        ("moe.model.layers", "from launch import train", "above"),
        ("moe.training.trainer", "import configs.dense_tiny", "above"),
        ("launch.train", "from tests import conftest", "above"),
        ("launch.train", "import kernels.attention", "moe.kernels"),
        ("tests.test_x", "from kernels import attention", "moe.kernels"),
        ("moe.data.loader", "from moe.parallel.mesh import host_rows", "moe.config alone"),
        ("moe.scaling.flops", "from moe.data import loader", "moe.config alone"),
        ("moe.data.loader", "import pickle", "runs what is in a file"),
        ("moe.data.loader", "import tensorflow as tf", "dependency"),
        ("moe.parallel.mesh", "from jax.experimental.shard_map import shard_map", "deprecated"),
        ("moe.kernels.attention", "from moe.config import ModelConfig", "kernels"),
        ("moe.kernels.attention", "import flax.linen as nn", "kernels"),
        ("moe.config", "import jax", "before JAX"),
        ("configs.dense_tiny", "from moe.model.transformer import Transformer", "configs"),
    ],
)
def test_a_wrong_import_is_found(module: str, statement: str, reason: str) -> None:
    found = [wrong_import(module, imported) for _, imported in imports(ast.parse(statement))]
    assert len(found) == 1 and reason in (found[0] or "")


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("moe.model.layers", "from moe.config import ModelConfig"),
        ("moe.model.layers", "import moe.kernels.attention"),
        ("moe.training.trainer", "from moe.data.loader import make_loader"),
        ("moe.data.loader", "from moe.data import packing"),
        ("moe.kernels.attention", "from moe.kernels.attention.reference import attention"),
        ("launch.train", "from configs.dense_tiny import get_config"),
        ("launch.train", "from moe import RunConfig"),
        ("tests.launch.test_report", "from launch.report import report"),
        ("tests.data.test_prepare", "import pickle"),
        ("moe", "from moe.model.transformer import Transformer"),
    ],
)
def test_a_right_import_is_let_through(module: str, statement: str) -> None:
    assert [wrong_import(module, imported) for _, imported in imports(ast.parse(statement))] == [
        None
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "self.sow('intermediates', 'x', x)",
        "key = self.make_rng('dropout')",
        "eval(text)",
        "config.model.get('num_layers', 4)",
        "model.apply(variables, batch, mutable=['losses'])",
        "np.load(path, allow_pickle=True)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception):\n    pass",
    ],
)
def test_a_forbidden_call_is_found(statement: str) -> None:
    assert len(list(wrong_calls(ast.parse(statement)))) == 1


def test_other_calls_are_let_through() -> None:
    allowed = (
        "{}.get('x')\ngetattr(config, name)\ntry:\n    f()\nexcept (OSError, ValueError):\n    pass"
    )
    assert list(wrong_calls(ast.parse(allowed))) == []
