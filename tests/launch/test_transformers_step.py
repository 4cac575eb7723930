"""Tests that a config and its counterpart in transformers are the same model."""

import dataclasses
import sys

import jax
import pytest

from launch.benchmark import Step, benchmark_beside_transformers
from launch.transformers_step import TransformersStep, check_counterpart, transformers_step
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)

SPARSE = RunConfig(
    model=ModelConfig(
        num_layers=2,
        model_dim=32,
        head_dim=8,
        compute_dtype="float32",
        tied_embeddings=True,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_dim=16),
    ),
    data=DataConfig(sequence_length=16),
    train=TrainConfig(batch_size=16, accumulation=2),
)
DENSE = dataclasses.replace(
    SPARSE,
    model=dataclasses.replace(
        SPARSE.model, moe=MoEConfig(), feed_forward_dim=48, tied_embeddings=False
    ),
)


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_both_steps_train_models_of_one_size(config: RunConfig) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = benchmark_beside_transformers(config, trials=2)
    assert result["parameters"] == result["transformers_parameters"]
    assert len(result["speed_over_transformers_of_trials"]) == 2
    assert ("transformers_experts" in result) == (config is SPARSE)
    step = transformers_step(config)
    losses = [step.run() for _ in range(30)]
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.1  # log(vocabulary) at first


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router", "sigmoid"),
        ("num_shared_experts", 1),
        ("weight_scale", 2.5),
        ("z_weight", 0.1),
        ("dispatch", "capacity"),
        ("experts_per_token", 1),
        ("normalize_weights", False),
    ],
)
def test_what_mixtral_does_not_compute_is_refused(field: str, value: object) -> None:
    check_counterpart(SPARSE)
    sparse = dataclasses.replace(SPARSE.model.moe, **{field: value})
    config = dataclasses.replace(SPARSE, model=dataclasses.replace(SPARSE.model, moe=sparse))
    with pytest.raises(ConfigError, match=rf"^model\.moe\.{field}=.* set model\.moe\.{field} to "):
        check_counterpart(config)


@pytest.mark.parametrize(("theirs", "is_told"), [([2.0, 3.0], False), ([2.0, 9.0], True)])
def test_pairs_of_a_busy_machine_are_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    theirs: list[float],
    is_told: bool,
) -> None:
    step = TransformersStep(lambda: 0.0, 7, {"torch": "1"}, None)
    monkeypatch.setattr("launch.transformers_step.transformers_step", lambda config: step)
    own = Step(lambda: None, jax.devices(), 7, 0.0, 0)
    monkeypatch.setattr("launch.benchmark.compile_step", lambda config: own)
    monkeypatch.setattr("launch.benchmark._time_pairs", lambda *_: ([2.0, 2.0], theirs))
    result = benchmark_beside_transformers(SPARSE)
    assert result["speed_over_transformers_of_trials"] == [second / 2 for second in theirs]
    assert ("measure again" in capsys.readouterr().err) == is_told


def test_other_tasks_are_refused() -> None:
    config = dataclasses.replace(SPARSE, task="custom")
    with pytest.raises(ConfigError, match=r"^task='custom' has no counterpart"):
        check_counterpart(config)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match=r"measures on CPUs.*: set JAX_PLATFORMS=cpu$"):
        benchmark_beside_transformers(SPARSE)


@pytest.mark.parametrize("change", [{"compute_dtype": "bfloat16"}, {"qk_norm": True}], ids=str)
def test_other_models_are_refused(change: dict[str, object]) -> None:
    ((field, value),) = change.items()
    config = dataclasses.replace(DENSE, model=dataclasses.replace(DENSE.model, **change))
    with pytest.raises(ConfigError, match=f"^model.{field}={value!r} has no counterpart"):
        check_counterpart(config)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"torch.*: pip install torch transformers$"):
        transformers_step(SPARSE)
