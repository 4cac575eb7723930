"""Finds the best size for each budget from parabolas, and its power law in the budget.

This is approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe.config.checks import ConfigError
from moe.scaling.experiments.run_checks import check_runs
from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.refits import group_values
from moe.scaling.laws.result import named_intervals
from moe.scaling.laws.warnings import repeated_text, runs_left_out

COLUMNS = ("active_parameters", "tokens", "flops")
COEFFICIENTS = ("N_factor", "N_exponent", "D_factor", "D_exponent")
# A loss this far above the lowest one of its budget lies where the curve is no parabola.
_NEAR = 0.05
_FEWEST_SIZES = 3


@dataclasses.dataclass(frozen=True)
class Curve:
    """Holds a budget's runs, [N], and the parabola through those near the minimum.

    loss = parabola[0] + parabola[1] x + parabola[2] x², where x = ln(active parameters).
    """

    flops: float
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    used: np.ndarray
    parabola: np.ndarray
    best_parameters: float
    best_tokens: float
    best_loss: float
    problem: str  # why the minimum does not count, and what helps, or ""


class NoMinima(ConfigError):
    """Refuses runs of which fewer than two budgets have a minimum. The curves show why."""

    def __init__(self, message: str, curves: list[Curve]) -> None:
        super().__init__(message)
        self.curves = curves


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Holds what approach 2 found: N* = N_factor C^N_exponent, and D* likewise.

    `samples` has the coefficients of bootstraps, [bootstraps, 4]. `held_out` has, for the largest
    budget, its size N*, that which the power law of the others predicts, and that of the next
    smaller budget; it is None if there are too few budgets.
    """

    curves: list[Curve]
    runs: Runs
    coefficients: dict[str, float]
    samples: np.ndarray
    held_out: tuple[float, float, float] | None
    left_out: list[tuple[str, str]]
    not_identifiable: list[str]
    warnings: list[str]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return named_intervals(COEFFICIENTS, self.samples)

    @property
    def is_identifiable(self) -> bool:
        return not self.not_identifiable


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factor and the exponent of y = factor · x^exponent, by least squares of logs.

    `y` may have more dimensions in front. NaNs in it are left out.
    """
    log_x, log_y = np.log(x), np.log(y)
    known = np.isfinite(log_y)
    count = np.sum(known, -1)
    centre = np.sum(np.where(known, log_x, 0), -1) / count
    middle = np.sum(np.where(known, log_y, 0), -1) / count
    offset = np.where(known, log_x - centre[..., None], 0)
    exponent = np.sum(offset * np.where(known, log_y, 0), -1) / np.sum(offset**2, -1)
    return np.exp(middle - exponent * centre), exponent


def fit_isoflop(runs: Runs, *, seed: int = 0, num_bootstraps: int = 1000) -> IsoFlop:
    """Returns the best size and tokens for each budget, and their power laws in the budget."""
    runs, left_out = check_runs(runs, COLUMNS, 2)
    budget_N = group_values(runs.flops)
    groups = [runs.take(budget_N == budget) for budget in range(budget_N.max() + 1)]
    curves = [
        _fit_curve(group) for group in groups if len(np.unique(group.parameters)) >= _FEWEST_SIZES
    ]
    good = [curve for curve in curves if not curve.problem]
    if len(good) < 2:
        why = [f"At {c.flops:.3g} FLOP {c.problem}." for c in curves if c.problem]
        message = (
            f"flops: {len(good)} of {len(groups)} budgets have a minimum, and a power law needs "
            f"two: add budgets of at least {_FEWEST_SIZES} sizes around the best one."
        )
        raise NoMinima(" ".join([message, *why]).removesuffix("."), curves)
    flops = np.array([curve.flops for curve in good])
    sizes = np.array([curve.best_parameters for curve in good])
    tokens = np.array([curve.best_tokens for curve in good])
    samples = _bootstrap(good, np.random.default_rng(seed), num_bootstraps)
    held_out = None
    if len(good) >= 3:
        factor, exponent = power_law(flops[:-1], sizes[:-1])
        held_out = (float(sizes[-1]), float(factor * flops[-1] ** exponent), float(sizes[-2]))
    values = (*power_law(flops, sizes), *power_law(flops, tokens))
    result = IsoFlop(
        curves=curves,
        runs=runs,
        coefficients=dict(zip(COEFFICIENTS, map(float, values), strict=True)),
        samples=samples,
        held_out=held_out,
        left_out=left_out,
        not_identifiable=[],
        warnings=[],
    )
    return dataclasses.replace(
        result,
        not_identifiable=list(_why_not_identifiable(result)),
        warnings=list(_find_warnings(result, groups)),
    )


def _fit_curve(group: Runs) -> Curve:
    """Returns the parabola of one budget, and why its minimum does not count, if it does not."""
    x, loss = np.log(group.active_parameters), group.loss
    sizes, size_N = np.unique(x, return_inverse=True)
    lowest = np.array([loss[size_N == i].min() for i in range(len(sizes))])
    near = lowest <= loss.min() * (1 + _NEAR)
    # At least 5 sizes, or all that there are: those with the lowest losses.
    near[np.argsort(lowest, kind="stable")[:5]] = True
    used = near[size_N]
    parabola = _parabolas(x[used], loss[used])
    best = -parabola[1] / (2 * parabola[2]) if parabola[2] > 0 else float("nan")
    tokens = np.polyval(np.polyfit(x - x.mean(), np.log(group.tokens), 1), best - x.mean())
    return Curve(
        flops=float(np.exp(np.mean(np.log(group.flops)))),
        parameters=group.active_parameters,
        tokens=group.tokens,
        loss=loss,
        used=used,
        parabola=parabola,
        best_parameters=float(np.exp(best)),
        best_tokens=float(np.exp(tokens)),
        best_loss=float(parabola[0] + parabola[1] * best + parabola[2] * best**2),
        problem=_find_problem(x, loss, best, highest=loss[used].max()),
    )


def _find_problem(x: np.ndarray, loss: np.ndarray, best: float, highest: float) -> str:
    """Returns why a parabola's minimum, at log size `best`, does not count, and what helps.

    Returns "" if it counts. `highest` is the highest loss of those that shape the parabola. If the
    parabola has no minimum, `best` is NaN.
    """
    lowest_x, lowest = x[np.argmin(loss)], loss.min()
    size = f"{np.exp(lowest_x):,.0f} parameters"
    if lowest_x == x.min():
        return f"the lowest loss is that of the smallest model, of {size}: add smaller ones"
    if lowest_x == x.max():
        return f"the lowest loss is that of the largest model, of {size}: add larger ones"
    if x.min() < best < x.max():
        return ""
    return (
        f"the lowest loss is within the sizes, at {size}, but the parabola has no minimum there, "
        f"since the losses that shape it reach {highest / lowest - 1:.1%} above the lowest: add "
        "sizes nearer to that one"
    )


def _parabolas(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the coefficients, [..., 3], of the least-squares parabolas of y, [..., N], over x."""
    centre = x.mean()
    curve = y @ np.linalg.pinv(np.vander(x - centre, 3, increasing=True)).T
    low, linear, square = np.moveaxis(curve, -1, 0)
    shifted = (low - linear * centre + square * centre**2, linear - 2 * square * centre, square)
    return np.stack(shifted, -1)


