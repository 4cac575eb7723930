"""Tests that any value of any field gives either a config or a one-line message, at once."""

import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.plan_components import summary
from moe.config import ConfigError, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, RunConfig
from moe.config.checks import (
    LARGEST_FLOAT,
    LARGEST_INT,
    SMALLEST_FLOAT,
    expand_run_path,
    nearest_divisors,
)
from tests.config.test_config import FIELDS, ROOT, message, run_config

FLOATS = [f"{section}__{name}" for section, name, default in FIELDS if isinstance(default, float)]
INTS = [f"{section}__{name}" for section, name, default in FIELDS if type(default) is int]


@pytest.mark.parametrize("path", FLOATS)
def test_floats_are_checked_as_the_float32_that_they_become(path: str) -> None:
    name = path.split("__")[-1]
    for value in (1e39, 1e308, -1e39, 3.5e38):
        assert (
            f".{name}={value} is infinite in float32: set {name} to a number between "
            in message(**{path: value})
        )
    assert "infinite in float32" in message(**{path: 10**39}) and "infinite in float32" in message(
        **{path: 10**5000}
    )
    for value in (1e-39, 1e-45, 1e-50, 5e-324, -1e-50):
        assert f".{name}={value} is 0 in float32: set {name} to a number of at least " in message(
            **{path: value}
        )


def test_the_limits_of_float32_themselves_are_accepted() -> None:
    config = OptimizerConfig(learning_rate=SMALLEST_FLOAT, clip_norm=LARGEST_FLOAT)
    assert (config.learning_rate, config.clip_norm) == (
        SMALLEST_FLOAT,
        LARGEST_FLOAT,
    )  # as they were written, not rounded


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "optimizer__beta2",
            1 - 1e-9,
            "is not a decay: set beta2 to at least 0.0 and less than 1.0",
        ),
        ("model__moe__receive_factor", 1 - 1e-5, "has no room for an even load"),
        (
            "model__rope_base",
            0.5,
            "turns later pairs faster than the first: set rope_base to 1.0 or more",
        ),
    ],
)
def test_ranges_hold_in_float32(path: str, value: float, expected: str) -> None:
    assert expected in message(**{path: value})
    if path == "model__moe__receive_factor":
        assert run_config(**{path: 1 - 1e-9}).model.moe.receive_factor == 1 - 1e-9  # 1 in float32


@pytest.mark.parametrize("path", INTS)
def test_integers_fit_an_int32(path: str) -> None:
    name = path.split("__")[-1]
    for value in (2**31, -(2**31), 2**63, 10**30):
        assert message(**{path: value}).endswith(
            f".{name}={value} does not fit an int32: set {name} to at most 2147483647"
        )
    assert f".{name}=an integer of 16610 bits does not fit an int32: " in message(
        **{path: 10**5000}
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model__num_layers": 10**9},
            "model.num_layers=1000000000 is out of range: set num_layers between 1 and 65536",
        ),
        (
            {"data__sequence_length": 10**9},
            "data.sequence_length=1000000000 is out of range: "
            "set sequence_length between 1 and 16777216",
        ),
        (
            {"data__sequence_length": 2**24, "train__batch_size": 128},
            "train.batch_size=128 times data.sequence_length=16777216 is more rows than an int32 "
            "counts: "
            "set them to a product of at most 2147483647",
        ),
        (
            {
                "model__moe__num_experts": 8,
                "model__moe__dispatch": "capacity",
                "model__moe__capacity_factor": 1e30,
            },
            "train.batch_size=16 times data.sequence_length=256 times "
            "model.moe.experts_per_token=2 times "
            "model.moe.capacity_factor=1e+30 is more rows than an int32 counts: "
            "set them to a product of at most 2147483647",
        ),
        (
            {"model__model_dim": 2**31 - 1, "model__vocab_size": 2**31 - 1},
            "model.vocab_size=2147483647, model_dim=2147483647 make an array that is too large: "
            "set them to a product of at most 576460752303423488",
        ),
        (
            {"model__num_heads": 2**20, "model__head_dim": 2**12},
            "model.num_heads=1048576, head_dim=4096 make an array that is too large: "
            "set them to a product of at most 2147483647",
        ),
        (
            {"model__num_heads": 1_000_000_001},
            "model.num_heads=1000000001 is not a multiple of num_kv_heads=2: set num_kv_heads to "
            "one of 1, 7, 11, 13, 19, 77, 91, 133",
        ),
        (
            {"model__moe__num_experts": 1_000_000_001, "model__moe__num_groups": 5},
            "model.moe.num_groups=5 does not divide num_experts=1000000001: "
            "set num_groups to one of 1, 7, 11, 13, 19, 77, 91, 133",
        ),
        (
            {"model__remat": [1] * 1000},
            f"model.remat={str([1] * 1000)[:200]}... is not an option: "
            "set remat to 'none' or 'save_exchange' or 'save_attention' or 'offload' or 'full'",
        ),
    ],
)
def test_sizes_that_no_program_can_have(changes: dict[str, Any], expected: str) -> None:
    assert message(**changes) == expected


@pytest.mark.parametrize(
    "number", [1, 2, 12, 2**31 - 1, 735_134_400, 1_000_000_001]
)  # a prime, and one of 1,344 divisors
@pytest.mark.parametrize("value", [1, 5, 10**9])
def test_the_nearest_divisors(number: int, value: int) -> None:
    start = time.process_time()
    named = [int(text) for text in re.findall(r"\d+", nearest_divisors(number, value))]
    assert time.process_time() - start < 0.5
    assert named == sorted(named) and 1 <= len(named) <= 8
    assert all(number % divisor == 0 for divisor in named)
    if number == 12:
        assert named == [1, 2, 3, 4, 6, 12]


