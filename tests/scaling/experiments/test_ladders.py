"""Tests the points of scaling experiments: what they vary, and what stays equal."""

import dataclasses
import json

import numpy as np
import pytest

from moe.config import (
    ConfigError,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moe.scaling.experiments.ladders import (
    iso_flop_ladder,
    sparsity_ladder,
    token_ladder,
    tuning_grid,
)
from moe.scaling.experiments.sweep import Run, expand
from moe.scaling.flops import training_flops_per_token

BASE = RunConfig(
    model=ModelConfig(
        num_layers=2, model_dim=64, feed_forward_dim=192, num_heads=2, num_kv_heads=2, head_dim=32
    ),
    train=TrainConfig(steps=100, batch_size=32),
)


def tokens(run: Run) -> int:
    """Returns the number of tokens that a run trains on."""
    return run.config.train.steps * run.config.train.batch_size * run.config.data.sequence_length


def flops(run: Run) -> float:
    """Returns the training FLOPs of a whole run."""
    model, length = run.config.model, run.config.data.sequence_length
    return training_flops_per_token(model, length) * tokens(run)


def test_each_budget_is_spent_at_each_width() -> None:
    runs = expand(BASE, iso_flop_ladder(BASE, {1e12: (32, 64), 4e12: (64, 128, 256)}))
    assert [run.name for run in runs] == [
        "flops_1e+12/width_32",
        "flops_1e+12/width_64",
        "flops_4e+12/width_64",
        "flops_4e+12/width_128",
        "flops_4e+12/width_256",
    ]
    assert [run.config.model.model_dim for run in runs] == [32, 64, 64, 128, 256]
    for run, budget in zip(runs, [1e12, 1e12, 4e12, 4e12, 4e12], strict=True):
        # Steps are whole, and a run has hundreds of them.
        assert flops(run) == pytest.approx(budget, rel=0.005)


def test_experts_cost_no_flops_but_for_the_router() -> None:
    ladder = sparsity_ladder(BASE, (64, 128), (1, 4, 16), 1e6, granularities=(1, 2))
    runs = {run.name: run for run in expand(BASE, ladder)}
    assert list(runs)[:5] == [
        "width_64/experts_1_granularity_1",
        "width_64/experts_4_granularity_1",
        "width_64/experts_4_granularity_2",
        "width_64/experts_16_granularity_1",
        "width_64/experts_16_granularity_2",
    ]
    assert len(runs) == 10
    assert all(tokens(run) == pytest.approx(1e6, rel=0.01) for run in runs.values())
    dense = runs["width_64/experts_1_granularity_1"]
    assert dense.config.model.moe.num_experts == 0
    for name, experts, active, width in (
        ("width_64/experts_4_granularity_1", 4, 1, 192),
        ("width_64/experts_16_granularity_2", 32, 2, 96),
    ):
        run = runs[name]
        moe = run.config.model.moe
        assert (moe.num_experts, moe.experts_per_token, moe.expert_dim) == (experts, active, width)
        assert run.config.train == dense.config.train
        # Two layers have a router of 64 x experts each: 2 FLOPs per weight forward, 4 backward.
        extra = 6 * 2 * 64 * experts * tokens(run)
        assert flops(run) - extra == pytest.approx(flops(dense), rel=1e-9)


def test_one_granularity_is_not_in_the_names() -> None:
    names = [point.name for point in sparsity_ladder(BASE, (64,), (1, 4), 1e6)]
    assert names == ["width_64/experts_1", "width_64/experts_4"]
    with pytest.raises(ConfigError, match="granularity=5 does not divide feed_forward_dim=192"):
        list(sparsity_ladder(BASE, (64,), (4,), 1e6, granularities=(5,)))


def test_a_base_with_experts_gives_the_same_ladder() -> None:
    """The experts of the base do not count, but its router does."""
    moe = MoEConfig(num_experts=8, z_weight=0.5)
    model = ModelConfig(**{**vars(BASE.model), "moe": moe})
    base = RunConfig(model=model, train=BASE.train)
    runs = expand(base, sparsity_ladder(base, (64,), (1, 4), 1e6))
    assert [run.config.model.moe.num_experts for run in runs] == [0, 4]
    assert runs[1].config.model.moe.z_weight == 0.5


def test_a_tuning_grid_trains_on_equal_tokens() -> None:
    runs = expand(BASE, tuning_grid(BASE, (0.001, 0.01), (16, 32, 64)))
    assert len(runs) == 6 and len({run.identity for run in runs}) == 6
    assert {tokens(run) for run in runs} == {100 * 32 * 256}
    assert runs[1].name == "learning_rate_0.01/batch_16"
    assert runs[1].config.optimizer.learning_rate == 0.01 and runs[1].config.train.steps == 200


def test_token_counts_fork_one_stable_phase() -> None:
    base = dataclasses.replace(BASE, optimizer=OptimizerConfig(schedule="wsd"))
    runs = expand(base, token_ladder(base, (32, 64), (1e6, 2e6, 4e6)))
    for trunk, *forks in (runs[:3], runs[3:]):
        assert trunk.fork_from is None and tokens(trunk) == pytest.approx(4e6, rel=0.01)
        assert [tokens(fork) for fork in forks] == pytest.approx([1e6, 2e6], rel=0.02)
        for fork in forks:
            assert fork.fork_from == trunk.name
            # The trunk keeps this checkpoint, which is before both decays, but not long before.
            assert fork.fork_step % trunk.config.train.keep_every == 0
            stable = fork.config.shared_updates(trunk.config)
            assert 0.75 * stable < fork.fork_step <= stable
            # A fork may differ from its trunk in the number of steps alone.
            train = dataclasses.replace(fork.config.train, steps=trunk.config.train.steps)
            assert dataclasses.replace(fork.config, train=train) == trunk.config
    with pytest.raises(ConfigError, match=r"optimizer.schedule='cosine' has no stable phase"):
        list(token_ladder(BASE, (32,), (1e6, 2e6)))


def test_forks_start_where_the_decay_does_if_checkpoints_allow() -> None:
    """Batches of 10 rows make 400 and 800 steps of these tokens, and a fifth of each is decay."""
    base = dataclasses.replace(BASE, optimizer=OptimizerConfig(schedule="wsd"))
    trunk, fork = expand(base, token_ladder(base, (64,), (400 * 2560, 800 * 2560)))
    assert trunk.config.train.batch_size == 10 and trunk.config.train.steps == 800
    assert (fork.config.train.steps, fork.fork_step) == (400, 320)
    assert trunk.config.train.keep_every == 320


WSD = dataclasses.replace(BASE, optimizer=OptimizerConfig(schedule="wsd"))


def test_ladders_take_numpy_arrays() -> None:
    base = dataclasses.replace(BASE, optimizer=OptimizerConfig(schedule="wsd"))
    widths = np.array([32, 64])
    for ladder, as_arrays, as_lists in (
        (iso_flop_ladder, ({np.float64(4e13): widths},), ({4e13: [32, 64]},)),
        (token_ladder, (widths, 2e6 * np.arange(1, 3)), ([32, 64], [2e6, 4e6])),
        (tuning_grid, (np.array([0.5, 0.25]), widths), ([0.5, 0.25], [32, 64])),
    ):
        found = expand(base, ladder(base, *as_arrays))
        assert found == expand(base, ladder(base, *as_lists))
        assert json.dumps([run.config.to_dict() for run in found])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (iso_flop_ladder(BASE, {1e6: (64,)}), "^1.07 tokens are too few for one step of a mod"),
        (iso_flop_ladder(BASE, {-1.0: (64,)}), r"^budgets=\[-1.0\]: set budgets to one or more"),
        (iso_flop_ladder(BASE, {}), r"^budgets=\[\]: set budgets to one or more numbers above 0"),
        (iso_flop_ladder(BASE, {1e12: (64, 0)}), r"^widths=\(64, 0\): set widths to one or more"),
        (sparsity_ladder(BASE, (64,), (0, 4), 1e6), r"^expansions=\(0, 4\): set expansions to one"),
        (sparsity_ladder(BASE, (64,), (1, 4), 1e6, (-2,)), r"^granularities=\(-2,\): set granul"),
        (sparsity_ladder(BASE, (64,), (1, 4), 1e1), "^10 tokens are too few for one step of a mod"),
        (tuning_grid(BASE, (), (8,)), r"^learning_rates=\(\): set learning_rates to one or mo"),
        (tuning_grid(BASE, (0.1,), (0,)), r"^batch_sizes=\(0,\): set batch_sizes to one or more"),
        (tuning_grid(BASE, (0.1,), (10_000,)), "^3.2e.03 rows are less than one step of batch"),
        (token_ladder(WSD, (64,), ()), r"^tokens=\(\): set tokens to one or more numbers above 0"),
        (token_ladder(WSD, (64,), (10, 1e7)), "^0.0391 rows are less than one step of batch_size="),
        (token_ladder(WSD, (64,), (float("nan"),)), r"^tokens=\(nan,\): set tokens to one or more"),
    ],
)  # fmt: skip
def test_a_ladder_that_cannot_be_trained_is_told_in_one_line(points, message) -> None:
    """No run trains on more than it was given, and none has a name that is not true of it."""
    with pytest.raises(ConfigError, match=message) as caught:
        list(points)
    assert "\n" not in str(caught.value)