def _bootstrap(curves: list[Curve], generator: np.random.Generator, count: int) -> np.ndarray:
    """Returns the coefficients for resampled residuals, [count, 4].

    With the usual five sizes a budget, redrawn runs would often leave no three different ones. So
    the runs' residuals are redrawn from those of all budgets. A minimum outside of the sizes does
    not count.
    """
    fits = [_fit_residuals(curve) for curve in curves]
    pool = np.concatenate([residuals for *_, residuals in fits])
    if not len(pool):
        return np.full((1, 4), np.nan)
    pool = pool - pool.mean()
    sizes, tokens = [], []
    for curve, (x, fitted, _) in zip(curves, fits, strict=True):
        loss = fitted * (1 + generator.choice(pool, (count, len(x))))
        parabola = _parabolas(x, loss)
        with np.errstate(divide="ignore", invalid="ignore"):
            best = -parabola[:, 1] / (2 * parabola[:, 2])
        inside = (parabola[:, 2] > 0) & (np.min(x) < best) & (best < np.max(x))
        line = np.polyfit(x - x.mean(), np.log(curve.tokens[curve.used]), 1)
        sizes.append(np.exp(np.where(inside, best, np.nan)))
        tokens.append(np.exp(np.polyval(line, np.where(inside, best, np.nan) - x.mean())))
    flops = np.array([curve.flops for curve in curves])
    size, token = np.stack(sizes, -1), np.stack(tokens, -1)
    enough = np.sum(np.isfinite(size), -1) >= 2
    if not enough.any():
        return np.full((1, 4), np.nan)
    pairs = (*power_law(flops, size[enough]), *power_law(flops, token[enough]))
    return np.stack(pairs, -1)


