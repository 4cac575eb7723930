"""What a fit found, in numbers and sentences, and how they are printed and written as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.fit.axes import count_text, power_text
from moe.scaling.experiments.optimum import Optimum
from moe.scaling.laws import Fit
from moe.scaling.laws.hyperparameters import StepLaw
from moe.scaling.laws.isoflop import IsoFlop

SAME = 1e-4  # two searches whose objectives differ by less than this share found the same optimum


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """One coefficient of a law, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Says how well the law, fitted to smaller budgets, predicted the runs of the largest one."""

    budget: float
    runs: list[str]
    measured: list[float]
    predicted: list[float]
    repeated: list[float]  # what the next smaller budget reached


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that one call of launch.fit found out."""

    law: str
    formula: str
    source: str
    table: str  # its path
    table_sha256: str
    loss_unit: str  # of the table's column; all losses here are nats
    num_runs: int  # that were fitted
    num_rows: int  # of the table, after --where
    coefficients: list[Coefficient]
    not_identifiable: list[str]  # why the runs do not determine the coefficients, if they do not
    facts: list[str]  # sentences on how the fit went
    held_out: HeldOut | None
    warnings: list[str]
    left_out: list[tuple[str, str]]  # names of runs, and why they were not fitted
    optima: list[Optimum]
    notes: list[str]  # sentences about the optima


