"""Fits a law to runs: the optimum from many starts, intervals, a held-out test and warnings."""

import dataclasses

import numpy as np

from moe.scaling.experiments.run_checks import check_runs
from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.formulas import CHINCHILLA, KAPLAN, OVERTRAINING, Law, read_inputs
from moe.scaling.laws.minimise import Problem, Progress
from moe.scaling.laws.optimum import condition_number, find_optimum
from moe.scaling.laws.refits import bootstrap, drift, predict_largest_budget
from moe.scaling.laws.result import Fit, named, predict
from moe.scaling.laws.routed import CLARK, FINE_GRAINED, JOINT, SPARSITY
from moe.scaling.laws.warnings import find_warnings, why_not_identifiable

LAWS = {
    law.name: law
    for law in (CHINCHILLA, KAPLAN, OVERTRAINING, CLARK, FINE_GRAINED, SPARSITY, JOINT)
}


def fit(
    law: Law,
    runs: Runs,
    *,
    seed: int = 0,
    num_starts: int = 200,
    num_bootstraps: int = 1000,
    progress: Progress | None = None,
) -> Fit:
    """Returns a law's fit to runs. Runs that cannot be used are left out, or refused in one line.

    The result follows from the runs and `seed`. `progress(done, total, what)` is called during the
    starts and the bootstraps, which take most of the time.
    """
    runs, left_out = check_runs(runs, law.columns, len(law.coefficients))
    generator = np.random.default_rng(seed)
    problem = Problem(law, read_inputs(law, runs), runs.loss, law.objective)
    optimum = find_optimum(problem, generator, num_starts, progress)
    held_out = predict_largest_budget(law, runs, optimum.theta, generator, num_starts)
    theta_PK = bootstrap(
        problem, optimum.theta, runs.run, generator, num_bootstraps, progress=progress
    )
    coefficients = named(law, law.public(optimum.theta))
    result = Fit(
        law=law,
        runs=runs,
        coefficients=coefficients,
        samples=law.public(theta_PK),
        residuals=np.log(predict(law, coefficients, runs) / runs.loss),
        objective=optimum.value,
        held_out=held_out,
        starts_at_optimum=optimum.starts_at_optimum,
        projection_gap=optimum.projection_gap,
        condition_number=condition_number(problem, optimum.theta),
        drift=drift(problem, optimum.theta),
        left_out=left_out,
    )
    return dataclasses.replace(
        result, not_identifiable=why_not_identifiable(result), warnings=find_warnings(result)
    )
