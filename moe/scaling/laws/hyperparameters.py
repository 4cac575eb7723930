"""Fits the best learning rate and batch as powers of size and tokens, the "step law".

The law and its objective are those of Li et al. 2025 (arXiv 2503.04715): least squares of logs over
the runs of each size and token count whose loss is near the lowest one.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe.config.checks import ConfigError
from moe.scaling.experiments.run_checks import check_values, leave_out
from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.refits import group_values
from moe.scaling.laws.result import named_intervals
from moe.scaling.laws.warnings import SINGULAR, runs_left_out, too_few, wide_exponent

_NEAR = 0.0025  # runs with a loss at most this far above the lowest one of their grid count
_RATE = ("learning_rate_factor", "learning_rate_N_exponent", "learning_rate_D_exponent")
_BATCH = ("batch_factor", "batch_D_exponent")
_FEWEST_RATES = 3


@dataclasses.dataclass(frozen=True)
class Grid:
    """Holds the runs of one size and token count, and which of them are near the lowest loss."""

    runs: Runs
    near: np.ndarray
    best: int  # the index of the run with the lowest loss
    at_edge: tuple[str, ...]  # the columns whose best value is the smallest or largest one tried


@dataclasses.dataclass(frozen=True)
class StepLaw:
    """Holds what the fit found.

    Learning rate = factor · N^exponent · D^exponent and batch = factor · D^exponent in tokens, with
    N active parameters without embeddings. Without different batches in a grid there are only the
    coefficients of the learning rate. `held_out` has the best learning rate of the largest grid,
    the one that the other grids predict, and that of the next smaller grid.
    """

    grids: list[Grid]
    coefficients: dict[str, float]
    samples: np.ndarray
    condition_number: float
    held_out: tuple[float, float, float] | None
    left_out: list[tuple[str, str]]
    not_identifiable: list[str]
    warnings: list[str]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return named_intervals(self.coefficients, self.samples)

    @property
    def is_identifiable(self) -> bool:
        return not self.not_identifiable


def fit_step_law(runs: Runs, *, seed: int = 0, num_bootstraps: int = 1000) -> StepLaw:
    """Returns the best learning rate and batch as powers of size and tokens."""
    runs, left_out = leave_out(runs)
    columns = ("active_parameters", "embedding_parameters", "tokens", "learning_rate")
    check_values(runs, columns)
    has_batch = _varies_batch(runs)
    if has_batch:
        check_values(runs, ("batch_tokens",))
    grids, without_grid = _read_grids(runs, has_batch)
    if len(grids) <= len(_RATE):
        raise ConfigError(
            f"learning_rate: {len(grids)} sizes and token counts have runs at {_FEWEST_RATES} "
            f"learning rates or more, too few for {len(_RATE)} coefficients: add grids, at least "
            f"{len(_RATE) + 1}"
        )
    numbers = np.arange(len(grids))
    drawn = np.random.default_rng(seed).integers(len(grids), size=(num_bootstraps, len(grids)))
    samples = np.stack([_fit_grids([grids[i] for i in row], has_batch) for row in drawn])
    coefficients = _fit_grids(grids, has_batch)
    sizes = np.array([_size(grid.runs)[0] * grid.runs.tokens[0] for grid in grids])
    order = numbers[np.argsort(sizes, kind="stable")]
    result = StepLaw(
        grids=grids,
        coefficients=dict(
            zip((*_RATE, *_BATCH) if has_batch else _RATE, map(float, coefficients), strict=True)
        ),
        samples=samples,
        condition_number=_condition_number(grids),
        held_out=_hold_out([grids[i] for i in order], has_batch),
        left_out=left_out + without_grid,
        not_identifiable=[],
        warnings=[],
    )
    return dataclasses.replace(
        result,
        not_identifiable=list(_why_not_identifiable(result)),
        warnings=list(_find_warnings(result)),
    )


def _size(runs: Runs) -> np.ndarray:
    return runs.active_parameters - runs.embedding_parameters


def _groups(runs: Runs) -> Iterator[Runs]:
    """Yields the runs of each size and token count. Token counts may differ by a rounded batch."""
    for size in np.unique(_size(runs)):
        equal = runs.take(_size(runs) == size)
        group_N = group_values(equal.tokens)
        for group in range(group_N.max() + 1):
            yield equal.take(group_N == group)


def _varies_batch(runs: Runs) -> bool:
    """Returns whether grids have different batches, more of them than the law has coefficients.

    Where each grid has one batch, a fit would only find the rule that chose the batches.
    """
    if not np.isfinite(runs.batch_tokens).all():
        return False
    varied = [group for group in _groups(runs) if np.ptp(group.batch_tokens) > 0]
    return len(varied) > len(_BATCH)


def _read_grids(runs: Runs, has_batch: bool) -> tuple[list[Grid], list[tuple[str, str]]]:
    """Returns the grids, and the names of the runs that are in none, with the reason."""
    grids, without_grid = [], []
    reason = f"its size and number of tokens have fewer than {_FEWEST_RATES} learning rates"
    for group in _groups(runs):
        grid = _read_grid(group, has_batch)
        if grid is None:
            without_grid += [(str(name), reason) for name in group.run]
        else:
            grids.append(grid)
    return grids, without_grid


def _read_grid(runs: Runs, has_batch: bool) -> Grid | None:
    """Returns the grid of runs of one size and token count, if it has enough learning rates."""
    if len(np.unique(runs.learning_rate)) < _FEWEST_RATES:
        return None
    best = int(np.argmin(runs.loss))
    at_edge = []
    for name in ("learning_rate", "batch_tokens")[: 1 + has_batch]:
        values = getattr(runs, name)
        if values[best] in (values.min(), values.max()):
            at_edge.append(name)
    return Grid(runs, runs.loss <= runs.loss[best] * (1 + _NEAR), best, tuple(at_edge))


def _design(grids: list[Grid]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns ln N, ln D, ln learning rate and ln batch of the runs near the lowest losses."""
    near = [grid.runs.take(grid.near) for grid in grids]
    size, tokens, rate, batch = (
        np.log(np.concatenate(columns))
        for columns in zip(
            *((_size(x), x.tokens, x.learning_rate, x.batch_tokens) for x in near), strict=True
        )
    )
    return size, tokens, rate, batch


