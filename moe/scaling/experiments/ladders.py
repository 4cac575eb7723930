"""Makes the points of scaling experiments: ladders over sizes, experts and hyperparameters.

Shapes, learning rates, batches and warm-ups follow the rules of shapes.py, so that a ladder varies
only what it names.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.config.checks import show
from moe.scaling.experiments.shapes import scale_model, scale_run, tokens_for
from moe.scaling.experiments.sweep import Point, overrides_between

_MOST_SAVES = 40  # of a trunk, unless its forks need others


def iso_flop_ladder(
    base: RunConfig,
    widths_by_budget: Mapping[float, Sequence[int]],
    learning_rate_factor: float = 1.0,
) -> Iterator[Point]:
    """Yields a run for each budget of training FLOPs and each of its widths.

    Every run of a budget spends it as nearly as whole steps can: a wider model sees fewer tokens.
    This is approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2).
    """
    _check_positive("budgets", list(widths_by_budget))
    for budget, widths in widths_by_budget.items():
        _check_positive("widths", widths)
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
    _check_positive("widths", widths)
    _check_positive("expansions", expansions)
    _check_positive("granularities", granularities)
    for width in widths:
        dense = scale_model(with_experts(base.model, 1, 1), width)
        for expansion in expansions:
            for granularity in granularities if expansion > 1 else (1,):
                model = with_experts(dense, expansion, granularity)
                config = scale_run(base, model, tokens, learning_rate_factor)
                cut = f"_granularity_{granularity}" if len(granularities) > 1 else ""
                name = f"width_{width}/experts_{expansion}{cut}"
                yield Point(name, overrides_between(base, config))


def _check_positive(name: str, values: Sequence[float]) -> None:
    """Raises ConfigError if an argument of a ladder is empty or has numbers that cannot be."""
    if len(values) == 0 or not all(0 < value < math.inf for value in values):
        raise ConfigError(f"{name}={show(values)}: set {name} to one or more numbers above 0")


def _whole_steps(rows: float, batch_size: int) -> int:
    """Returns the number of steps that is nearest to so many rows. Raises ConfigError for none."""
    steps = round(rows / batch_size)
    if steps < 1:
        raise ConfigError(
            f"{rows:.3g} rows are less than one step of batch_size={batch_size}: "
            "set more tokens, or a smaller batch"
        )
    return steps


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
    _check_positive("learning_rates", learning_rates)
    _check_positive("batch_sizes", batch_sizes)
    rows = base.train.steps * base.train.batch_size
    for batch_size in batch_sizes:
        for rate in learning_rates:
            steps = _whole_steps(rows, batch_size)
            yield Point(
                f"learning_rate_{rate:g}/batch_{batch_size}",
                {
                    "optimizer.learning_rate": rate,
                    "train.batch_size": batch_size,
                    "train.steps": steps,
                    "train.eval_every": steps,
                },
            )


def token_ladder(
    base: RunConfig,
    widths: Sequence[int],
    tokens: Sequence[float],
    learning_rate_factor: float = 1.0,
) -> Iterator[Point]:
    """Yields a run for each width and each number of tokens, which share one stable phase.

    The base has the schedule "wsd". For each width the longest run, the trunk, is trained from the
    start. Each shorter one forks the whole state of the trunk's stable phase and trains its own
    decay (Hägele et al. 2024, arXiv 2405.18392), so that the loss of each number of tokens is that
    of a run of its own. All runs of a width have one batch and one learning rate, those of the
    geometric mean of the tokens.
    """
    if base.optimizer.schedule != "wsd":
        raise ConfigError(
            f"optimizer.schedule={base.optimizer.schedule!r} has no stable phase from which runs "
            "fork: set optimizer.schedule to 'wsd'"
        )
    _check_positive("widths", widths)
    _check_positive("tokens", tokens)
    middle = math.exp(sum(map(math.log, tokens)) / len(tokens))
    for width in widths:
        model = scale_model(base.model, width)
        typical = scale_run(base, model, middle, learning_rate_factor)
        rows = [count / base.data.sequence_length for count in tokens]
        steps = sorted({_whole_steps(count, typical.train.batch_size) for count in rows})
        yield from _fork_points(base, typical, steps, f"width_{width}")


def _fork_points(
    base: RunConfig, typical: RunConfig, steps: Sequence[int], name: str
) -> Iterator[Point]:
    """Yields a trunk of the largest number of steps, and a fork of it for each other number."""
    optimizer = dataclasses.replace(typical.optimizer, warmup_steps=typical.warmup_steps)

    def make_run(number: int, interval: int) -> RunConfig:
        """Returns the run of a number of steps that keeps a checkpoint every `interval` steps."""
        train = dataclasses.replace(
            typical.train,
            steps=number,
            eval_every=steps[-1],
            checkpoint_every=interval,
            keep_every=interval,
        )
        return dataclasses.replace(typical, optimizer=optimizer, train=train)

    trunk = make_run(steps[-1], 1)
    ends = [make_run(number, 1).shared_updates(trunk) for number in steps[:-1]]
    # Forks start where their stable phase ends, if a trunk of at most _MOST_SAVES checkpoints has
    # one at each of these steps. Otherwise they start from the last checkpoint before.
    interval = max(math.gcd(*ends) if ends else steps[-1], -(-steps[-1] // _MOST_SAVES))
    yield Point(f"{name}/steps_{steps[-1]}", overrides_between(base, make_run(steps[-1], interval)))
    for number, end in zip(steps, ends, strict=False):
        fork_step = end // interval * interval
        trunk_name = f"{name}/steps_{steps[-1]}" if fork_step else None
        overrides = overrides_between(base, make_run(number, interval))
        yield Point(f"{name}/steps_{number}", overrides, trunk_name, fork_step)
