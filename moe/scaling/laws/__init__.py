"""Provides the scaling laws and their fits.

from moe.scaling.laws import LAWS, fit, predict
result = fit(LAWS["chinchilla"], read_runs("runs.csv"))
"""

from moe.scaling.laws.fitting import LAWS, fit
from moe.scaling.laws.formulas import Law
from moe.scaling.laws.result import Fit, HeldOut, predict, predict_samples

__all__ = ["LAWS", "Fit", "HeldOut", "Law", "fit", "predict", "predict_samples"]
