"""What a fitted law says of budgets: the best models, and their spread over the bootstrap."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from launch.fit.axes import count_text, power_text
from moe.config import ConfigError, RunConfig
from moe.scaling.experiments.candidates import Candidate, columns_at
from moe.scaling.experiments.optimum import (
    Columns,
    Family,
    Loss,
    Optimum,
    best_point,
    best_size,
    dense_family,
    summarise,
)
from moe.scaling.experiments.runs import Runs, list_rows, make_runs
from moe.scaling.flops import planned_flops, planned_tokens
from moe.scaling.laws import Fit, Law, predict_samples
from moe.scaling.laws.isoflop import IsoFlop
from moe.scaling.laws.warnings import EPOCHS

SPARSE_INPUTS = {"experts", "granularity", "density"}  # what only models with experts have
FAR = 10.0  # times the largest run, or below the smallest: budgets beyond this get a note


def is_sparse(inputs: Iterable[str]) -> bool:
    """Returns whether a law with these inputs says what experts do to the loss."""
    return bool(SPARSE_INPUTS & set(inputs))


def can_spend(inputs: Iterable[str]) -> bool:
    """Returns whether a law with these inputs weighs the size of a model against its tokens."""
    return bool({"tokens", "tokens_per_parameter"} & set(inputs))


def check_dense(law: str, runs: Runs) -> None:
    """Raises ConfigError if a law of dense models is to describe models with experts."""
    rows = runs.row[runs.experts > 1]
    if len(rows):
        raise ConfigError(
            f"--law={law} describes dense models, and {list_rows(rows)} have experts: "
            "set --law to a law of experts, or keep the dense runs with --where"
        )


def check_budgets(law: str, inputs: Iterable[str], has_configs: bool) -> None:
    """Raises ConfigError if a law cannot say how to spend a budget."""
    if not can_spend(inputs):
        raise ConfigError(
            f"--budget: --law={law} does not weigh size against tokens, so it cannot say how to "
            "spend a budget: leave --budget out, or choose another law"
        )
    if is_sparse(inputs) and not has_configs:
        raise ConfigError(
            f"--budget: --law={law} needs models with experts to choose from, and there is no "
            "column config: leave --budget out, or give a table of launch.sweep"
        )


def spend(candidates: Sequence[Candidate], budget: float) -> RunConfig:
    """Returns the config that spends a budget on the first of some models that can be trained so.

    Raises ConfigError, which says what budgets the models can spend, if there is none.
    """
    config, reason = _first_trainable(candidates, budget)
    if config:
        return config
    powers = [float(power) for power in 10.0 ** np.arange(1, 40)]
    able = [power for power in powers if _first_trainable(candidates, power)[0]]
    limits = f"between {able[0]:.0e} and {able[-1]:.0e}" if able else "to another number"
    models = "the best model" if len(candidates) == 1 else f"all {len(candidates)} models"
    raise ConfigError(
        f"--budget={budget:g} is no budget for {models} ({reason}): set --budget {limits}"
    )


def _first_trainable(
    candidates: Sequence[Candidate], budget: float
) -> tuple[RunConfig | None, str]:
    """Returns the config of the first model that a budget can train, or None and why none can."""
    reason = ""
    for candidate in candidates:
        try:
            return candidate.run(budget), ""
        except ConfigError as error:
            reason = str(error).partition(": ")[0]
    return None, reason


def table_configs(runs: Runs, is_strict: bool) -> list[RunConfig]:
    """Returns the different configs of a table's finished runs. Tables from elsewhere have none.

    A config of another program, or of another version of this code, raises ConfigError if
    `is_strict`. Otherwise the table counts as one without configs.
    """
    finished = runs.take(runs.status == "finished")
    configs = {}
    for row, text in zip(finished.row, finished.config, strict=True):
        if text in configs or not text.startswith("{"):
            continue  # another program's column of this name is none of ours
        try:
            configs[text] = RunConfig.from_config_dict(json.loads(text))
        except (ValueError, RecursionError) as error:  # ConfigError is a ValueError
            if not is_strict:
                return []
            raise ConfigError(
                f"row {row}: column config holds no config of this version ({error}): "
                "leave --budget out, or remove the column"
            ) from None
    return list(configs.values())


def law_loss(fit: Fit, every: int = 1) -> Loss:
    """Returns a law as a function of columns: the fit itself, then every n-th bootstrap sample."""
    own = np.array([[fit.coefficients[name] for name in fit.law.coefficients]])
    samples_SK = np.concatenate([own, fit.samples[::every]])

    def loss(columns: Columns) -> np.ndarray:
        return predict_samples(fit.law, samples_SK, make_runs(**columns))

    return loss


def size_name(law: Law) -> str:
    """Returns the name of what a law counts as a model's size."""
    if {"body", "active_body"} & set(law.inputs):
        return "non-embedding parameters"
    counts_active = {"active", "decimal_active"} & set(law.inputs)
    return "active parameters" if is_sparse(law.inputs) and counts_active else "parameters"


def sizes(law: Law, columns: Columns) -> np.ndarray:
    """Returns the sizes that a law counts, from the columns of runs or of points."""
    counts_all = {"body", "parameters"} & set(law.inputs)
    counted = columns["parameters" if counts_all else "active_parameters"]
    excludes = {"body", "active_body"} & set(law.inputs)
    return counted - columns["embedding_parameters"] if excludes else counted