def _fit_residuals(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log sizes and fitted losses of the runs that shape a parabola, and their residuals.

    A residual is relative, and divided by sqrt(1 - leverage), the share of the noise that is left
    in it. Where nearly none is left, as with three sizes, there is no residual.
    """
    x, loss = np.log(curve.parameters[curve.used]), curve.loss[curve.used]
    design = np.vander(x - x.mean(), 3, increasing=True)
    hat = design @ np.linalg.pinv(design)
    fitted, noise_share = hat @ loss, 1 - np.diag(hat)
    shows_noise = noise_share > 0.05
    residuals = (loss / fitted - 1)[shows_noise] / np.sqrt(noise_share[shows_noise])
    return x, fitted, residuals


def _why_not_identifiable(result: IsoFlop) -> Iterator[str]:
    """Yields the reasons for which the power law is not determined, if there are any."""
    good = [curve for curve in result.curves if not curve.problem]
    if len(good) < 3:
        yield f"only {len(good)} budgets have a minimum, so nothing tests the law: add budgets"
    low, high = result.intervals["N_exponent"]
    if np.isnan(low):
        yield "parabolas through three sizes leave no residual to tell the noise by: add sizes"
    elif not (low > 0 and high / low <= 2):
        yield (
            f"N_exponent is known only within [{low:.3g}, {high:.3g}], a factor of more than 2: "
            "add budgets, and sizes around each minimum"
        )
    if result.held_out is not None:
        measured, predicted, repeated = np.log(result.held_out)
        if abs(predicted - measured) >= abs(repeated - measured):
            yield (
                f"the smaller budgets predict {np.exp(predicted):.3g} parameters for the largest "
                f"one, whose best size is {np.exp(measured):.3g}, no better than repeating "
                f"{np.exp(repeated):.3g}: it does not extrapolate"
            )


def _find_warnings(result: IsoFlop, groups: list[Runs]) -> Iterator[str]:
    """Yields sentences that each say what is doubtful, and what helps."""
    for curve in result.curves:
        if curve.problem:
            yield f"The budget {curve.flops:.3g} FLOP is left out: {curve.problem}."
    few = len(groups) - len(result.curves)
    if few:
        number = "1 budget has" if few == 1 else f"{few} budgets have"
        yield f"{number} fewer than {_FEWEST_SIZES} sizes, which shows no minimum. Add sizes."
    width = max(
        np.ptp(np.log(curve.parameters[curve.used])) for curve in result.curves if not curve.problem
    )
    if width > np.log(16):
        yield (
            f"A parabola spans a factor of {np.exp(width):.0f} in size. Losses are no parabola in "
            "log size, which shifts its minimum (arXiv 2603.22339): compare with a parametric law."
        )
    if len(result.curves) < 4:
        yield f"There are only {len(result.curves)} budgets: a power law needs four or more."
    yield from repeated_text(result.runs)
    yield from runs_left_out(result.left_out)
