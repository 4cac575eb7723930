"""Fits the law that was asked for, and puts together what the command prints and draws."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.fit import study
from launch.fit.prediction import (
    best_model,
    check_budgets,
    check_dense,
    is_sparse,
    isoflop_model,
    law_loss,
    notes,
    spend,
    table_configs,
)
from launch.fit.results import (
    Results,
    coefficients_of,
    facts_of,
    held_out_of,
    isoflop_facts,
    step_law_facts,
)
from launch.plotting import Drawing
from moe.config import ConfigError, RunConfig
from moe.scaling.experiments.candidates import Candidate, list_candidates
from moe.scaling.experiments.optimum import Optimum
from moe.scaling.experiments.run_checks import check_runs
from moe.scaling.experiments.runs import Runs
from moe.scaling.laws import LAWS, fit
from moe.scaling.laws.hyperparameters import fit_step_law
from moe.scaling.laws.isoflop import fit_isoflop

Progress = Callable[[int, int, str], None]
Models = Sequence[tuple[Optimum, RunConfig | None]]

# The laws that are no formula of the loss, each with what it says and its source.
OTHER_LAWS = {
    "isoflop": (
        "N* = N_factor C^N_exponent and D* = D_factor C^D_exponent, from parabolas",
        "Hoffmann et al. 2022, arXiv 2203.15556, section 3.2",
    ),
    "steplaw": (
        "learning rate = factor N^a D^b and batch = factor D^c, with N without embeddings",
        "Li et al. 2025, arXiv 2503.04715",
    ),
}


class Solution(NamedTuple):
    """Holds what a call of the command found, before anything is written."""

    results: Results
    drawings: list[Drawing]
    config: RunConfig | None  # of the best model for the largest budget, where there are configs


@dataclasses.dataclass(frozen=True)
class Request:
    """Says what is to be fitted and predicted."""

    law: str
    path: Path  # of the table
    sha256: str  # of the file that was read, which a running sweep writes again
    runs: Runs
    budgets: list[float]
    emit: str | None
    seed: int
    starts: int
    bootstraps: int
    loss_unit: str  # of the table's column


def law_texts() -> dict[str, tuple[str, str]]:
    """Returns what each law says, and its source, by its name."""
    return {name: (law.formula, law.source) for name, law in LAWS.items()} | OTHER_LAWS


def check(request: Request) -> list[Candidate]:
    """Returns the models that the table's configs make. Raises ConfigError for a wrong request."""
    law, runs = LAWS.get(request.law), request.runs
    inputs = law.inputs if law else ("active", "tokens") * (request.law == "isoflop")
    if request.law != "steplaw" and not is_sparse(inputs):
        check_dense(request.law, runs)
    # --emit needs a budget, so nothing else asks for configs that train.
    configs = table_configs(runs, is_strict=bool(request.budgets))
    if request.budgets:
        check_budgets(request.law, inputs, has_configs=bool(configs))
    if law:
        check_runs(runs, law.columns, len(law.coefficients))
    if request.emit and not configs:
        raise ConfigError(
            f"--emit={request.emit} has no config to start from, as there is no column config: "
            "give a table of launch.sweep, or leave --emit out"
        )
    candidates = list_candidates(configs)
    for budget in request.budgets if candidates else ():
        spend(candidates, budget)  # a budget that none of them can spend need not wait for the fit
    return candidates


def solve(request: Request, candidates: Sequence[Candidate], progress: Progress) -> Solution:
    """Returns what a law's fit says. `candidates` are those that `check` has found."""
    match request.law:
        case "isoflop":
            return _solve_isoflop(request, candidates)
        case "steplaw":
            return _solve_step_law(request)
        case _:
            return _solve_loss(request, candidates, progress)


def _solve_loss(request: Request, candidates: Sequence[Candidate], progress: Progress) -> Solution:
    """Returns what a law of the loss says."""
    found = fit(
        LAWS[request.law],
        request.runs,
        seed=request.seed,
        num_starts=request.starts,
        num_bootstraps=request.bootstraps,
        progress=progress,
    )
    loss = law_loss(found)
    best = [best_model(found.law, loss, candidates, budget) for budget in request.budgets]
    models = _with_configs(best)
    results = _results(request, found, models, facts=facts_of(found), held_out=held_out_of(found))
    drawings = study.draw_fit(found, results.optima, candidates, loss_axis(request))
    return Solution(results, drawings, models[-1][1] if models else None)


def _solve_isoflop(request: Request, candidates: Sequence[Candidate]) -> Solution:
    """Returns what the parabolas of approach 2 say."""
    found = fit_isoflop(request.runs, seed=request.seed, num_bootstraps=request.bootstraps)
    best = [isoflop_model(found, candidates, budget) for budget in request.budgets]
    models = _with_configs(best)
    results = _results(request, found, models, facts=isoflop_facts(found), held_out=None)
    drawings = study.draw_isoflop(found, results.optima, loss_axis(request))
    return Solution(results, drawings, models[-1][1] if models else None)


def _solve_step_law(request: Request) -> Solution:
    """Returns what the best learning rates and batches say."""
    found = fit_step_law(request.runs, seed=request.seed, num_bootstraps=request.bootstraps)
    results = _results(request, found, [], facts=step_law_facts(found), held_out=None)
    return Solution(results, study.draw_step_law(found, loss_axis(request)), None)


def _with_configs(best: Sequence[tuple[Optimum, Candidate | None]]) -> Models:
    """Returns the best models with the configs that train them, where there are candidates."""
    return [
        (optimum, spend([candidate], optimum.budget) if candidate else None)
        for optimum, candidate in best
    ]


def loss_axis(request: Request) -> str:
    """Returns the name of an axis of losses. Foreign tables may have bits per byte or per token."""
    return "loss, nats per token" if request.loss_unit == "nats" else "loss, nats (from bits)"


def _results(request: Request, found: Any, models: Models, **fields: Any) -> Results:
    """Returns everything that is printed and written as numbers and sentences."""
    formula, source = law_texts()[request.law]
    optima = [optimum for optimum, _ in models]
    configs = [config for _, config in models]
    return Results(
        law=request.law,
        formula=formula,
        source=source,
        table=str(request.path),
        table_sha256=request.sha256,
        loss_unit=request.loss_unit,
        num_runs=len(request.runs) - len(found.left_out),
        num_rows=len(request.runs),
        coefficients=coefficients_of(found.coefficients, found.intervals),
        not_identifiable=found.not_identifiable,
        warnings=found.warnings,
        left_out=found.left_out,
        optima=optima,
        notes=notes(optima, configs, found.runs, found.is_identifiable) if optima else [],
        **fields,
    )
