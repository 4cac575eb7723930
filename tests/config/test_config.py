"""Tests that each mistake in a config is told in one line: the field, the value and the fix."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    check_layout,
)
from tests.jobs import answers_within

ROOT = Path(__file__).parents[2]


def list_fields(default: Any, section: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the section, the name and the default of every field, also of nested configs."""
    for field in dataclasses.fields(default):
        if dataclasses.is_dataclass(field.default):
            yield from list_fields(field.default, f"{section}__{field.name}".lstrip("_"))
        elif section:
            yield section, field.name, field.default


FIELDS = list(list_fields(RunConfig(), ""))


def run_config(**changes: Any) -> RunConfig:
    """Returns the default run with changed fields, each named by its path: model__num_heads=6."""
    values = RunConfig().to_dict()
    for path, value in changes.items():
        *sections, name = path.split("__")
        group = values
        for section in sections:
            group = group[section]
        group[name] = value
    return RunConfig.from_config_dict(values)


def message(**changes: Any) -> str:
    """Returns the one-line message with which the changed run is refused."""
    with pytest.raises(ConfigError) as caught:
        run_config(**changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_default_run_is_valid() -> None:
    assert run_config() == RunConfig()


def test_a_config_survives_a_config_dict_and_json() -> None:
    config = run_config(model__num_layers=7, optimizer__learning_rate=3e-4, mesh__tensor=2, seed=5)
    assert RunConfig.from_config_dict(ConfigDict(config.to_dict())) == config
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_dict_holds_every_default_and_can_be_changed() -> None:
    values = RunConfig.config_dict()
    assert values.to_dict() == RunConfig().to_dict()
    values.model.num_layers = 12
    assert RunConfig.from_config_dict(values).model.num_layers == 12
    assert RunConfig().model.num_layers == 4


def test_sections_and_fields_that_are_left_out_keep_their_defaults() -> None:
    config = RunConfig.from_config_dict({"model": {"num_layers": 2}})
    assert config == RunConfig(model=ModelConfig(num_layers=2))


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_layers_are_groups_of_periods() -> None:
    assert ModelConfig(num_layers=7).layer_groups == ((("dense",), 7),)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"model": {"num_layer": 3}},
            "model.num_layer=3 is not a field: did you mean model.num_layers?",
        ),
        (
            {"modle": {"num_layers": 3}},
            "modle={'num_layers': 3} is not a field: did you mean model?",
        ),
        (
            {"qqq": 1},
            "qqq=1 is not a field: the fields are task, seed, model, data, optimizer, mesh, train, "
            "tracking",
        ),
        (
            {3: 1},
            "3=1 is not a field: the fields are task, seed, model, data, optimizer, mesh, train, "
            "tracking",
        ),
        ({"model": 3}, "model=3 is not a group of fields: set its fields one by one"),
        ({"model": None}, "model=None is not a group of fields: set its fields one by one"),
        ([1], "config=[1] is not a group of fields: set its fields one by one"),
    ],
)
def test_unknown_fields_are_refused(values: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        RunConfig.from_config_dict(values)


def test_messages_have_one_line_where_a_config_dict_prints_many() -> None:
    misspelled = ConfigDict({"modle": {"num_layers": 3, "num_heads": 2}})
    with pytest.raises(ConfigError, match=r"^modle=\{.*\} is not a field: did you mean model\?$"):
        RunConfig.from_config_dict(misspelled)
    misplaced = ConfigDict({"seed": {"a": 1, "b": 2}})
    with pytest.raises(
        ConfigError, match=r"^seed=\{.*\} has type dict: set seed to a value of type int$"
    ):
        RunConfig.from_config_dict(misplaced)


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, name, default in FIELDS if default is None]
)
def test_a_field_that_is_none_has_its_type_in_a_config_dict(section: str, name: str) -> None:
    """So a flag can set it, and refuses what is of another type."""
    group: Any = RunConfig.config_dict()
    for part in section.split("__"):
        group = group[part]
    reference = group.get_ref(name)
    assert reference.get() is None and reference.get_type() in (bool, int, float, str)
    with pytest.raises(TypeError):
        group[name] = ["a"]