def test_messages_stay_short_whatever_the_value_is() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert (
        message(seed=nested)
        == "seed=a list nested too deeply has type list: set seed to a value of type int"
    )
    assert message(model__moe__jitter="a" * 10**6).startswith(
        f"model.moe.jitter='{'a' * 199}... has type str"
    )
    with pytest.raises(
        ConfigError, match=r"^'a\\nb'=1 is not a field: the fields are task, seed, model, "
    ):
        RunConfig.from_config_dict({"a\nb": 1})


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("", "directory='' is empty: set it to a path"),
        (
            "a\0b",
            "directory='a\\x00b' is not UTF-8, or has a NUL: set it to a path in UTF-8 without NUL",
        ),
        (
            "a\udcffb",
            "directory='a\\udcffb' is not UTF-8, or has a NUL: "
            "set it to a path in UTF-8 without NUL",
        ),
        (
            "gs://bucket/x",
            "directory='gs://bucket/x' is an address, and this must lie in a file system: "
            "set it to a local or mounted directory",
        ),
        (
            "file:///x",
            "directory='file:///x' is an address, and this must lie in a file system: "
            "set it to a local or mounted directory",
        ),
        (
            f"a/{'é' * 128}",
            f"directory='a/{'é' * 128}' has a name of 256 bytes: "
            "set it to a path whose files and directories have names of at most 255",
        ),
    ],
)
def test_texts_that_are_not_paths_are_refused(directory: str, expected: str) -> None:
    assert message(data__directory=directory) == f"data.{expected}"


def test_a_home_directory_is_needed_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers the user often has neither HOME nor an entry in /etc/passwd."""
    program = """
import os
os.path.expanduser = lambda path: path
from moe.config import RunConfig
config = RunConfig.config_dict()
config.data.directory = "/data"
print(RunConfig.from_config_dict(config).data.path)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("/data\n", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert message() == "data.directory='~/.cache/moe' names no user's home: set it to a path"


def test_the_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert (
        DataConfig().path == Path("/home/somebody/.cache/moe")
        and DataConfig().directory == "~/.cache/moe"
    )


LARGE_MOE = MoEConfig(num_experts=10**6, expert_dim=10**3, layer_period=2**15)


@pytest.mark.parametrize(
    "model", [ModelConfig(num_layers=2**16), ModelConfig(num_layers=2**16, moe=LARGE_MOE)]
)
def test_the_summary_of_many_layers_is_instant(model: ModelConfig) -> None:
    config = RunConfig(model=model, data=DataConfig(sequence_length=2**24))
    start = time.process_time()
    assert "parameters: " in summary(config)
    assert time.process_time() - start < 0.5


VALUES = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        64,
        255,
        256,
        257,
        1000,
        2**16,
        2**24,
        735_134_400,
        1_000_000_001,
        2**31 - 1,
        2**31,
        2**63,
        10**30,
        10**5000,
    ),
    *(
        0.0,
        -0.0,
        0.5,
        1 - 1e-12,
        1.0,
        1.0000001,
        1e-50,
        1e-45,
        1e-38,
        1e30,
        3.4e38,
        1e39,
        1e308,
        math.inf,
        math.nan,
    ),
    *(
        True,
        None,
        "",
        "a\nb",
        "\0",
        "~",
        "~nobody_here",
        "gs://b",
        "\udcff",
        [1],
        {},
        {"a": {"b": 1}},
        (1,),
        b"x",
        object(),
        1j,
    ),
    *(
        "softmax",
        "hash",
        "expert_choice",
        "dense",
        "capacity",
        "dropless",
        "all_to_all",
        "ragged_all_to_all",
        "ulysses",
        "full",
    ),
]


def test_any_values_give_one_line_or_a_config_at_once() -> None:
    generator = random.Random(0)
    built = 0
    for _ in range(1500):
        values = RunConfig().to_dict()
        values["model"]["moe"]["num_experts"] = generator.choice([0, 8])
        changes = {}
        for section, name, default in generator.sample(FIELDS, generator.choice([1, 2, 2, 3])):
            alike = [value for value in VALUES if type(value) is type(default)]
            changes[f"{section}__{name}"] = generator.choice(
                alike if generator.random() < 0.8 else VALUES
            )
        for path, value in changes.items():
            *sections, name = path.split("__")
            group = values
            for section in sections:
                group = group[section]
            group[name] = value
        start = time.process_time()
        try:
            config = RunConfig.from_config_dict(values)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        else:
            built += 1
            assert len(config.model.sparse_layers) <= config.model.num_layers
            assert "parameters: " in summary(config)
        assert time.process_time() - start < 1, {
            path: repr(value)[:40] for path, value in changes.items() if value != 10**5000
        }
    assert 100 < built < 1400


def test_every_int_is_bounded() -> None:
    """The largest integer that a message names is never refused for its size as an int32."""
    for path in INTS:
        try:
            run_config(**{path: LARGEST_INT})
        except ConfigError as error:
            assert "int32:" not in str(error)


def test_where_arguments_are_not_taken_for_utf_8_a_path_in_utf_8_is_told_so(monkeypatch):
    """With LC_ALL=C and PYTHONUTF8=0 an é of the command line arrives as two halves."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    advice = "without NUL, and set PYTHONUTF8=1, since this process takes arguments for ascii"
    with pytest.raises(ConfigError, match=advice):
        expand_run_path("--workdir", "\udcc3\udca9")
