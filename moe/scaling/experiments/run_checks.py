"""Checks a table of runs against what a law needs, before anything is fitted."""

from collections.abc import Sequence

import numpy as np

from moe.config.checks import ConfigError
from moe.scaling.experiments.runs import Runs, list_rows

_ARCHITECTURE = (
    "parameters",
    "active_parameters",
    "experts",
    "experts_per_token",
    "granularity",
)
_NEEDED = ("parameters", "tokens", "loss", "active_parameters", "flops")  # by every law
# No model was ever trained on so few, or so many, tokens for each of its parameters.
_FEWEST_TOKENS, _MOST_TOKENS = 1e-3, 1e7
# A loss this much above that of an equal model that saw fewer tokens is no noise of the seed, which
# moves a loss by a few tenths of a percent.
_RISE = 0.02


def check_runs(
    runs: Runs, columns: Sequence[str], num_coefficients: int
) -> tuple[Runs, list[tuple[str, str]]]:
    """Returns the runs that can be fitted, and the names of those left out, with the reason.

    Runs that did not finish or did not learn are left out. Whatever makes the table itself doubtful
    raises ConfigError, in one line with the rows concerned.
    """
    runs, left_out = leave_out(runs)
    check_values(runs, columns)
    _check_experts(runs, columns)
    if len(runs) <= num_coefficients:
        raise ConfigError(
            f"{len(runs)} runs are too few for {num_coefficients} coefficients"
            f"{_left(left_out)}: add runs, at least {num_coefficients + 1}"
        )
    for column in columns:
        if column != "embedding_parameters":
            _check_varies(runs, column)
    if np.ptp(runs.loss) <= 1e-6 * runs.loss.max():
        raise ConfigError(
            f"loss: all {len(runs)} runs have one value, {runs.loss[0]:.4g}: name the column that "
            "holds the loss of each run"
        )
    _check_rising(runs)
    return runs, left_out


def leave_out(runs: Runs) -> tuple[Runs, list[tuple[str, str]]]:
    """Returns the runs that finished and learned, and the names and reasons of the others."""
    reasons = _reasons_to_leave_out(runs)
    left_out = [(str(runs.run[i]), reason) for i, reason in enumerate(reasons) if reason]
    if len(left_out) == len(runs):
        raise ConfigError(f"status: no run can be used{_left(left_out)}: let runs finish")
    return runs.take(np.array([not reason for reason in reasons], bool)), left_out


def _left(left_out: list[tuple[str, str]]) -> str:
    """Returns what a message says of runs that were left out."""
    if not left_out:
        return ""
    return f" ({len(left_out)} were left out, the first because {left_out[0][1]})"


def _reasons_to_leave_out(runs: Runs) -> list[str]:
    """Returns for each run why it cannot be used, or "" if it can."""
    reasons = []
    for status, reason, loss, vocabulary in zip(
        runs.status, runs.reason, runs.loss, runs.vocab_size, strict=True
    ):
        if status != "finished":
            reasons.append(f"it is {status}" + f" ({reason})" * bool(reason))
        elif np.isfinite(loss) and loss >= np.log(vocabulary):
            reasons.append(
                f"its loss {loss:.4g} is not below that of a guess among {vocabulary:.0f} tokens: "
                "it diverged"
            )
        else:
            reasons.append("")
    return reasons


def check_values(runs: Runs, columns: Sequence[str]) -> None:
    """Raises ConfigError for values that are missing or cannot be, and for mixed data."""
    # The largest budget's runs are compared to those of the same size in a smaller one. Active
    # parameters and FLOPs may be derived from the columns before them, which are told first.
    names = tuple(dict.fromkeys((*_NEEDED, *columns)))
    for name in names:
        missing = np.isnan(getattr(runs, name))
        if missing.all():
            raise ConfigError(f"{name}: no run has a value: name the column that holds it")
        _refuse(runs, missing, name, "are empty or not a number", "fill or remove them")
    may_be_0 = ("sparsity", "embedding_parameters")
    for name in names:
        if name in may_be_0:
            continue
        values = getattr(runs, name)
        wrong = ~((values > 0) & np.isfinite(values))
        _refuse(runs, wrong, name, "must be positive and finite", "check them")
    _refuse(runs, runs.loss > 30, "loss", "are above 30 nats per token", "check their unit")
    _check_units(runs)
    for name in ("dataset", "tokenizer"):
        _check_same(runs, name)
    # One tokenizer's vocabulary may be padded to several sizes. Without a name, the size names it.
    if not runs.tokenizer.astype(bool).any():
        _check_same(runs, "vocab_size")


def _check_units(runs: Runs) -> None:
    """Raises ConfigError for counts that contradict one another."""
    _refuse(
        runs,
        runs.tokens < runs.batch_tokens,
        "tokens",
        "are below the tokens of one batch",
        "check the units of tokens and batch_tokens",
    )
    _check_counts(runs)
    with np.errstate(over="ignore"):
        ratio = runs.flops / (6 * runs.active_parameters * runs.tokens)
    _refuse(
        runs,
        (ratio < 1 / 30) | (ratio > 30),
        "flops",
        "are more than 30 times off 6 · parameters · tokens",
        "check the units of flops, parameters and tokens",
    )
    _refuse(
        runs,
        runs.embedding_parameters >= runs.active_parameters,
        "embedding_parameters",
        "are not below the active parameters",
        "count those of the embeddings alone",
    )
    _refuse(
        runs,
        ~((runs.sparsity >= 0) & (runs.sparsity < 1) | np.isnan(runs.sparsity)),
        "sparsity",
        "must be 0 or more and below 1",
        "set it to 1 - experts per token / experts",
    )