@pytest.mark.parametrize(("section", "name", "default"), FIELDS)
def test_every_field_refuses_a_wrong_type(section: str, name: str, default: Any) -> None:
    for wrong in (
        ("a", [1])
        if default is None
        else ("a", 1.5)
        if isinstance(default, tuple)
        else ([1], None, 1 if isinstance(default, bool | str) else True)
    ):
        text = message(**{f"{section}__{name}": wrong})
        assert text.startswith(f"{section.replace('__', '.')}.{name}={wrong!r} ")
        assert f"set {name} to " in text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "model__num_layers",
            "4",
            "model.num_layers='4' has type str: set num_layers to a value of type int",
        ),
        (
            "model__num_layers",
            4.0,
            "model.num_layers=4.0 has type float: set num_layers to a value of type int",
        ),
        (
            "model__num_layers",
            True,
            "model.num_layers=True has type bool: set num_layers to a value of type int",
        ),
        (
            "optimizer__beta1",
            False,
            "optimizer.beta1=False has type bool: set beta1 to a value of type float",
        ),
        (
            "model__remat",
            "half",
            "model.remat='half' is not an option: set remat to "
            "'none' or 'save_exchange' or 'save_attention' or 'offload' or 'full'",
        ),
        (
            "model__remat",
            "save_exchange",
            "model.remat='save_exchange' saves what experts receive, and no layer has experts: set "
            "remat to 'save_attention', or moe.num_experts to a positive number",
        ),
        (
            "data__dataset",
            3,
            "data.dataset=3 has type int: set dataset to a value of type str",
        ),
        ("seed", "a\nb", "seed='a\\nb' has type str: set seed to a value of type int"),
    ],
)
def test_wrong_types(path: str, value: Any, expected: str) -> None:
    assert message(**{path: value}) == expected


def test_a_section_of_another_class_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^model=.* has type DataConfig: set model to a value of type ModelConfig$",
    ):
        RunConfig(model=DataConfig())  # type: ignore[arg-type]


def test_a_whole_number_is_a_float() -> None:
    learning_rate = OptimizerConfig(learning_rate=1).learning_rate
    assert learning_rate == 1.0 and type(learning_rate) is float


@pytest.mark.parametrize("width", [32, 64])
def test_numpy_scalars_are_python_numbers(width: int) -> None:
    """In every field, in a config file's ConfigDict as in a dict: config.json has plain numbers."""
    kinds = {int: f"int{width}", float: f"float{width}", bool: "bool", str: "str"}
    config: Any = RunConfig.config_dict()
    for section, name, default in FIELDS:
        if type(default) in kinds:
            scalar = np.dtype(kinds[type(default)]).type(default)
            group = config[section.split("__")[0]]
            for part in section.split("__")[1:]:
                group = group[part]
            group[name] = scalar
            path = f"{section}__{name}"
            assert json.dumps(run_config(**{path: scalar}).to_dict())
    plain = json.loads(json.dumps(config.to_dict()))
    built = RunConfig.from_config_dict(config)
    assert json.loads(json.dumps(built.to_dict())) == plain
    assert abs(built.optimizer.learning_rate - 0.001) < 1e-9
    (stage,) = run_config(data__stages=(np.int64(0),)).data.stages
    assert type(stage) is int


@pytest.mark.parametrize("value", [np.bool_(True), np.longdouble(1), np.datetime64("2026-01-01")])
def test_other_scalars_are_refused_as_what_they_are(value: np.generic) -> None:
    assert "set steps to a value of type int" in message(train__steps=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "path",
    [f"{section}__{name}" for section, name, default in FIELDS if isinstance(default, float)],
)
def test_floats_are_finite(path: str, value: float) -> None:
    assert message(**{path: value}).endswith(
        f"={value} is not finite: set {path.split('__')[-1]} to a finite number"
    )


