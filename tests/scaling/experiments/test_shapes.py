"""Tests the rules that choose shapes and hyperparameters, on numbers worked out by hand."""

import dataclasses

import pytest

from moe.config import ModelConfig, MoEConfig, RunConfig
from moe.scaling.experiments.shapes import scale_model, scale_run, tokens_for, tune
from moe.scaling.flops import total_parameters, training_flops_per_token

BASE = ModelConfig(
    num_layers=4, model_dim=128, feed_forward_dim=344, num_heads=4, num_kv_heads=2, head_dim=32
)


def test_the_bases_own_width_is_the_base() -> None:
    assert scale_model(BASE, 128) == BASE


@pytest.mark.parametrize(
    ("width", "layers", "feed_forward", "heads", "kv_heads", "head_dim"),
    [
        (256, 8, 688, 8, 4, 32),
        # 344 * 96 / 128 = 258, of which the nearest multiple of 8 is 256; 96 / 32 = 3 heads share
        # 1.5 key/value heads, and 1 divides 3.
        (96, 3, 256, 3, 1, 32),
        (48, 2, 128, 2, 1, 24),  # 24 is nearer to 32 than 48 is, as a ratio. Two layers at least
        (32, 2, 88, 1, 1, 32),
        (62, 2, 168, 1, 1, 62),  # the even divisors of 62 are 2 and 62; 62 / 32 is nearer to 1
    ],
)
def test_a_width_keeps_the_proportions(
    width: int, layers: int, feed_forward: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    model = scale_model(BASE, width)
    shape = (model.num_layers, model.feed_forward_dim, model.num_heads, model.num_kv_heads)
    assert shape == (layers, feed_forward, heads, kv_heads) and model.head_dim == head_dim
    assert model.model_dim == width and model.moe == BASE.moe


def test_every_width_makes_a_valid_model() -> None:
    for width in range(2, 600, 2):
        scale_model(BASE, width)  # which raises ConfigError if it is not


def test_experts_scale_with_the_width_and_get_their_layers() -> None:
    moe = MoEConfig(num_experts=8, expert_dim=88, first_dense_layers=1, layer_period=2)
    model = scale_model(dataclasses.replace(BASE, moe=moe), 32)
    # 88 * 32 / 128 = 22, of which the nearest multiple of 8 is 24.
    assert (model.num_layers, model.moe.expert_dim, model.moe.num_experts) == (3, 24, 8)


def test_hyperparameters_at_the_size_of_the_paper() -> None:
    """At 108M parameters and 20 tokens for each, the rounded fits are 0.0047 and 160 rows."""
    model = ModelConfig(vocab_size=256, num_layers=9, model_dim=1000, feed_forward_dim=2667)
    model = dataclasses.replace(model, num_heads=10, num_kv_heads=10, head_dim=100)
    parameters = total_parameters(model) - 256_000
    assert parameters == pytest.approx(108e6, rel=0.01)
    chosen = tune(model, 2048, 20 * parameters)
    assert chosen.learning_rate == pytest.approx(0.0047, rel=0.005)
    assert chosen.batch_size == pytest.approx(160, abs=1)
    # It warms up for as many tokens as it has parameters: a twentieth of them.
    assert chosen.warmup_fraction == pytest.approx(0.05)
    assert chosen.steps == pytest.approx(20 * parameters / 160 / 2048, rel=0.01)


def test_hyperparameters_follow_size_and_tokens() -> None:
    small, wide = scale_model(BASE, 64), scale_model(BASE, 128)
    sizes = [total_parameters(model) - 256 * model.model_dim for model in (small, wide)]
    few, more, enough, many = (tune(small, 128, count * sizes[0]) for count in (1, 8, 20, 160))
    assert many.batch_size / enough.batch_size == pytest.approx(4, rel=0.02)
    # The learning rate goes with the square root of the batch, up to 20 tokens per parameter.
    assert more.learning_rate / few.learning_rate == pytest.approx(2, rel=0.01)
    assert many.learning_rate == enough.learning_rate
    wide_ones = [tune(wide, 128, count * sizes[1]) for count in (8, 160)]
    for one, other in zip(wide_ones, (more, many), strict=True):
        ratio = one.learning_rate / other.learning_rate
        assert ratio == pytest.approx((sizes[1] / sizes[0]) ** (-1 / 3), rel=0.01)
    halved = tune(small, 128, 20 * sizes[0], 0.5)
    assert halved.learning_rate == pytest.approx(enough.learning_rate / 2, rel=0.01)
    # Where the tokens are few, the warm-up ends after a fifth of them, and where they are many it
    # has a fiftieth.
    assert few.warmup_fraction == 0.2 and many.warmup_fraction == 0.02


def test_experts_do_not_change_the_hyperparameters() -> None:
    moe = MoEConfig(num_experts=64, experts_per_token=1, expert_dim=344)
    assert tune(dataclasses.replace(BASE, moe=moe), 128, 1e7) == tune(BASE, 128, 1e7)


def test_a_run_spends_its_flops() -> None:
    base = RunConfig(model=BASE)
    model = scale_model(BASE, 64)
    run = scale_run(base, model, tokens_for(model, 256, 1e13))
    tokens = run.train.steps * run.train.batch_size * 256
    assert tokens * training_flops_per_token(model, 256) == pytest.approx(1e13, rel=1e-3)
    assert run.train.eval_every == run.train.steps
    assert 4 <= run.train.steps // run.train.checkpoint_every <= 5