def _check_counts(runs: Runs) -> None:
    """Raises ConfigError for numbers of parameters and tokens that no model has."""
    for name in ("parameters", "active_parameters", "tokens"):
        _refuse(runs, getattr(runs, name) < 1, name, "are below 1", f"check the unit of {name}")
    tokens = runs.tokens / runs.active_parameters
    _refuse(
        runs,
        (tokens < _FEWEST_TOKENS) | (tokens > _MOST_TOKENS),
        "tokens",
        f"are not between {_FEWEST_TOKENS:g} and {_MOST_TOKENS:.0e} for each active parameter",
        "check the units of tokens and parameters",
    )


def _refuse(runs: Runs, wrong: np.ndarray, name: str, what: str, fix: str) -> None:
    """Raises ConfigError if any row is wrong."""
    if not wrong.any():
        return
    rows = list_rows(f"{row} ({value:.4g})" for row, value in _values(runs, wrong, name))
    raise ConfigError(f"{name}: {rows} {_singular(what, wrong.sum())}: {fix}")


def _values(runs: Runs, chosen: np.ndarray, name: str) -> list[tuple[int, float]]:
    return list(zip(runs.row[chosen], getattr(runs, name)[chosen], strict=True))


def _singular(what: str, count: int) -> str:
    return what.replace("are ", "is ", 1) if count == 1 else what


def _check_same(runs: Runs, name: str) -> None:
    """Raises ConfigError if runs have different values in a column. Losses would not compare."""
    values = getattr(runs, name)
    if values.dtype.kind == "f":
        values = np.array(["" if np.isnan(value) else f"{value:.0f}" for value in values])
    found, first, counts = np.unique(values, return_index=True, return_counts=True)
    if len(found) < 2:
        return
    usual = np.argmax(counts)
    other = next(i for i in np.argsort(first) if i != usual)
    rows = list_rows(runs.row[values == found[other]])
    usual, other = (str(found[i]) for i in (usual, other))
    raise ConfigError(
        f"{name}: the table mixes {usual or 'no value'} and {other or 'no value'} ({rows}), "
        f"whose losses do not compare: choose the rows of one with --where={name}={usual}, under "
        "the name that the column has in the file"
    )


def _check_experts(runs: Runs, columns: Sequence[str]) -> None:
    """Raises ConfigError for different mixtures if the law knows nothing of experts."""
    if {"experts", "sparsity", "granularity"} & set(columns):
        return
    kinds = np.stack([runs.experts, runs.experts_per_token], -1)
    found = np.unique(kinds, axis=0)
    if len(found) > 1:
        rows = list_rows(runs.row[np.all(kinds == found[-1], -1)])
        raise ConfigError(
            f"experts: the table has models of {found[0, 0]:.0f} and {found[-1, 0]:.0f} experts "
            f"({rows}), and this law knows no experts: choose the rows of one kind with "
            "--where=experts=..., under the name that the column has in the file, or choose a law "
            "of sparse models"
        )


def _check_varies(runs: Runs, name: str) -> None:
    """Raises ConfigError if all runs have one value, up to 1 %, in a column that a law is of."""
    values = getattr(runs, name)
    spread = values.max() - values.min()
    if spread <= 0.01 * np.abs(values).max():
        raise ConfigError(
            f"{name}: all {len(runs)} runs have one value, {values[0]:.4g}, so that nothing says "
            f"how the loss depends on it: add runs with another {name}"
        )


def _check_rising(runs: Runs) -> None:
    """Raises ConfigError for a loss above that of an equal model with as many tokens or fewer."""
    models = np.stack([np.nan_to_num(getattr(runs, name)) for name in _ARCHITECTURE], -1)
    _, model = np.unique(models, axis=0, return_inverse=True)
    order = np.lexsort((runs.loss, runs.tokens, model.ravel()))
    rising, worse, best = [], [], {}
    for i in order:
        tokens, seen = best.setdefault(model.ravel()[i], (runs.tokens[i], runs.loss[i]))
        if runs.loss[i] > seen * (1 + _RISE):
            found = rising if tokens < runs.tokens[i] else worse
            found.append(f"{runs.row[i]} ({runs.loss[i]:.4g} after {seen:.4g})")
        if runs.loss[i] < seen:
            best[model.ravel()[i]] = (runs.tokens[i], runs.loss[i])
    if rising:
        raise ConfigError(
            f"loss: {list_rows(rising)} {'rises' if len(rising) == 1 else 'rise'} with the tokens "
            "of a model of the same size: set the status of runs that diverged to diverged, and "
            "check whether losses were read before the decay or text was repeated"
        )
    if worse:
        raise ConfigError(
            f"loss: {list_rows(worse)} {'is' if len(worse) == 1 else 'are'} more than "
            f"{_RISE:.0%} above that of the same model on as many tokens: keep the best run of "
            "each model and number of tokens"
        )
