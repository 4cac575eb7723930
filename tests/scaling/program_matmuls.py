"""Counts the FLOPs of the matmuls in a traced program."""

import math

from jax.extend.core import jaxprs_in_params


def matmul_flops(jaxpr):
    """Returns 2mkn for each dot_general of a jaxpr, as often as it runs.

    Raises ValueError where it is not known how often one runs.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += dot_flops(equation)
        inner = sum(matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
        if inner and name in ("while", "cond"):
            raise ValueError(f"the matmuls in a {name} run an unknown number of times")
        total += inner * (equation.params["length"] if name == "scan" else 1)
    return total


def dot_flops(equation):
    """Returns 2mkn of a dot_general, for each entry of its batch dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    sums = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
    return 2 * sums * math.prod(equation.outvars[0].aval.shape)