POSITIVE = {
    "model": "vocab_size num_layers model_dim feed_forward_dim num_heads num_kv_heads head_dim "
    "rope_base norm_epsilon",
    "data": "sequence_length",
    "optimizer": "learning_rate clip_norm",
    "train": "steps batch_size accumulation pipeline_rounds loss_chunk log_every eval_every "
    "checkpoint_every keep_last max_skipped_steps",
}
NOT_NEGATIVE = {"optimizer": "weight_decay", "train": "eval_batches keep_every"}


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, names in POSITIVE.items() for name in names.split()],
)
def test_positive_fields(section: str, name: str) -> None:
    default = getattr(getattr(RunConfig(), section), name)
    for wrong in (0, -1):
        value = type(default)(wrong)
        expected = f"{section}.{name}={value} must be positive: set {name} to more than 0"
        assert message(**{f"{section}__{name}": value}) == expected


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, names in NOT_NEGATIVE.items() for name in names.split()],
)
def test_fields_that_may_be_zero(section: str, name: str) -> None:
    kind = type(getattr(getattr(RunConfig(), section), name))
    expected = f"{section}.{name}={kind(-1)} must not be negative: set {name} to 0 or more"
    assert message(**{f"{section}__{name}": kind(-1)}) == expected
    assert getattr(getattr(run_config(**{f"{section}__{name}": kind(0)}), section), name) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": -1}, "seed=-1 is out of range: set seed between 0 and 4294967295"),
        (
            {"seed": 2**32},
            "seed=4294967296 is out of range: set seed between 0 and 4294967295",
        ),
        (
            {"optimizer__final_learning_rate_fraction": 1.5},
            "optimizer.final_learning_rate_fraction=1.5 is out of range: "
            "set final_learning_rate_fraction between 0.0 and 1.0",
        ),
        (
            {"optimizer__learning_rate": 2e20},
            "optimizer.learning_rate=2e+20 could make an infinite update with clip_norm=1.0: "
            "set learning_rate to 1e+20 or less",
        ),
        (
            {"optimizer__learning_rate": 6.0, "optimizer__clip_norm": 1e30},
            "optimizer.learning_rate=6.0 could make an infinite update with clip_norm=1e+30: "
            "set learning_rate to 5 or less",
        ),
        (
            {"optimizer__learning_rate": 3.0, "optimizer__weight_decay": 0.75},
            "optimizer.weight_decay=0.75 times learning_rate=3.0 is more than 2, so decay would "
            "make weights larger: set weight_decay to 0.66 or less",
        ),
        (
            {"optimizer__beta1": 1.0},
            "optimizer.beta1=1.0 is not a decay: set beta1 to at least 0.0 and less than 1.0",
        ),
        (
            {"optimizer__beta2": -0.1},
            "optimizer.beta2=-0.1 is not a decay: set beta2 to at least 0.0 and less than 1.0",
        ),
        (
            {"optimizer__warmup_fraction": 1.0},
            "optimizer.warmup_fraction=1.0 is not a fraction of the run: "
            "set warmup_fraction to at least 0.0 and less than 1.0",
        ),
        (
            {"optimizer__warmup_steps": -1},
            "optimizer.warmup_steps=-1 must not be negative: set warmup_steps to 0 or more",
        ),
        (
            {"optimizer__decay_fraction": 1.5},
            "optimizer.decay_fraction=1.5 is out of range: set decay_fraction between 0.0 and 1.0",
        ),
        (
            {"optimizer__schedule": "linear"},
            "optimizer.schedule='linear' is not an option: set schedule to 'cosine' or 'wsd'",
        ),
        (
            {"model__head_dim": 63},
            "model.head_dim=63 is odd, but rotary positions turn pairs of numbers: "
            "set head_dim to an even number",
        ),
        (
            {"mesh__tensor": 0},
            "mesh.tensor=0 is not a number of devices: "
            "set tensor to a positive number, or to -1 for the devices that remain",
        ),
        (
            {"mesh__fsdp": -2},
            "mesh.fsdp=-2 is not a number of devices: "
            "set fsdp to a positive number, or to -1 for the devices that remain",
        ),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], expected: str) -> None:
    assert message(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model__num_heads": 6, "model__num_kv_heads": 4},
            "model.num_heads=6 is not a multiple of num_kv_heads=4: "
            "set num_kv_heads to one of 1, 2, 3, 6",
        ),
        (
            {"train__batch_size": 7, "train__accumulation": 4},
            "train.batch_size=7 is not a multiple of accumulation=4: set batch_size to 8",
        ),
        (
            {"train__batch_size": 1, "train__accumulation": 4},
            "train.batch_size=1 is not a multiple of accumulation=4: set batch_size to 4",
        ),
        (
            {"mesh__fsdp": -1},
            "mesh.data=-1 and fsdp=-1 leave the mesh undetermined: set all but one of them",
        ),
        (
            {"model__vocab_size": 255},
            "model.vocab_size=255 is smaller than the byte tokenizer's 256: "
            "set model.vocab_size to at least 256",
        ),
        (
            {"data__directory": "~nobody_here/x"},
            "data.directory='~nobody_here/x' names no user's home: set it to a path",
        ),
        (
            {"mesh__data": 3},
            "train.batch_size=16 in 1 microbatches cannot be split over mesh data*fsdp*expert=3: "
            "set train.batch_size to a multiple of 3",
        ),
        (
            {"mesh__expert": 4, "train__batch_size": 12, "train__accumulation": 2},
            "train.batch_size=12 in 2 microbatches cannot be split over mesh data*fsdp*expert=4: "
            "set train.batch_size to a multiple of 8",
        ),
        (
            {"mesh__context": 3},
            "data.sequence_length=256 cannot be split over mesh.context=3: "
            "set data.sequence_length to a multiple of 3",
        ),
        (
            {"mesh__context": 4, "data__sequence_length": 36},
            "data.sequence_length=36 cannot be cut into 2 chunks for each of mesh.context=4 "
            "devices of a ring: "
            "set data.sequence_length to a multiple of 8",
        ),
        (
            {
                "mesh__context": 4,
                "mesh__tensor": 2,
                "model__attention__context_parallelism": "ulysses",
            },
            "model.num_heads=4 cannot be split over mesh.context*tensor=8, as Ulysses does: "
            "set model.attention.context_parallelism to 'ring'",
        ),
        (
            {"mesh__pipeline": 2, "train__accumulation": 3, "train__batch_size": 12},
            "train.accumulation=3 microbatches cannot be dealt out to mesh.pipeline=2 stages: "
            "set train.accumulation to a multiple of 2",
        ),
        (
            {"mesh__pipeline": 2, "train__accumulation": 2, "train__pipeline_rounds": 4},
            "model.num_layers=4 has 4 repeats of dense layers, which "
            "mesh.pipeline*train.pipeline_rounds=8 pieces cannot share: set model.num_layers to 8",
        ),
        (
            {"mesh__pipeline": 4, "train__accumulation": 4, "model__moe__num_experts": 4}
            | {"model__moe__first_dense_layers": 1, "model__num_layers": 7},
            "model.num_layers=7 has 6 repeats of moe layers, which "
            "mesh.pipeline*train.pipeline_rounds=4 pieces cannot share: set model.num_layers to 5",
        ),
        (
            {"mesh__tensor": 3},
            "model.num_kv_heads=2 and mesh.tensor=3 do not divide each other: "
            "set mesh.tensor to a divisor of 2",
        ),
        (
            {"mesh__tensor": 8},
            "model.num_heads=4 cannot be split over mesh.tensor=8: "
            "set model.num_heads to a multiple of 8",
        ),
        (
            {"mesh__tensor": 2, "model__feed_forward_dim": 703},
            "model.feed_forward_dim=703 cannot be split over mesh.tensor=2: "
            "set model.feed_forward_dim to a multiple of 2",
        ),
        (
            {"mesh__tensor": 2, "model__vocab_size": 257},
            "model.vocab_size=257 cannot be split over mesh.tensor=2: "
            "set model.vocab_size to a multiple of 2",
        ),
        (
            {"mesh__fsdp": 2, "model__model_dim": 255},
            "model.model_dim=255 cannot be split over mesh.fsdp*expert=2: "
            "set model.model_dim to a multiple of 2",
        ),
    ],
)
def test_contradictory_pairs(changes: dict[str, Any], expected: str) -> None:
    assert message(**changes) == expected