def _fit_grids(grids: list[Grid], has_batch: bool) -> np.ndarray:
    """Returns the 3 or 5 coefficients, the smallest ones if the grids leave a choice."""
    size, tokens, rate, batch = _design(grids)
    ones = np.ones_like(size)
    factor, *exponents = np.linalg.lstsq(np.stack([ones, size, tokens], -1), rate, rcond=1e-10)[0]
    found = [np.exp(factor), *exponents]
    if has_batch:
        factor, exponent = np.linalg.lstsq(np.stack([ones, tokens], -1), batch, rcond=1e-10)[0]
        found += [np.exp(factor), exponent]
    return np.array(found)


def _condition_number(grids: list[Grid]) -> float:
    """Returns how nearly ln N and ln D are collinear: 1 if they vary independently."""
    size, tokens, _, _ = _design(grids)
    centred = np.stack([size - size.mean(), tokens - tokens.mean()], -1)
    length = np.linalg.norm(centred, axis=0)
    if np.any(length < 1e-9):
        return float("inf")
    singular = np.linalg.svd(centred / length, compute_uv=False)
    return float(singular[0] / max(singular[1], 1e-300))


def _hold_out(grids: list[Grid], has_batch: bool) -> tuple[float, float, float] | None:
    """Returns the best learning rate of the largest grid: measured, predicted and repeated."""
    *rest, largest = grids
    if len(rest) <= len(_RATE):
        return None
    factor, by_size, by_tokens = _fit_grids(rest, has_batch)[:3]
    size, tokens, rate, _ = (np.mean(column) for column in _design([largest]))
    repeated = np.mean(_design(rest[-1:])[2])
    predicted = np.log(factor) + by_size * size + by_tokens * tokens
    return float(np.exp(rate)), float(np.exp(predicted)), float(np.exp(repeated))


def _why_not_identifiable(result: StepLaw) -> Iterator[str]:
    """Yields the reasons for which the grids do not determine the law, if there are any."""
    yield from too_few(len(result.grids), "grids", len(_RATE))
    if result.condition_number >= SINGULAR:
        yield (
            "tokens are the same function of size in all grids, so that their exponents cannot be "
            "told apart: add grids of one size with other token counts, and of one token count"
        )
    for name, (low, high) in result.intervals.items():
        if name.endswith("exponent"):
            yield from wide_exponent(name, low, high, "add grids", "add grids")
    if result.held_out is not None:
        measured, predicted, repeated = np.log(result.held_out)
        if abs(predicted - measured) > abs(repeated - measured):
            yield (
                f"the other grids predict a learning rate of {np.exp(predicted):.3g} for the "
                f"largest one, whose best is {np.exp(measured):.3g}, and the next smaller one's is "
                f"{np.exp(repeated):.3g}: the law does not extrapolate"
            )


def _find_warnings(result: StepLaw) -> Iterator[str]:
    """Yields sentences that each say what is doubtful, and what helps."""
    for name in ("learning_rate", "batch_tokens"):
        edges = [grid for grid in result.grids if name in grid.at_edge]
        if edges:
            yield (
                f"The best {name} is the smallest or largest one tried in {len(edges)} of "
                f"{len(result.grids)} grids, so it is only a bound there: try values beyond it."
            )
    if len(_BATCH) + len(_RATE) != len(result.coefficients):
        yield (
            "The law of the batch is not fitted: too few grids have runs with different batches, "
            "or some have no value in batch_tokens."
        )
    yield from runs_left_out(result.left_out)
