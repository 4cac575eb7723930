"""Says what a reader should know before believing a fit."""

from moe.scaling.laws.result import Fit


def why_not_identifiable(fit: Fit) -> list[str]:
    """Returns the reasons, if any, for which the data do not determine the coefficients."""
    return []


def find_warnings(fit: Fit) -> list[str]:
    """Returns sentences that each say what is doubtful about a fit, and what helps."""
    return []
