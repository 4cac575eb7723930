"""Makes the points of scaling experiments: ladders over sizes, experts and hyperparameters.

Shapes, learning rates, batches and warm-ups follow the rules of shapes.py, so that a ladder varies
only what it names.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.scaling.shapes import scale_model, scale_run, tokens_for
from moe.scaling.sweep import Point, overrides_between


def iso_flop_ladder(
    base: RunConfig,
    widths_by_budget: Mapping[float, Sequence[int]],
    learning_rate_factor: float = 1.0,
) -> Iterator[Point]:
    """Yields a run for each budget of training FLOPs and each of its widths.

    Every run of a budget spends it as nearly as whole steps can: a wider model sees fewer tokens.
    This is approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2).
    """
    for budget, widths in widths_by_budget.items():
        for width in widths:
            model = scale_model(base.model, width)
            tokens = tokens_for(model, base.data.sequence_length, budget)
            config = scale_run(base, model, tokens, learning_rate_factor)
            yield Point(f"flops_{budget:.3g}/width_{width}", overrides_between(base, config))


def sparsity_ladder(
    base: RunConfig,
    widths: Sequence[int],
    expansions: Sequence[int],
    tokens: float,
    granularities: Sequence[int] = (1,),
    learning_rate_factor: float = 1.0,
) -> Iterator[Point]:
    """Yields a run for each width, each expansion and each granularity, at equal active FLOPs.

    An expansion is the experts' total width over that of a dense model. A granularity of G cuts
    each expert into G, of which a token takes G, so that it spends as many FLOPs as the dense model
    and the router in addition (Krajewski et al. 2024, arXiv 2402.07871). The expansion 1 is that
    dense model, whatever the granularity. All runs train on the same tokens, since a routed law
    such as that of Clark et al. 2022 (arXiv 2202.01169) has no term for their number.
    """
    for width in widths:
        dense = scale_model(with_experts(base.model, 1, 1), width)
        for expansion in expansions:
            for granularity in granularities if expansion > 1 else (1,):
                model = with_experts(dense, expansion, granularity)
                config = scale_run(base, model, tokens, learning_rate_factor)
                cut = f"_granularity_{granularity}" if len(granularities) > 1 else ""
                name = f"width_{width}/experts_{expansion}{cut}"
                yield Point(name, overrides_between(base, config))


def with_experts(model: ModelConfig, expansion: int, granularity: int) -> ModelConfig:
    """Returns a model with as many active FLOPs whose experts are `expansion` times as wide.

    The expansion 1 makes it dense. The feed-forward width stays in the config: it is that of the
    dense twin, to which the experts' width is compared.
    """
    if expansion == 1:
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=0))
    if model.feed_forward_dim % granularity:
        raise ConfigError(
            f"granularity={granularity} does not divide feed_forward_dim={model.feed_forward_dim}: "
            "set granularity to a divisor of it"
        )
    moe = dataclasses.replace(
        model.moe,
        num_experts=expansion * granularity,
        experts_per_token=granularity,
        expert_dim=model.feed_forward_dim // granularity,
    )
    return dataclasses.replace(model, moe=moe)


def tuning_grid(
    base: RunConfig, learning_rates: Sequence[float], batch_sizes: Sequence[int]
) -> Iterator[Point]:
    """Yields a run for each learning rate and each batch, all on as many tokens as the base."""
    rows = base.train.steps * base.train.batch_size
    for batch_size in batch_sizes:
        for rate in learning_rates:
            steps = max(1, round(rows / batch_size))
            yield Point(
                f"learning_rate_{rate:g}/batch_{batch_size}",
                {
                    "optimizer.learning_rate": rate,
                    "train.batch_size": batch_size,
                    "train.steps": steps,
                    "train.eval_every": steps,
                },
            )