def best_model(
    law: Law, loss: Loss, candidates: Sequence[Candidate], budget: float
) -> tuple[Optimum, Candidate | None]:
    """Returns the best model for a budget, as an optimum and as one of the candidates.

    Without candidates it is a dense model of any size.
    """
    if not candidates:
        return best_size(loss, budget, [dense_family(budget)]), None
    is_edge_P = np.array([candidate.is_edge for candidate in candidates])
    columns = columns_at(candidates, budget)
    columns["size"] = sizes(law, columns)
    place, optimum = best_point(loss, budget, columns, is_edge_P)
    return optimum, candidates[place]


def best_of_any_size(law: Law, loss: Loss, families: Sequence[Family], budget: float) -> Optimum:
    """Returns the best model for a budget, if there were models of any size.

    Without families they are dense models at 6 FLOPs for each parameter and token.
    """

    def sized(family: Family) -> Family:
        def columns(log_size: np.ndarray) -> Columns:
            known = family.columns(log_size)
            return {**known, "size": sizes(law, known)}

        return dataclasses.replace(family, columns=columns)

    return best_size(loss, budget, [sized(family) for family in families or [dense_family(budget)]])


def isoflop_model(
    found: IsoFlop, candidates: Sequence[Candidate], budget: float
) -> tuple[Optimum, Candidate | None]:
    """Returns the model of the size that approach 2 gives for a budget.

    With candidates it is the one whose size is nearest. Approach 2 says no loss. Where nothing
    shows the noise, all samples are NaN, and so are the intervals.
    """
    own = np.array([list(found.coefficients.values())])
    known = found.samples[np.isfinite(found.samples).all(1)]
    samples_SK = np.concatenate([own, known])
    size_S, tokens_S = (
        samples_SK[:, first] * budget ** samples_SK[:, first + 1] for first in (0, 2)
    )
    if not candidates:
        columns = dict.fromkeys(("size", "parameters", "active_parameters"), size_S)
        optimum = summarise(budget, columns | {"tokens": tokens_S}, at_edge=0.0)
        return (optimum if len(known) else _without_intervals(optimum)), None
    columns = columns_at(candidates, budget)
    columns["size"] = columns["active_parameters"]
    is_edge_P = np.array([candidate.is_edge for candidate in candidates])
    distance_SP = np.abs(np.log(columns["size"] / size_S[:, None]))
    place, optimum = best_point(lambda _: distance_SP, budget, columns, is_edge_P)
    # What was minimised is a distance, and no loss.
    best, intervals = (
        {name: value for name, value in found.items() if name != "loss"}
        for found in (optimum.best, optimum.intervals)
    )
    optimum = dataclasses.replace(optimum, best=best, intervals=intervals)
    return (optimum if len(known) else _without_intervals(optimum)), candidates[place]


def _without_intervals(optimum: Optimum) -> Optimum:
    """Returns an optimum that says nothing of its spread."""
    unknown = dict.fromkeys(optimum.intervals, (np.nan, np.nan))
    return dataclasses.replace(optimum, intervals=unknown)


def notes(
    optima: Sequence[Optimum],
    configs: Sequence[RunConfig | None],
    runs: Runs,
    is_identifiable: bool,
) -> list[str]:
    """Returns what a reader has to know beside the table of best models, as sentences."""
    found = []
    if not is_identifiable:
        found.append(
            "Do not plan by these numbers: the runs do not determine the law's coefficients."
        )
    for optimum, config in zip(optima, configs, strict=True):
        budget = power_text(optimum.budget, 3)
        found += [f"At {budget} FLOP {note}" for note in _doubts(optimum, runs)]
        if config is not None:
            tokens, flops = planned_tokens(config), planned_flops(config)
            found.append(
                f"At {budget} FLOP the config trains {config.train.steps:,} steps of "
                f"{config.train.batch_size} rows: {count_text(tokens)} tokens, "
                f"{power_text(flops, 5)} FLOP."
            )
    if all(config is None for config in configs):
        found.append("Models are dense, of any size, at 6 FLOPs for each parameter and token.")
    return found


def _doubts(optimum: Optimum, runs: Runs) -> Iterator[str]:
    """Yields what is doubtful about the best model for a budget, as ends of sentences."""
    above = optimum.budget / float(np.max(runs.flops))
    below = float(np.min(runs.flops)) / optimum.budget
    far = None
    if above > FAR:
        far = f"{_factor(above)} times the largest"
    elif below > FAR:
        far = f"1/{_factor(below)} of the smallest"
    if far:
        yield (
            f"a run costs {far} one of the table: the intervals hold only as far as the law does."
        )
    if optimum.at_edge > 0.5:
        yield (
            "there is no best size: the law prefers the smallest or the largest one of the models "
            "that were compared."
        )
    elif optimum.at_edge > 0.025:
        yield (
            f"{optimum.at_edge:.0%} of the bootstrap's samples prefer the smallest or the largest "
            "one of the models that were compared, so the true interval is wider."
        )
    most = float(np.max(runs.experts))
    if most > 1 and optimum.best.get("experts") == most:
        yield f"the most experts of the table, {most:g}, are best: more might be better still."
    elif most > 1 and optimum.best.get("experts") == 1:
        yield f"a dense model is best: the law expects no gain from up to {most:g} experts."
    distinct = runs.tokens / runs.repeats  # NaN where nobody counted how often text was repeated
    if not np.isnan(distinct).all():
        epochs = optimum.best["tokens"] / float(np.nanmax(distinct))
        if epochs > EPOCHS:
            yield (
                f"the text of these runs would be repeated {epochs:.2g} times, which teaches less "
                "than new text: take more text."
            )


def _factor(value: float) -> str:
    """Returns a factor as people say it, such as 1,234, or 5.6×10⁷ for a larger one."""
    return f"{value:,.0f}" if value < 1e6 else power_text(value)
