"""The models that could spend a budget: those of a table, and scaled ones."""

import dataclasses

import numpy as np
import pytest

from moe.config import MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from moe.scaling.experiments.candidates import (
    candidate_widths,
    columns_at,
    list_candidates,
    rate_factor,
    smooth_families,
)
from moe.scaling.experiments.shapes import scale_run
from moe.scaling.flops import planned_flops, total_parameters, training_flops_per_token

SMALL = ModelConfig(num_layers=2, model_dim=64, feed_forward_dim=256, num_heads=4, head_dim=16)
# 96 / 64 of the depth would be 3: this model is not what the rule makes of SMALL.
WIDE = dataclasses.replace(SMALL, model_dim=96, num_layers=5)
SPARSE = dataclasses.replace(
    SMALL, moe=MoEConfig(num_experts=8, experts_per_token=2, expert_dim=128)
)


def bases(*models: ModelConfig) -> list[RunConfig]:
    return [RunConfig(model=model, train=TrainConfig(steps=100)) for model in models]


def test_the_models_of_the_table_are_candidates_as_they_are() -> None:
    models = [candidate.model for candidate in list_candidates(bases(SMALL, WIDE))]
    assert SMALL in models and WIDE in models
    assert len({model.model_dim for model in models}) == len(models)


def test_other_widths_are_scaled_from_the_nearest_model() -> None:
    by_width = {c.model.model_dim: c for c in list_candidates(bases(SMALL, WIDE))}
    assert by_width[72].base.model == SMALL and by_width[88].base.model == WIDE
    # 88 / 96 of 5 layers, and 72 / 64 of 2 layers
    assert by_width[88].model.num_layers == 5 and by_width[72].model.num_layers == 2


def test_models_with_other_experts_are_kept_apart() -> None:
    candidates = list_candidates(bases(SMALL, SPARSE))
    at_64 = [c for c in candidates if c.model.model_dim == 64]
    assert [c.model for c in at_64] == [SMALL, SPARSE]
    assert at_64[0].columns["experts"] == 1 and at_64[0].columns["sparsity"] == 0
    assert at_64[1].columns["experts"] == 8 and at_64[1].columns["sparsity"] == 0.75
    assert at_64[1].columns["granularity"] == 2
    assert at_64[1].columns["active_parameters"] < at_64[1].columns["parameters"]
    # Each kind has a narrowest and a widest model.
    assert sum(c.is_edge for c in candidates) == 4


def test_widths_reach_beyond_the_table() -> None:
    widths = candidate_widths([60, 200])
    assert {60, 200} <= set(widths) and widths == sorted(widths)
    assert widths[0] == 8 and widths[-1] == 1600
    others = np.array([width for width in widths if width not in (60, 200)])
    assert not (others % 8).any()
    assert (np.diff(others) <= 8 + 0.045 * others[:-1]).all()


def test_the_columns_spend_the_budget() -> None:
    candidates = list_candidates(bases(SMALL))
    columns = columns_at(candidates, 1e13)
    place = [c.model for c in candidates].index(SMALL)
    assert columns["parameters"][place] == total_parameters(SMALL)
    per_token = training_flops_per_token(SMALL, 256)
    assert columns["tokens"][place] == pytest.approx(1e13 / per_token)
    np.testing.assert_array_equal(columns["flops"], 1e13)


def test_the_config_of_a_candidate_spends_the_budget_to_half_a_step() -> None:
    for candidate in list_candidates(bases(SMALL, SPARSE))[::9]:
        run = candidate.run(1e14)
        assert run.model == candidate.model
        step = planned_flops(run) / run.train.steps
        assert abs(planned_flops(run) - 1e14) <= 0.5 * step


def test_a_fixed_mesh_splits_every_candidate_and_its_batch() -> None:
    mesh = MeshConfig(data=8, tensor=4)
    base = RunConfig(model=SMALL, mesh=mesh, train=TrainConfig(steps=100, batch_size=64))
    candidates = list_candidates([base])
    assert all(c.run(3e12).train.batch_size % 8 == 0 for c in candidates)
    assert all(c.model.num_heads % 4 == 0 for c in candidates)
    # The widest and narrowest models of the rule may be none that the mesh can split.
    assert [c.is_edge for c in candidates] == [True] + [False] * (len(candidates) - 2) + [True]


def test_the_learning_rate_stays_as_many_times_the_rules() -> None:
    base = RunConfig(model=SMALL, train=TrainConfig(steps=100))
    tripled = scale_run(base, SMALL, 1e7, learning_rate_factor=3.0)
    assert rate_factor(tripled) == pytest.approx(3, rel=1e-2)
    (candidate,) = [c for c in list_candidates([tripled]) if c.model.model_dim == 128]
    assert rate_factor(candidate.run(1e14)) == pytest.approx(3, rel=1e-2)


def test_families_are_near_their_candidates_and_have_no_steps() -> None:
    candidates = list_candidates(bases(SMALL, WIDE, SPARSE))
    dense, sparse = smooth_families(candidates)
    for family, experts in ((dense, 1), (sparse, 8)):
        group = [c for c in candidates if c.columns["experts"] == experts]
        active = np.array([c.columns["active_parameters"] for c in group])
        assert family.ends == pytest.approx(np.log10([active.min(), active.max()]))
        columns = family.columns(np.log10(active))
        np.testing.assert_allclose(columns["active_parameters"], active)
        for name in ("parameters", "experts", "experts_per_token", "sparsity"):
            known = np.array([c.columns[name] for c in group])
            np.testing.assert_allclose(columns[name], known, rtol=0.1)
        cost = np.array([c.flops_per_token for c in group])
        np.testing.assert_allclose(columns["flops_per_token"], cost, rtol=0.06)
        # A step of 1 % in size costs about 1 % more at any size.
        size = np.arange(*family.ends, np.log10(1.01))
        growth = np.diff(np.log(family.columns(size)["flops_per_token"])) / np.log(1.01)
        assert growth.min() > 0.8 and growth.max() < 1.2
        body = active - [c.columns["embedding_parameters"] for c in group]
        found = columns["active_parameters"] - columns["embedding_parameters"]
        np.testing.assert_allclose(found, body, rtol=0.15)
    np.testing.assert_allclose(
        dense.columns(np.array([5.0]))["parameters"], 1e5, rtol=1e-9, err_msg="all are active"
    )