def test_the_fixes_that_messages_name_are_accepted() -> None:
    run_config(model__num_heads=6, model__num_kv_heads=3)
    run_config(train__batch_size=8, train__accumulation=4)
    run_config(optimizer__warmup_fraction=0.0)
    run_config(mesh__data=3, train__batch_size=3)
    run_config(mesh__context=3, data__sequence_length=6)
    run_config(mesh__tensor=8, model__num_heads=8)
    pipeline = {"mesh__pipeline": 2, "train__accumulation": 2}
    run_config(**pipeline, train__pipeline_rounds=4, model__num_layers=8)
    run_config(**pipeline, train__gather_once=True)
    run_config(seed=2**32 - 1)


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"),
    [
        (0.1, 1000, 100),
        (0.29, 100, 29),
        (0.0, 20, 0),
        (0.0625, 20, 1),
        (0.999, 20, 19),
        (0.5, 1, 0),
    ],
)
def test_warm_up_is_a_fraction_of_the_steps_and_leaves_one(
    fraction: float, steps: int, expected: int
) -> None:
    assert (
        run_config(optimizer__warmup_fraction=fraction, train__steps=steps).warmup_steps == expected
    )


def test_steps_of_warm_up_do_not_depend_on_the_steps_and_leave_one() -> None:
    for steps, expected in ((1000, 30), (20, 19), (1, 0)):
        assert run_config(optimizer__warmup_steps=30, train__steps=steps).warmup_steps == expected


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"), [(0.2, 1000, 200), (0.0, 20, 1), (1.0, 20, 15), (0.5, 1, 1)]
)
def test_a_decay_is_a_fraction_of_the_steps_after_the_warm_up(
    fraction: float, steps: int, expected: int
) -> None:
    changes = {"schedule": "wsd", "warmup_steps": 5, "decay_fraction": fraction}
    fields = {f"optimizer__{name}": value for name, value in changes.items()}
    assert run_config(train__steps=steps, **fields).decay_steps == expected


