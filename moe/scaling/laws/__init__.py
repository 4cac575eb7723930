"""Provides the scaling laws and their fits.

    from moe.scaling.laws import LAWS, fit, predict
    result = fit(LAWS["chinchilla"], read_runs("runs.csv"))

`fit_isoflop` finds the best size of each budget from parabolas, and `fit_step_law` the best
learning rate and batch.
"""

from moe.scaling.laws.fitting import LAWS, fit
from moe.scaling.laws.formulas import Law
from moe.scaling.laws.hyperparameters import StepLaw, fit_step_law
from moe.scaling.laws.isoflop import Curve, IsoFlop, fit_isoflop, power_law
from moe.scaling.laws.result import Fit, HeldOut, predict, predict_samples

__all__ = [
    "LAWS",
    "Curve",
    "Fit",
    "HeldOut",
    "IsoFlop",
    "Law",
    "StepLaw",
    "fit",
    "fit_isoflop",
    "fit_step_law",
    "power_law",
    "predict",
    "predict_samples",
]
