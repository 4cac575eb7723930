"""Compares variants by the rows of their runs: means, paired differences, and Pareto fronts.

The differences are paired: each seed's run of one variant is compared with the run of the same
seed of another, which reads the same text in the same order. So what the seeds have in common
drops out of the difference.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.sweep_table import Row

LEVEL, POWER = 0.05, 0.8  # of the test for which the number of seeds is computed
# What a lower loss may cost, by the column of a run's row and its title.
COSTS = {
    "flops": "training FLOPs",
    "parameters": "parameters",
    "memory_bytes": "bytes of training state",
    "step_seconds": "time per step",
}
LEGEND = (
    "Loss: mean ± standard error over the seeds that finished. MaxVio (how far the fullest expert "
    "of the worst layer exceeds an even share) and dropped (the fraction of assignments that found "
    "no room): means over the last 10 logged steps. Differences are those of equal seeds, with "
    "their standard error, and p is that of a paired t-test. Seeds for half: how many seeds would "
    f"show half of the difference with p < {LEVEL} in {POWER:.0%} of all experiments, if it varied "
    "as much as here. A variant is on a Pareto front if none is as good at as low a cost."
)

Rows = Mapping[int, Row]  # the finished rows of one variant, by seed


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean over seeds and its standard error, s / sqrt(n).

    s is the standard deviation with the divisor n - 1. With one seed the error is unknown: None.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def summarize(rows: Rows, planned: Row) -> dict[str, Any]:
    """Returns what is known of one variant: counts, and means over its finished runs.

    A statistic is None if no run has it. `planned` is the row of a run before it is trained.
    """
    losses = {seed: row["loss"] for seed, row in rows.items()}
    mean, error = mean_and_error(list(losses.values())) if losses else (None, None)
    averages = {
        name: _mean([row[name] for row in rows.values()])
        for name in ("worst_max_vio", "dropped_fraction", "step_seconds")
    }
    counts = ("active_parameters", "parameters", "flops", "tokens", "batch_tokens", "memory_bytes")
    return {
        **{name: planned[name] for name in counts},
        "loss": {"mean": mean, "standard_error": error, "of_seeds": losses},
        **averages,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def paired_difference(first: Rows, second: Rows) -> dict[str, Any] | None:
    """Returns how much higher the second variant's loss is, or None if they share no seed.

    With two seeds or more it has the standard error and the p-value of a paired t-test (Student
    1908): the probability of such a mean or a larger one if the variants were equally good.
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    differences = [second[seed]["loss"] - first[seed]["loss"] for seed in seeds]
    mean, error = mean_and_error(differences)
    result = {"mean": mean, "standard_error": error, "num_seeds": len(seeds)}
    p_value, needed = None, None
    if error:
        from scipy import stats  # takes a second, which bad input need not wait for

        p_value = float(2 * stats.t.sf(abs(mean / error), len(seeds) - 1))
        needed = seeds_needed(abs(mean) / 2, error * math.sqrt(len(seeds)))
    return result | {"p_value": p_value, "seeds_for_half": needed}


def seeds_needed(difference: float, deviation: float, at_most: int = 10_000) -> int | None:
    """Returns how many seeds show a mean difference by a paired t-test of LEVEL with POWER.

    `deviation` is the standard deviation of the differences. The power is that of the noncentral t
    distribution. The result is None beyond `at_most`.
    """
    from scipy import stats

    def power(seeds: int) -> float:
        limit = stats.t.isf(LEVEL / 2, seeds - 1)
        # SciPy's sums do not converge where the power is 1 to all digits.
        shift = min(difference / deviation * math.sqrt(seeds), 30.0)
        return float(stats.nct.sf(limit, seeds - 1, shift))

    if not difference or power(at_most) < POWER:
        return None
    low, high = 1, at_most  # `low` seeds are too few, and `high` are enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def pareto_front(results: Mapping[str, dict[str, Any]], cost: str) -> list[str]:
    """Returns the variants of which no other has a loss and a cost as low, and one of them lower.

    They come in the order of their cost. Variants whose loss or cost is not known are left out.
    """
    known = {
        name: (values[cost], values["loss"]["mean"])
        for name, values in results.items()
        if values[cost] is not None and values["loss"]["mean"] is not None
    }
    front = [
        name
        for name, (paid, loss) in known.items()
        if not any(
            other[0] <= paid and other[1] <= loss and other != (paid, loss)
            for other in known.values()
        )
    ]
    return sorted(front, key=lambda name: known[name])


def comparison(results: Mapping[str, dict[str, Any]], rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Returns everything that is known of the variants, as comparison.json has it."""
    first, *others = results
    return {
        "variants": dict(results),
        "baseline": first,
        "differences": {name: paired_difference(rows[first], rows[name]) for name in others},
        "pareto_fronts": {cost: pareto_front(results, cost) for cost in COSTS},
    }


def markdown(compared: Mapping[str, Any]) -> str:
    """Returns the tables of a comparison, with a dash where nothing is known yet."""
    parts = [
        _table(_variant_rows(compared["variants"])),
        _table(_difference_rows(compared["differences"], compared["baseline"])),
        _table(_front_rows(compared["pareto_fronts"])),
    ]
    return "\n\n".join(parts)


def _variant_rows(results: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    head = ("variant", "active parameters", "total parameters", "training FLOPs per token")
    head += ("validation loss (nats per token)", "seeds", "worst MaxVio", "dropped", "tokens/s")
    rows: list[tuple[str, ...]] = [head]
    for name, values in results.items():
        loss, seconds = values["loss"], values["step_seconds"]
        error = loss["standard_error"]
        rows.append(
            (
                name,
                f"{values['active_parameters']:,}",
                f"{values['parameters']:,}",
                f"{values['flops'] / values['tokens']:,.0f}",
                _text(loss["mean"], ".4f") + ("" if error is None else f" ± {error:.4f}"),
                str(len(loss["of_seeds"])),
                _text(values["worst_max_vio"], ".2f"),
                _text(values["dropped_fraction"], ".1%"),
                _text(seconds and values["batch_tokens"] / seconds, ",.0f"),
            )
        )
    return rows


def _difference_rows(
    differences: Mapping[str, dict[str, Any] | None], baseline: str
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (f"loss above {baseline}'s", "difference", "seeds", "p", "seeds for half")
    ]
    for name, values in differences.items():
        if values is None:
            rows.append((name, "–", "0", "–", "–"))
            continue
        error = values["standard_error"]
        rows.append(
            (
                name,
                f"{values['mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}"),
                str(values["num_seeds"]),
                _text(values["p_value"], ".2g"),
                _text(values["seeds_for_half"], "d"),
            )
        )
    return rows


def _front_rows(fronts: Mapping[str, list[str]]) -> list[tuple[str, ...]]:
    rows = [("Pareto front of loss and", "variants, from cheap to good")]
    return rows + [(COSTS[cost], ", ".join(names) or "–") for cost, names in fronts.items()]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as a Markdown table, whose first column is aligned to the left."""
    rule = ("---", *("---:",) * (len(rows[0]) - 1))
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