def test_runs_share_the_updates_before_the_first_decay() -> None:
    def run(schedule: str, steps: int, **warmup: float) -> RunConfig:
        fields = {f"optimizer__{name}": value for name, value in warmup.items()}
        return run_config(optimizer__schedule=schedule, train__steps=steps, **fields)

    long, short = (run("wsd", steps, warmup_steps=10) for steps in (1000, 500))
    assert long.shared_updates(short) == short.shared_updates(long) == 400
    cosines = [run("cosine", steps, warmup_steps=10) for steps in (1000, 500)]
    assert cosines[0].shared_updates(cosines[1]) == 0
    fractions = [run("wsd", steps, warmup_fraction=0.1) for steps in (1000, 500)]
    assert fractions[0].shared_updates(fractions[1]) == 0


def test_key_value_heads_may_be_fewer_than_the_tensor_axis_splits() -> None:
    run_config(mesh__tensor=4, model__num_kv_heads=2, model__num_heads=4)


@pytest.mark.parametrize(
    ("mesh", "num_devices", "expected"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), 8, (1, 1, 4, 1, 1, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 1, 2, 1, 1, 2)),
        (MeshConfig(tensor=8), 8, (1, 1, 1, 1, 1, 8)),
        (MeshConfig(data=1), 1, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_a_mesh_takes_the_devices_that_remain(
    mesh: MeshConfig, num_devices: int, expected: tuple[int, ...]
) -> None:
    assert mesh.resolve(num_devices).sizes == expected


@pytest.mark.parametrize(
    ("mesh", "num_devices", "shape"),
    [
        (MeshConfig(tensor=3), 8, "data=-1, pipeline=1, fsdp=1, expert=1, context=1, tensor=3"),
        (MeshConfig(tensor=16), 8, "data=-1, pipeline=1, fsdp=1, expert=1, context=1, tensor=16"),
        (MeshConfig(data=2), 8, "data=2, pipeline=1, fsdp=1, expert=1, context=1, tensor=1"),
        (MeshConfig(data=16), 8, "data=16, pipeline=1, fsdp=1, expert=1, context=1, tensor=1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(
    mesh: MeshConfig, num_devices: int, shape: str
) -> None:
    expected = f"mesh ({shape}) does not fit 8 devices: set sizes whose product is 8"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        mesh.resolve(num_devices)


def test_a_resolved_mesh_is_checked_against_the_batch() -> None:
    config = RunConfig(train=TrainConfig(batch_size=12))
    check_layout(config, config.mesh.resolve(4))
    with pytest.raises(ConfigError, match=r"train\.batch_size=12 .* multiple of 8$"):
        check_layout(config, config.mesh.resolve(8))


def test_importing_the_config_is_quick_and_imports_no_jax() -> None:
    libraries = ["flax", "jax", "jaxlib", "numpy", "tensorflow", "torch"]
    program = f"import sys, moe.config; print([x for x in {libraries} if x in sys.modules])"

    def import_it() -> None:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"

    assert answers_within(2.0, import_it)


MOE = {"model__moe__num_experts": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"experts_per_token": 9},
            "experts_per_token=9 is more than num_experts=8: set experts_per_token to at most 8",
        ),
        (
            {"num_groups": 3},
            "num_groups=3 does not divide num_experts=8: set num_groups to one of 1, 2, 4, 8",
        ),
        (
            {"num_groups": 2, "groups_per_token": 3},
            "groups_per_token=3 is more than num_groups=2: set groups_per_token to at most 2",
        ),
        (
            {"num_groups": 8},
            "experts_per_token=2 is more than the 1 experts in groups_per_token=1 groups: "
            "set experts_per_token to at most 1",
        ),
        (
            {"exchange": "all_to_all"},
            "exchange='all_to_all' does not work with dispatch='dropless', "
            "because every device must send equally many rows: "
            "set dispatch to 'capacity'",
        ),
        (
            {"exchange": "ragged_all_to_all", "dispatch": "dense"},
            "exchange='ragged_all_to_all' does not work with dispatch='dense', "
            "because rows are sent in the order of their experts: "
            "set dispatch to 'dropless'",
        ),
        *(
            (
                {"implementation": name, "dispatch": "capacity"},
                f"implementation='{name}' does not work with dispatch='capacity', "
                "because it computes rows sorted by their experts: "
                "set dispatch to 'dropless'",
            )
            for name in ("blockwise", "tpu", "hopper")
        ),
        (
            {"router": "expert_choice"},
            "router='expert_choice' does not work with dispatch='dropless', "
            "because each expert takes a fixed number of tokens: "
            "set dispatch to 'dense' or 'capacity'",
        ),
        (
            {"router": "hash", "bias_update_rate": 0.1},
            "bias_update_rate=0.1 has no effect with router='hash': set bias_update_rate to 0.0",
        ),
        (
            {"router": "hash", "num_groups": 2, "groups_per_token": 2},
            "num_groups=2 has no effect with router='hash': set num_groups to 1",
        ),
        (
            {"experts_per_token": 1, "normalize_weights": True},
            "normalize_weights=True with experts_per_token=1 makes every weight 1.0, "
            "so the router learns nothing: "
            "set normalize_weights to False",
        ),
        (
            {"router": "expert_choice", "dispatch": "dense", "normalize_weights": True},
            "normalize_weights=True does not apply to router='expert_choice', "
            "whose weights are probabilities: "
            "set normalize_weights to False",
        ),
        (
            {"receive_factor": 0.5},
            "receive_factor=0.5 has no room for an even load: set receive_factor to 1.0 or more",
        ),
        ({"jitter": 0.7}, "jitter=0.7 is out of range: set jitter between 0.0 and 0.5"),
    ],
)
def test_routing_that_contradicts_itself(changes: dict[str, Any], expected: str) -> None:
    assert (
        message(**MOE, **{f"model__moe__{name}": value for name, value in changes.items()})
        == f"model.moe.{expected}"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"mesh__data": 1, "mesh__expert": 16},
            "model.moe.num_experts=8 cannot be split over mesh.expert=16: "
            "set model.moe.num_experts",
        ),
        (
            {"mesh__data": 1, "mesh__tensor": 2, "model__moe__expert_dim": 7},
            "model.moe.expert_dim=7 cannot be split over mesh.tensor=2",
        ),
        (
            {
                "model__moe__dispatch": "capacity",
                "data__sequence_length": 2,
                "model__moe__capacity_factor": 1.0,
            },
            "model.moe.capacity_factor=1.0 gives an expert room for less than one token of a "
            "row: set model.moe.capacity_factor to at least 2.0",
        ),
        (
            {"model__moe__router": "expert_choice", "model__moe__dispatch": "dense"},
            "model.moe.router='expert_choice' looks at later tokens",
        ),
    ],
)
def test_routing_that_the_run_has_no_room_for(changes: dict[str, Any], expected: str) -> None:
    assert message(**MOE, **changes).startswith(expected)


