"""Says what a reader should know before believing a fit.

Coefficients are called identifiable if the data determine them: not the optimiser's start, the
choice of Huber's delta or which runs happened to be drawn. Each test below compares a fit with
itself, so none needs to know how noisy losses are.
"""

from collections.abc import Iterator

import numpy as np

from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.formulas import exponent, exponent_name, read_inputs
from moe.scaling.laws.refits import exactly_determined_share
from moe.scaling.laws.result import INTERVAL, Fit

# An exponent that is uncertain by this factor does not say whether ten times the size saves as much
# as a hundred times.
_FACTOR = 2.0
# Beyond it float64 itself no longer determines the coefficients to a few digits.
SINGULAR = 1e8
_ILL_CONDITIONED = 1e4
# Up to 4 epochs, repeated text is about as good as new text (Muennighoff et al. 2023,
# arXiv 2305.16264).
EPOCHS = 4
_ZERO = 1e-3  # of the lowest loss: less is no floor
_SPAN = 10  # A law extrapolates a power of size or data, so it must have seen one decade of it.


def why_not_identifiable(fit: Fit) -> list[str]:
    """Returns the reasons, if any, for which the data do not determine the coefficients."""
    return [
        *too_few(len(np.unique(fit.runs.run)), "runs", len(fit.law.coefficients)),
        *_collinear(fit),
        *_without_floor(fit),
        *_wide(fit),
        *_depends_on_delta(fit),
        *_without_skill(fit),
    ]


def too_few(count: int, what: str, num_coefficients: int) -> Iterator[str]:
    """Yields a reason if over 5 % of resamples have no residual, more than an interval ignores."""
    share = exactly_determined_share(count, num_coefficients)
    if share > 0.05:
        yield (
            f"{count} {what} are too few to show how uncertain {num_coefficients} coefficients "
            f"are: {share:.0%} of the resampled tables are fitted exactly: add {what}"
        )


def _collinear(fit: Fit) -> Iterator[str]:
    """Yields a reason if a combination of coefficients has no effect on the fitted losses."""
    if fit.condition_number >= SINGULAR:
        yield (
            f"some combination of coefficients does not change the losses (condition number "
            f"{fit.condition_number:.1g}), for example because tokens are always the same multiple "
            "of parameters: vary what the law depends on independently"
        )


def _without_floor(fit: Fit) -> Iterator[str]:
    """Yields a reason if the fit has lost the term that the loss cannot fall below."""
    name = fit.law.irreducible
    if name is not None and fit.coefficients[name] < _ZERO * fit.runs.loss.min():
        yield (
            f"{name} is at its bound, 0: the data show no floor of the loss, so the other terms "
            "stand for it as well: add larger budgets"
        )


def _wide(fit: Fit) -> Iterator[str]:
    """Yields a reason for each exponent that resampling the runs moves by a factor of 2."""
    for name, (low, high) in _exponent_intervals(fit).items():
        shown = exponent_name(fit.law, name)
        yield from wide_exponent(
            shown, low, high, "add sizes and budgets", "add runs, sizes and budgets"
        )


def wide_exponent(
    name: str, low: float, high: float, fix_of_zero: str, fix_of_wide: str
) -> Iterator[str]:
    """Yields a reason if an exponent's interval holds 0, or spans more than a factor of 2."""
    if low <= 0 <= high:
        yield f"{name} may be 0: its interval is {_interval(low, high)}: {fix_of_zero}"
    elif max(low / high, high / low) > _FACTOR:
        yield (
            f"{name} is known only within a factor of {max(low / high, high / low):.2g}: its "
            f"interval is {_interval(low, high)}: {fix_of_wide}"
        )


def _exponent_intervals(fit: Fit) -> dict[str, tuple[float, float]]:
    """Returns the intervals of the exponents, each in the middle of the data."""
    samples = dict(zip(fit.law.coefficients, fit.samples.T, strict=True))
    inputs = read_inputs(fit.law, fit.runs)
    intervals = {}
    for name in sorted(fit.law.exponents):
        low, high = np.quantile(exponent(fit.law, name, samples, inputs), INTERVAL)
        intervals[name] = (float(low), float(high))
    return intervals


def _depends_on_delta(fit: Fit) -> Iterator[str]:
    """Yields a reason for each exponent that another delta of Huber's function moves too far.

    If a law describes the runs up to noise, all deltas estimate the same coefficients, and their
    differences are smaller than the bootstrap's intervals.
    """
    inputs = read_inputs(fit.law, fit.runs)
    for name, (low, high) in _exponent_intervals(fit).items():
        values = {
            delta: float(exponent(fit.law, name, coefficients, inputs))
            for delta, coefficients in fit.drift.items()
        }
        outside = {delta: x for delta, x in values.items() if not low <= x <= high}
        if outside:
            delta = max(outside, key=lambda delta: max(low - outside[delta], outside[delta] - high))
            yield (
                f"{exponent_name(fit.law, name)} depends on how residuals are weighted: "
                f"its interval is {_interval(low, high)}, but it is {outside[delta]:.3g} with "
                f"delta={delta:g}: the law does not describe all runs, so look at the residuals"
            )


def _without_skill(fit: Fit) -> Iterator[str]:
    """Yields a reason if the law predicts the largest budget no better than no law."""
    held = fit.held_out
    if held is not None and held.mean_error >= held.mean_repeated_error:
        yield (
            f"fitted without the largest budget, the law predicts its losses to "
            f"{held.mean_error:.2%}, and repeating the next smaller budget's to "
            f"{held.mean_repeated_error:.2%}: it does not extrapolate"
        )


