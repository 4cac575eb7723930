"""Splits the tokens of the residual stream over the tensor axis (Korthikanti et al. 2022).

This is sequence parallelism, section 4.2.2 of the paper. Between the matmuls of a layer, each
device of the tensor axis has its own part of the tokens of a row:

    x [B, t, D]       the residual stream, and the norm of it
      | gather_time   every device gets all tokens; backward, it adds up the gradient's parts
    [B, T, D]         times the device's own heads, feed-forward widths or vocabulary
      | scatter_time  adds up the devices' parts of each product, and gives each device its tokens
    y [B, t, D]       is added to the stream

A sum that is scattered and later gathered moves the bytes of an all-reduce. The letter t of RULES
says where the time is split; elsewhere the functions leave it as it is.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from moe.parallel.collectives.weights import name_gathered_tokens
from moe.parallel.mesh import constrain, splitting_axes

WHOLE, SPLIT = "BTD", "BtD"  # all tokens of a row on each device of the tensor axis, or a part
BETWEEN_PARTS = "between parts"  # the name of what recomputing policies store within a layer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lay_out(forward: tuple[str, ...], backward: tuple[str, ...], x_BTD: jax.Array) -> jax.Array:
    """Lays `x` out in each way of `forward` in turn, and its gradient in those of `backward`."""
    return functools.reduce(constrain, forward, x_BTD)


_lay_out.defvjp(
    lambda forward, backward, x_BTD: (_lay_out(forward, backward, x_BTD), None),
    lambda _, backward, __, grad_BTD: (functools.reduce(constrain, backward, grad_BTD),),
)


def splits_time(length: int) -> bool:
    """Returns whether the tensor axis splits the stream of rows of so many tokens."""
    (axes,) = splitting_axes("t", (length,))
    return "tensor" in axes


def gather_time(x_BTD: jax.Array) -> jax.Array:
    """Gives each device of the tensor axis all tokens, which its part of a weight multiplies.

    The gradient is the sum of what these devices compute, split as the residual stream is.
    """
    # A sum is asked for whole before it is split. The compiler makes one scatter of both. If it
    # were asked for in parts, TPUs would send it piece by piece, for each matmul of the sum.
    return name_gathered_tokens(_lay_out((WHOLE,), (WHOLE, SPLIT), x_BTD))


def scatter_time(y_BTD: jax.Array) -> jax.Array:
    """Gives each device of the tensor axis the sums of its own tokens, from parts of a matmul.

    The gradient is gathered.
    """
    return _lay_out((WHOLE, SPLIT), (WHOLE,), y_BTD)


def join_time(x_BTD: jax.Array) -> jax.Array:
    """Gives each device of the tensor axis all tokens, for several uses of `gather_time`.

    Each of these splits its own gradient, so that there is no sum over the axis here.
    """
    return _lay_out((WHOLE,), (SPLIT,), x_BTD)


def name_between_parts(x_BTD: jax.Array) -> jax.Array:
    """Marks the stream between two parts of a layer as what `parallel.remat` stores.

    It does so where the tensor axis splits the stream. Then the array is small, and the sum that
    made it need not be computed and sent again. Elsewhere it would double what is stored.
    """
    return checkpoint_name(x_BTD, BETWEEN_PARTS) if splits_time(x_BTD.shape[1]) else x_BTD
