"""Lists the configs that could spend a budget: those of a table of runs, scaled to other widths.

A width that the table has keeps the table's own model. For any other width, the nearest model with
the same experts is scaled by the rule of moe/scaling/experiments/shapes.py. Learning rate, batch,
warm-up and steps follow from the size and the tokens by the same file's rules.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.scaling.experiments.optimum import Columns, Family
from moe.scaling.experiments.shapes import scale_model, scale_run, tune
from moe.scaling.flops import model_columns, planned_tokens, run_training_flops

WIDTH_STEP = 8  # widths are multiples of this
GROWTH = 1.04  # the ratio of two neighbouring widths, where WIDTH_STEP is less than that
REACH = 8  # how many times narrower, or wider, than the table's models a candidate may be


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that could be trained, with its counts."""

    model: ModelConfig
    base: RunConfig  # the run of the table that the model is scaled from
    flops_per_token: float
    columns: dict[str, float]  # those of a table of runs that do not depend on the tokens
    is_edge: bool  # it is the narrowest, or the widest, model with its experts

    def run(self, budget: float) -> RunConfig:
        """Returns the config that spends a budget on this model, to within half a step."""
        return scale_run(
            self.base, self.model, budget / self.flops_per_token, rate_factor(self.base)
        )


def rate_factor(base: RunConfig) -> float:
    """Returns how many times the rule's learning rate a run has. Scaled runs keep this factor."""
    rule = tune(base.model, base.data.sequence_length, planned_tokens(base))
    return base.optimizer.learning_rate / rule.learning_rate


def list_candidates(bases: Sequence[RunConfig]) -> list[Candidate]:
    """Returns the models of a table's runs, and these models at other widths."""
    groups: dict[tuple, dict[int, RunConfig]] = {}
    for base in bases:
        groups.setdefault(_experts_key(base.model), {}).setdefault(base.model.model_dim, base)
    candidates = []
    for by_width in groups.values():
        found = [_candidate(by_width, width) for width in candidate_widths(by_width)]
        candidates += _mark_edges([candidate for candidate in found if candidate is not None])
    return candidates


def _mark_edges(candidates: list[Candidate]) -> list[Candidate]:
    """Returns candidates, which are sorted by their width, with the first and last as edges."""
    last = len(candidates) - 1
    return [
        dataclasses.replace(candidate, is_edge=number in (0, last))
        for number, candidate in enumerate(candidates)
    ]


def _experts_key(model: ModelConfig) -> tuple:
    """Returns what two models of different widths share if they have the same experts."""
    moe = model.moe
    if not moe.num_experts:
        return ()
    # Widths are rounded, so the granularity is compared to two digits.
    granularity = float(f"{model.feed_forward_dim / moe.expert_dim:.2g}")
    return (dataclasses.replace(moe, expert_dim=1), granularity)


def candidate_widths(widths: Iterable[int]) -> list[int]:
    """Returns the given widths, and others between and beyond them, in order."""
    given = sorted(widths)
    low, high = given[0] / REACH, given[-1] * REACH
    count = math.ceil(math.log(high / low) / math.log(GROWTH)) + 1
    grid = np.geomspace(low, high, count)
    others = {max(1, round(width / WIDTH_STEP)) * WIDTH_STEP for width in grid}
    return sorted({*given, *others})


def _candidate(by_width: dict[int, RunConfig], width: int) -> Candidate | None:
    """Returns the model of one width, or None where the rule makes none that can be trained."""
    nearest = min(by_width, key=lambda known: (abs(math.log(known / width)), known))
    base = by_width[nearest]
    try:
        model = scale_model(base.model, width) if width != nearest else base.model
        run = dataclasses.replace(base, model=model)  # asks whether the mesh can split it
    except ConfigError:
        return None
    return Candidate(model, base, run_training_flops(run), model_columns(run), is_edge=False)


def columns_at(candidates: Sequence[Candidate], budget: float) -> dict[str, np.ndarray]:
    """Returns the columns of all candidates, each with the tokens that the budget pays for."""
    columns = {
        name: np.array([candidate.columns[name] for candidate in candidates], float)
        for name in candidates[0].columns
    }
    flops_P = np.array([candidate.flops_per_token for candidate in candidates])
    return columns | {"tokens": budget / flops_P, "flops": np.full_like(flops_P, budget)}


def smooth_families(candidates: Sequence[Candidate]) -> list[Family]:
    """Returns the candidates' families: models with the same experts, as if of any size.

    Widths, depths and heads are whole numbers, so the best candidates over budgets make a
    staircase. A family has no steps: what a model costs and has besides its size is a cubic
    polynomial in that, in logarithms, as near as possible to the candidates.
    """
    groups: dict[tuple, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(_experts_key(candidate.model), []).append(candidate)
    return [_smooth_family(group) for group in groups.values()]


def _smooth_family(group: Sequence[Candidate]) -> Family:
    """Returns the family of candidates with the same experts."""
    table = {name: np.array([c.columns[name] for c in group], float) for name in group[0].columns}
    active, log_size = table["active_parameters"], np.log10(table["active_parameters"])
    middle, degree = float(np.mean(log_size)), min(3, len(group) - 1)
    fitted = lambda values: np.polyfit(log_size - middle, np.log(values), degree)
    body = fitted(active - table["embedding_parameters"])
    parameters_per_active = fitted(table["parameters"] / active)
    cost = fitted(np.array([candidate.flops_per_token for candidate in group]))
    # What is left depends on the experts alone, but for the rounding of their widths.
    shared = ("experts", "experts_per_token", "granularity", "sparsity")

    def columns(log_size: np.ndarray) -> Columns:
        size = 10.0**log_size
        value = lambda powers: np.exp(np.polyval(powers, log_size - middle))
        columns = {name: np.full_like(size, np.median(table[name])) for name in shared}
        columns |= {"active_parameters": size, "parameters": size * value(parameters_per_active)}
        columns |= {"embedding_parameters": np.maximum(size - value(body), 0)}
        return columns | {"flops_per_token": value(cost)}

    return Family((float(log_size.min()), float(log_size.max())), columns)