def find_warnings(fit: Fit) -> list[str]:
    """Returns sentences that each say what is doubtful about a fit, and what helps."""
    return [
        *_optimiser_warnings(fit),
        *_floor_warnings(fit),
        *_saturation_warnings(fit),
        *_data_warnings(fit),
        *_held_out_warnings(fit),
        *runs_left_out(fit.left_out),
    ]


def _optimiser_warnings(fit: Fit) -> Iterator[str]:
    """Yields warnings about the search for the optimum."""
    if fit.starts_at_optimum < 0.5:
        yield (
            f"Only {fit.starts_at_optimum:.0%} of the starts end at the optimum, so there may be a "
            "better one: use more starts."
        )
    if fit.projection_gap is not None and abs(fit.projection_gap) > 1e-4:
        which = "better" if fit.projection_gap < 0 else "worse"
        yield (
            f"Variable projection ends {abs(fit.projection_gap):.2%} {which} than L-BFGS: the "
            "optimum is hard to find, so use more starts."
        )
    if _ILL_CONDITIONED <= fit.condition_number < SINGULAR:
        yield (
            f"The condition number is {fit.condition_number:.1g}: some coefficients trade off "
            "against each other, so do not read them one by one."
        )
    names = fit.runs.run
    if len(np.unique(names)) < 3 * len(fit.law.coefficients):
        yield (
            f"There are {len(np.unique(names))} runs for {len(fit.law.coefficients)} coefficients: "
            "the bootstrap's intervals are too narrow with fewer than three runs for each."
        )


def _floor_warnings(fit: Fit) -> Iterator[str]:
    """Yields a warning if the irreducible loss is at one of its bounds."""
    name = fit.law.irreducible
    if name is None:
        return
    value, lowest = fit.coefficients[name], float(fit.runs.loss.min())
    if fit.intervals[name][0] < _ZERO * lowest <= value:
        yield f"{name} may be 0: its interval reaches the bound, so larger budgets are needed."
    elif value > 0.98 * lowest:
        yield (
            f"{name} is at its bound, the lowest loss of the table ({lowest:.4g}): the law says "
            "that nothing is left to gain."
        )


def _saturation_warnings(fit: Fit) -> Iterator[str]:
    """Yields a warning if the runs do not show beyond how many experts more bring nothing."""
    most = float(fit.runs.experts.max())
    if "E_max" in fit.intervals and fit.intervals["E_max"][1] > 100 * most:
        yield (
            f"E_max may be beyond 100 times the experts of any run ({most:.0f}): no saturation is "
            "seen, so do not trust what the law says of more experts."
        )


def _data_warnings(fit: Fit) -> Iterator[str]:
    """Yields warnings about repeated text, narrow ranges and large residuals."""
    yield from repeated_text(fit.runs)
    for name in ("active_parameters", "tokens"):
        if name in fit.law.columns:
            values = getattr(fit.runs, name)
            span = values.max() / values.min()
            if span < _SPAN:
                yield (
                    f"{name.replace('_', ' ').capitalize()} span a factor of {span:.3g}, less than "
                    "one decade: extrapolate by no more than that."
                )
    tokens = fit.runs.tokens
    if not {"tokens", "flops"} & set(fit.law.columns) and np.ptp(tokens) > 0.1 * tokens.max():
        yield (
            f"Tokens differ by a factor of {tokens.max() / tokens.min():.1f}, and this law knows "
            "no tokens: fit the runs of one number of tokens, or another law."
        )
    typical = np.median(np.abs(fit.residuals))
    if typical > 0.01:
        yield (
            f"The law misses the typical run by {typical:.1%}, while seeds differ by a few tenths "
            "of a percent: it does not describe these runs."
        )


def _held_out_warnings(fit: Fit) -> Iterator[str]:
    """Yields a warning if the largest budget could not be held out, or is predicted badly."""
    if fit.held_out is None:
        yield "The largest budget cannot be held out, since too few runs are left without it."
        return
    error, repeated = fit.held_out.mean_error, fit.held_out.mean_repeated_error
    if repeated / 2 < error < repeated:
        yield (
            f"The largest budget is predicted to {error:.2%}, less than twice as well as by "
            f"repeating the next smaller one ({repeated:.2%})."
        )


def repeated_text(runs: Runs) -> Iterator[str]:
    """Yields a warning if runs saw their text more often than repeating is harmless."""
    repeats = runs.repeats
    repeated = repeats > EPOCHS
    if repeated.any():
        yield (
            f"{repeated.sum()} of {len(repeats)} runs saw their text more than {EPOCHS} times, up "
            f"to {repeats[repeated].max():.1f} times: the law counts repeated tokens as new ones."
        )


def runs_left_out(left_out: list[tuple[str, str]]) -> Iterator[str]:
    """Yields a warning that lists the runs which were left out, if there are any."""
    if left_out:
        listed = "; ".join(f"{run}: {reason}" for run, reason in left_out[:5])
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        number = "1 run was" if len(left_out) == 1 else f"{len(left_out)} runs were"
        yield f"{number} left out ({listed}{more})."


def _interval(low: float, high: float) -> str:
    return f"[{low:.3g}, {high:.3g}]"