@pytest.mark.parametrize("value", [None, True, False])
def test_normalize_weights_may_be_left_to_the_router(value: bool | None) -> None:
    """None is stored as None, so that its meaning follows a later change of experts_per_token."""
    config = run_config(**MOE, model__moe__normalize_weights=value)
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.model.moe.normalized == (value is not False)
    values = RunConfig.config_dict()
    values.model.moe.num_experts = 8
    values.model.moe.normalize_weights = value
    assert RunConfig.from_config_dict(values) == config
    if value is None:
        values.model.moe.experts_per_token = 1
        assert not RunConfig.from_config_dict(values).model.moe.normalized


def test_sparse_layers_need_layers() -> None:
    text = message(**MOE, model__moe__first_dense_layers=3, model__moe__layer_period=2)
    assert text.endswith("leave no sparse layer among num_layers=4: set num_layers to at least 5")


@pytest.mark.parametrize(
    ("layers", "first", "period", "groups"),
    [
        (4, 0, 1, ((("moe",), 4),)),
        (61, 3, 1, ((("dense",), 3), (("moe",), 58))),
        (5, 0, 2, ((("dense", "moe"), 2), (("dense",), 1))),
        (6, 1, 2, ((("dense",), 1), (("dense", "moe"), 2), (("dense",), 1))),
    ],
)
def test_layer_groups(layers: int, first: int, period: int, groups: Any) -> None:
    moe = MoEConfig(num_experts=8, first_dense_layers=first, layer_period=period)
    assert ModelConfig(num_layers=layers, moe=moe).layer_groups == groups
