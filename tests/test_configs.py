"""Tests that every config loads, says how to run it, and fits the hardware that it names.

Configs of published models are held against the published numbers of parameters.
"""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from launch.sweep_file import distinct, read_sweep
from launch.sweep_table import planned_row
from moe.config import RunConfig, check_layout
from moe.scaling.flops import (
    active_parameters,
    component_counts,
    total_parameters,
    training_flops_per_token,
)

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def load(name: str) -> RunConfig:
    return RunConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_survives_json(name):
    config = load(name)
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_has_command_hardware_time_and_result(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    command = re.search(
        rf"^Command:  python -m launch\.(train|benchmark) --config=configs/{name}\.py(.*)$",
        text,
        re.MULTILINE,
    )
    assert command and re.search(r"^Hardware: ", text, re.MULTILINE)
    if command[1] == "train":
        assert command[2] == f" --workdir=runs/{name}"
        assert re.search(r"^Time, result: not measured", text, re.MULTILINE) or re.search(
            r"^Time: +.+\n( +.+\n)*Result: +", text, re.MULTILINE
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_config_fits_the_accelerators_it_names(name):
    number = re.search(
        r"^Hardware: ([\d,]+) H200",
        importlib.import_module(f"configs.{name}").__doc__,
        re.MULTILINE,
    )
    devices = int(number[1].replace(",", "")) if number else 1
    config = load(name)
    check_layout(config, config.mesh.resolve(devices))
    assert devices > 1 or total_parameters(config.model) < 1e9


SWEEPS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("experiments", "sweeps")
    for path in (ROOT / "configs" / folder).glob("[!_]*.py")
)


@pytest.mark.parametrize("file", SWEEPS)
def test_a_sweep_loads_and_says_how_to_run_it(file):
    planned = read_sweep(str(ROOT / file), [])
    assert len(planned) > 2 and distinct(planned) == planned
    text = importlib.import_module(file.removesuffix(".py").replace("/", ".")).__doc__
    command = "sweep" if "/sweeps/" in file else "compare"
    assert re.search(rf"^Command:  python -m launch\.{command} --sweep={file}", text, re.MULTILINE)
    assert re.search(r"^Hardware: 2 CPU cores\.$", text, re.MULTILINE)
    assert re.search(r"^Time(, result)?: +", text, re.MULTILINE)


def test_isoflop_tiny_has_four_budgets_of_five_sizes():
    planned = read_sweep(str(ROOT / "configs/sweeps/isoflop_tiny.py"), [])
    budgets = {}
    for one in planned:
        if not one.name.startswith("noise"):
            budgets.setdefault(one.name.split("/")[0], []).append(planned_row(one.run))
    assert len(budgets) >= 4
    for name, rows in budgets.items():
        assert len({row["parameters"] for row in rows}) >= 5
        for row in rows:
            assert row["flops"] == pytest.approx(float(name.removeprefix("flops_")), rel=0.005)
            # The learning rates have settled: each run has hundreds of steps.
            assert row["steps"] > 500 and row["warmup_steps"] <= row["steps"] / 5 + 1


def test_sparsity_tiny_compares_models_of_equal_active_flops():
    planned = read_sweep(str(ROOT / "configs/sweeps/sparsity_tiny.py"), [])
    rows = [planned_row(one.run) for one in planned]
    assert [row["experts"] for row in rows] == [1, 4, 16, 64] * 3
    assert len({row["tokens"] for row in rows}) == 1
    for size in (rows[:4], rows[4:8], rows[8:]):
        flops = [row["flops"] for row in size]
        assert flops == sorted(flops) and flops[-1] < 1.11 * flops[0]  # the routers


EXPERIMENTS = [f"experiments.{Path(file).stem}" for file in SWEEPS if "/experiments/" in file]
# The steps of warm-up that configs had when they were measured. They state a fraction of the steps.
WARMUP_STEPS = {
    "bpe_tiny": 50,
    "benchmark_dense": 100,
    "benchmark_moe": 100,
    "dense_125m": 200,
    "dense_1b": 1000,
    "dense_1b_32k": 1000,
    "dense_7b": 2000,
    "dense_tiny": 50,
    "mixture_tiny": 50,
    "chat_tiny": 125,
    "experiments.moe_vs_dense": 50,
    "experiments.requests": 125,
    "fill_in_the_middle_tiny": 50,
    "experiments.schedules": 50,
    "masked_tiny": 50,
    "moe_1b_7b": 2000,
    "moe_30b_a3b": 2000,
    "moe_671b": 2000,
    "moe_671b_pipeline": 2000,
    "moe_pipeline_tiny": 50,
    "moe_8x7b": 2000,
    "moe_tiny": 50,
    "packages_tiny": 50,
    "text_tiny": 50,
    "span_corruption_tiny": 50,
}


@pytest.mark.parametrize(("name", "warmup_steps"), WARMUP_STEPS.items())
def test_a_config_warms_up_in_its_steps(name, warmup_steps):
    assert load(name).warmup_steps == warmup_steps


@pytest.mark.parametrize("name", [*NAMES, *EXPERIMENTS])
def test_a_config_runs_with_few_steps(name):
    short = importlib.import_module(f"configs.{name}").get_config()
    for steps in (1, 20):
        short.train.steps = steps  # as --config.train.steps=20 does
        assert RunConfig.from_config_dict(short).warmup_steps < short.train.steps


def test_the_default_config_of_make_train_exists():
    default = re.search(
        r"^CONFIG \?= configs/(\w+)\.py$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert default[1] in NAMES


# The parameters of published checkpoints, by the sizes in their safetensors index. OLMoE's norms on
# queries and keys are subtracted, since these are over all heads together.
TOTALS = {
    "dense_1b": 1_235_814_400,
    "dense_7b": 6_738_415_616,
    "moe_1b_7b": 6_919_161_856 - 16 * 2 * 2048,
    "moe_8x7b": 46_702_792_704,
    "moe_30b_a3b": 30_532_122_624,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_parameters_equal_the_published_checkpoints(name, total):
    assert total_parameters(load(name).model) == total


# In billions, as the papers print them. Numbers may differ by one unit of the last digit, since
# Qwen prints 3.353 as 3.3.
@pytest.mark.parametrize(
    ("name", "total", "active", "unit"),
    [
        ("moe_1b_7b", 6.92, 1.28, 0.01),
        ("moe_8x7b", 46.7, 12.9, 0.1),
        ("moe_30b_a3b", 30.5, 3.3, 0.1),
    ],
)
def test_parameters_agree_with_the_papers(name, total, active, unit):
    model = load(name).model
    assert total_parameters(model) / 1e9 == pytest.approx(total, abs=unit)
    assert active_parameters(model) / 1e9 == pytest.approx(active, abs=unit)


def test_671b_is_deepseek_v3_but_for_attention():
    model = load("moe_671b").model
    counts = {count.name: count for count in component_counts(model, 1)}
    expert = 3 * 7168 * 2048
    assert counts["experts"].parameters == 58 * 256 * expert == 653_908_770_816
    assert counts["experts"].active_parameters == 58 * 8 * expert
    assert counts["shared experts"].parameters == 58 * expert
    assert counts["router"].parameters == 58 * 7168 * 256
    assert counts["feed-forward"].parameters == 3 * 3 * 7168 * 18_432
    # Latent attention (eq. 1-11): queries through 1536; keys and values through 512; 128 heads of
    # 128, and 64 rotary ones shared by keys.
    queries = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    latent_attention = (
        queries + 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128) + 128 * 128 * 7168
    )
    swap = 61 * latent_attention - counts["attention projections"].parameters
    # The published weights, without their 58 biases of 256.
    assert total_parameters(model) + swap == 671_026_404_352
    # The published "36.6B (including 0.9B for the output head)" leaves out the embedding.
    assert (
        active_parameters(model) + swap - counts["embedding"].parameters
    ) / 1e9 == pytest.approx(36.6, abs=0.05)


def test_671b_routes_as_deepseek_v3_does():
    moe = load("moe_671b").model.moe
    assert (moe.router, moe.normalize_weights, moe.weight_scale) == ("sigmoid", True, 2.5)
    assert (moe.num_groups, moe.groups_per_token, moe.experts_per_token) == (8, 4, 8)
    assert (moe.bias_update_rate, moe.balance_scope, moe.balance_weight) == (
        0.001,
        "row",
        pytest.approx(58 * 1e-4),
    )


def test_moe_tiny_costs_as_much_per_token_as_dense_tiny():
    sparse, dense = load("moe_tiny"), load("dense_tiny")
    assert sparse.data == dense.data and sparse.warmup_steps == dense.warmup_steps
    assert (
        dataclasses.replace(sparse.optimizer, warmup_fraction=dense.optimizer.warmup_fraction)
        == dense.optimizer
    )
    flops = [
        training_flops_per_token(config.model, config.data.sequence_length)
        for config in (sparse, dense)
    ]
    assert 1 < flops[0] / flops[1] < 1.01  # the router is the difference
    assert (
        active_parameters(sparse.model)
        < 1.01 * total_parameters(dense.model)
        < total_parameters(sparse.model) / 3
    )