def coefficients_of(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> list[Coefficient]:
    """Returns a fit's coefficients with their intervals."""
    return [Coefficient(name, value, *intervals[name]) for name, value in values.items()]


def facts_of(fit: Fit) -> list[str]:
    """Returns sentences that say how a fit went."""
    objective = fit.law.objective
    space = "log losses" if objective.space == "log" else "losses"
    least = "least squares" if math.isinf(objective.delta) else f"Huber, δ = {objective.delta:g}"
    spread = 100 * float(np.sqrt(np.mean(np.square(fit.runs.loss / fit.predicted - 1))))
    found = [
        f"The sum over runs of the residuals of {space} is minimised ({least}); it is "
        f"{fit.objective:.6g}.",
        f"The law is off by {spread:.2g} % (root mean square over the fitted runs).",
        f"{fit.starts_at_optimum:.0%} of the starts ended at the optimum.",
        f"The condition number of the derivatives is {fit.condition_number:.3g}.",
    ]
    if fit.projection_gap is not None:
        found.append(
            "Variable projection, another way to search, ends "
            + (
                "at the same optimum."
                if abs(fit.projection_gap) < SAME
                else f"{fit.projection_gap:+.2%} of the objective away from it."
            )
        )
    return found


def isoflop_facts(found: IsoFlop) -> list[str]:
    """Returns sentences that say how approach 2 went."""
    good = [curve for curve in found.curves if not curve.problem]
    facts = [
        f"{len(good)} of {len(found.curves)} budgets have a minimum within their sizes.",
        "A parabola only approximates a curve of losses, which shifts its minimum (arXiv "
        "2603.22339): compare the exponent with that of a parametric law.",
    ]
    if found.held_out is not None:
        measured, predicted, repeated = map(count_text, found.held_out)
        facts.append(
            f"The best size for the largest budget is {measured}. The smaller budgets predict "
            f"{predicted}, and the next smaller one has {repeated}."
        )
    return facts


def step_law_facts(found: StepLaw) -> list[str]:
    """Returns sentences that say how the fit of learning rates went."""
    facts = [
        f"{len(found.grids)} grids of learning rates, each of one size and number of tokens.",
        f"The condition number of sizes and tokens is {found.condition_number:.3g}.",
    ]
    if found.held_out is not None:
        measured, predicted, repeated = found.held_out
        facts.append(
            f"The best learning rate of the largest grid is {measured:.3g}. The other grids "
            f"predict {predicted:.3g}, and the next smaller one has {repeated:.3g}."
        )
    return facts


def held_out_of(fit: Fit) -> HeldOut | None:
    """Returns what the fit without the largest budget predicted, if there was one."""
    held = fit.held_out
    if held is None:
        return None
    columns = (held.measured, held.predicted, held.repeated)
    lists = [column.astype(float).tolist() for column in columns]
    return HeldOut(float(np.median(held.flops)), held.run.tolist(), *lists)


# The columns of the table of optima, in order: the key of an Optimum, the heading, and the form.
OPTIMUM_COLUMNS = (
    ("parameters", "parameters", "count"),
    ("active_parameters", "active", "count"),
    ("tokens", "tokens", "count"),
    ("experts", "experts", "number"),
    ("experts_per_token", "per token", "number"),
    ("granularity", "granularity", "number"),
    ("sparsity", "sparsity", "share"),
    ("loss", "loss", "loss"),
)


def value_text(value: float, form: str) -> str:
    """Returns a value as a table shows it: a count such as 1.5M, a loss, a share, or a number."""
    if form == "count":
        return count_text(value)
    return f"{value:.4f}" if form == "loss" else f"{value:.4g}"


def interval_text(low: float, high: float, form: str = "number") -> str:
    """Returns an interval as a table shows it. An end that is NaN says that nothing shows it."""
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    return f"{value_text(low, form)} to {value_text(high, form)}"


def optimum_table(optima: Sequence[Optimum]) -> tuple[list[str], list[list[str]]]:
    """Returns the heading and the rows of the table of the best models.

    Columns that no model has, and those that are 1 in all of them, are left out.
    """
    shown = [column for column in OPTIMUM_COLUMNS if any(column[0] in best.best for best in optima)]
    if all(_is_always_1(best, "experts") for best in optima):
        sparse = ("active_parameters", "experts", "experts_per_token", "granularity", "sparsity")
        shown = [column for column in shown if column[0] not in sparse]
    for name in ("experts_per_token", "granularity"):
        if all(_is_always_1(best, name) for best in optima):
            shown = [column for column in shown if column[0] != name]
    head = ["budget, FLOP"]
    for _, heading, _ in shown:
        head += [heading, "95 % interval"]
    rows = []
    for best in optima:
        row = [power_text(best.budget, 3)]
        for name, _, form in shown:
            row.append(value_text(best.best[name], form))
            row.append(interval_text(*best.intervals[name], form))
        rows.append(row)
    return head, rows


def _is_always_1(optimum: Optimum, name: str) -> bool:
    """Returns whether a column is 1 in the best model of every sample, or is not there."""
    return optimum.best.get(name, 1.0) == 1 and optimum.intervals.get(name, (1, 1)) == (1, 1)


def errors(held_out: HeldOut) -> tuple[list[float], list[float]]:
    """Returns the relative errors of the law and of repeating the smaller budget's loss."""
    relative = lambda values: [
        value / measured - 1 for value, measured in zip(values, held_out.measured, strict=True)
    ]
    return relative(held_out.predicted), relative(held_out.repeated)


def held_out_text(held_out: HeldOut) -> str:
    """Returns one sentence on how well the largest budget was predicted."""
    law, repeated = ([abs(error) for error in found] for found in errors(held_out))
    mean = lambda values: 100 * math.fsum(values) / len(values)
    count = len(held_out.runs)
    whose = "its one run" if count == 1 else f"its {count} runs"
    text = (
        f"Left out, the largest budget ({power_text(held_out.budget, 3)} FLOP) is predicted from "
        f"the others with a mean error of {mean(law):.2g} % over {whose}, and of "
        f"{100 * max(law):.2g} % at most."
    )
    if all(map(math.isfinite, repeated)):
        text += (
            f" Repeating the loss of the next smaller budget is wrong by {mean(repeated):.2g} %."
        )
    return text


def as_text(results: Results) -> str:
    """Returns what the command prints."""
    parts = [_fit_text(results)]
    for heading, lines in (
        ("How the fit went", _facts(results)),
        ("The runs do not determine the coefficients", results.not_identifiable),
        ("Warnings", results.warnings or ["None."]),
        ("Left out", left_out_lines(results.left_out)),
    ):
        if lines:
            parts.append("\n".join([heading, *(f"  - {line}" for line in lines)]))
    if results.optima:
        head, rows = optimum_table(results.optima)
        lines = [f"  - {note}" for note in results.notes]
        parts.append("\n".join(["Best models", *align([head, *rows]), *lines]))
    return "\n\n".join(parts)


def _fit_text(results: Results) -> str:
    head = ("coefficient", "value", "95 % interval")
    rows = [
        (found.name, f"{found.value:.4g}", interval_text(found.low, found.high))
        for found in results.coefficients
    ]
    return "\n".join(
        [
            f"{results.law}: {results.formula}",
            f"{results.source}",
            f"Fitted to {results.num_runs} of the {results.num_rows} rows that were read from "
            f"{results.table}; losses in nats"
            f"{'' if results.loss_unit == 'nats' else ', from ' + results.loss_unit}.",
            "",
            *align([head, *rows]),
        ]
    )


def _facts(results: Results) -> list[str]:
    return results.facts + ([held_out_text(results.held_out)] if results.held_out else [])


def left_out_lines(left_out: Sequence[tuple[str, str]], most: int = 8) -> list[str]:
    """Returns a line for each reason, with the names of the runs, of which `most` are listed."""
    by_reason: dict[str, list[str]] = {}
    for run, reason in left_out:
        by_reason.setdefault(reason, []).append(run)
    lines = []
    for reason, runs in by_reason.items():
        more = f" and {len(runs) - most} more" if len(runs) > most else ""
        lines.append(f"{', '.join(runs[:most])}{more}: {reason}")
    return lines


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows as aligned lines, with a rule under the first one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def as_json(results: Results) -> str:
    """Returns all results as JSON. A number that is not finite is null."""
    return json.dumps(_plain(dataclasses.asdict(results)), indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
