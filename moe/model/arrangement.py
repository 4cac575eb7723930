"""Arranges tokens' assignments by expert, and moves values between tokens and arranged rows.

Each of N tokens has A assignments to experts. An arrangement gives an assignment a slot, which is a
place for a row, so that the rows of an expert lie next to one another. Values move between tokens
and slots only by gathers, forward and backward. A scatter would be slow on a CPU, and unordered on
a GPU.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Arrangement(NamedTuple):
    """Maps R = N A assignments to I slots, one to one. Either may lack a partner.

    A slot is a place for a row. Assignment n A + a is token n's choice a.
    """

    slots_NA: jax.Array  # each assignment's slot; I if it has none
    assignments_I: jax.Array  # each slot's assignment; R if it has none

    @property
    def tokens_I(self) -> jax.Array:
        """Returns the token of each slot's assignment, int32 [I]; N if it has none."""
        return self.assignments_I // self.slots_NA.shape[1]


def check_assignments(x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array) -> None:
    """Raises ValueError or TypeError for arrays that do not match, or experts without numbers."""
    tokens, shape = x_ND.shape[:1], experts_NA.shape
    fits = x_ND.ndim == len(shape) == 2 and shape[:1] == tokens and weights_NA.shape == shape
    if not fits or not shape[1]:
        raise ValueError(
            f"x has shape {x_ND.shape}, experts {shape} and weights {weights_NA.shape}: "
            "give x [N, D], and experts and weights [N, A], where A is 1 or more"
        )
    if not jnp.issubdtype(experts_NA.dtype, jnp.integer):
        raise TypeError(f"experts is {experts_NA.dtype.name}: give the experts' numbers, as int32")


def expert_loads(experts_NA: jax.Array, num_experts: int) -> jax.Array:
    """Returns the number of assignments of each expert, int32 [E]."""
    chosen_NAE = jax.nn.one_hot(experts_NA, num_experts, dtype=bool)
    return jnp.sum(chosen_NAE, axis=(0, 1), dtype=jnp.int32)


def places_of_sorted(sorted_experts_R: jax.Array, num_experts: int) -> jax.Array:
    """Returns each assignment's place among those of its expert, int32 [R], from 0.

    `sorted_experts_R` ascends, from 0 to E. The place is the distance to the expert's first one.
    """
    index_R = jnp.arange(sorted_experts_R.size, dtype=jnp.int32)
    every_expert = jnp.arange(num_experts + 1, dtype=sorted_experts_R.dtype)
    firsts = jnp.searchsorted(sorted_experts_R, every_expert).astype(jnp.int32)
    return index_R - firsts[sorted_experts_R]


def arrange(experts_NA: jax.Array, first_slots_E: jax.Array, num_slots: int) -> Arrangement:
    """Gives each expert's assignments, in order, the slots up to the next expert's first one.

    Expert e has the slots from `first_slots_E[e]` on. An assignment that is beyond an expert's
    slots, or has no expert, gets no slot.
    """
    num_experts = first_slots_E.shape[0]
    experts_R = experts_NA.reshape(-1).astype(jnp.int32)
    is_expert_R = (experts_R >= 0) & (experts_R < num_experts)
    experts_R = jnp.where(is_expert_R, experts_R, num_experts)
    index = jnp.arange(experts_R.size, dtype=jnp.int32)
    sorted_experts, order = jax.lax.sort((experts_R, index), num_keys=1)
    places = places_of_sorted(sorted_experts, num_experts)
    # The number E, which is no expert, has the empty range of slots from I to I.
    end = jnp.array([num_slots, num_slots], first_slots_E.dtype)
    bounds = jnp.append(first_slots_E, end)
    slots = bounds[sorted_experts] + places
    slots = jnp.where(slots < bounds[sorted_experts + 1], slots, num_slots)
    slots_NA = jnp.zeros_like(index).at[order].set(slots).reshape(experts_NA.shape)
    nothing_I = jnp.full(num_slots, experts_R.size, jnp.int32)
    return Arrangement(slots_NA, nothing_I.at[slots].set(order, mode="drop"))


def arrange_equally(experts_NA: jax.Array, num_experts: int, capacity: int) -> Arrangement:
    """Gives each of `num_experts` experts `capacity` slots."""
    first_slots_E = jnp.arange(num_experts, dtype=jnp.int32) * capacity
    return arrange(experts_NA, first_slots_E, num_experts * capacity)


def take_or_zero(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the values at an index along the first dimension, and 0 where it is beyond them."""
    # JAX gathers from no array without values. Outside of jit they may be NumPy's.
    values = jnp.asarray(values) if len(values) else jnp.zeros((1, *values.shape[1:]), values.dtype)
    return values.at[index].get(mode="fill", fill_value=0)


def gather_from_slots(slot_values: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns each assignment's value from its slot, [N, A], or 0 if it has none."""
    return take_or_zero(slot_values, arrangement.slots_NA)


@jax.custom_vjp
def gather_into_slots(values_NA: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns each slot's value from its assignment, [I], or 0 if it has none.

    This is the transpose of `gather_from_slots`, computed by a gather.
    """
    return take_or_zero(values_NA.reshape(-1), arrangement.assignments_I)


gather_into_slots.defvjp(
    lambda values_NA, arrangement: (gather_into_slots(values_NA, arrangement), arrangement),
    lambda arrangement, g_I: (gather_from_slots(g_I, arrangement), None),
)


@jax.custom_vjp
def copy_to_slots(x_ND: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns the token of each slot's assignment, [I, D], or zeros if it has none."""
    return take_or_zero(x_ND, arrangement.tokens_I)


def _copy_to_slots_forward(
    x_ND: jax.Array, arrangement: Arrangement
) -> tuple[jax.Array, Arrangement]:
    return copy_to_slots(x_ND, arrangement), arrangement


def _copy_to_slots_backward(arrangement: Arrangement, g_ID: jax.Array) -> tuple[jax.Array, None]:
    return add_rows(g_ID, arrangement), None


copy_to_slots.defvjp(_copy_to_slots_forward, _copy_to_slots_backward)


@jax.custom_vjp
def add_rows(rows_ID: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns the sum of each token's rows, [N, D], summed in float32 (or float64).

    It is the transpose of `copy_to_slots`. Its backward pass needs no rows.
    """
    ones_NA = jnp.ones(arrangement.slots_NA.shape, jnp.float32)
    return weighted_sum(rows_ID, ones_NA, arrangement)


add_rows.defvjp(
    lambda rows_ID, arrangement: (add_rows(rows_ID, arrangement), arrangement),
    lambda arrangement, g_ND: (copy_to_slots(g_ND, arrangement), None),
)


@jax.custom_vjp
def combine(rows_ID: jax.Array, weights_NA: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns the sum of each token's rows times their weights, [N, D].

    It is summed in float32, or in float64 if one of the arrays is float64.
    """
    return weighted_sum(rows_ID, weights_NA, arrangement)


def _combine_forward(
    rows_ID: jax.Array, weights_NA: jax.Array, arrangement: Arrangement
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Arrangement]]:
    return combine(rows_ID, weights_NA, arrangement), (rows_ID, weights_NA, arrangement)


def _combine_backward(
    residuals: tuple[jax.Array, jax.Array, Arrangement], g_ND: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_ID, weights_NA, arrangement = residuals
    g_ID = copy_to_slots(g_ND, arrangement)
    weights_I1 = gather_into_slots(weights_NA, arrangement)[:, None]
    sum_dtype = _sum_dtype(rows_ID, weights_NA)
    grad_rows = (g_ID.astype(sum_dtype) * weights_I1.astype(sum_dtype)).astype(rows_ID.dtype)
    grad_weights_I = jnp.sum(rows_ID.astype(sum_dtype) * g_ID.astype(sum_dtype), axis=1)
    grad_weights = gather_from_slots(grad_weights_I, arrangement).astype(weights_NA.dtype)
    return grad_rows, grad_weights, None


combine.defvjp(_combine_forward, _combine_backward)


def _sum_dtype(*arrays: jax.Array) -> type:
    """Returns the dtype in which products of these arrays are added up."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def weighted_sum(rows_ID: jax.Array, weights_NA: jax.Array, arrangement: Arrangement) -> jax.Array:
    """Returns what `combine` does, without a backward pass of its own.

    An assignment without a slot adds zeros. It must not add 0 times another row, which may hold
    NaN.
    """
    # One gather for each choice, which XLA fuses with the sum. One gather of all [N, A, D] takes
    # four times as long on a CPU.
    sum_dtype = _sum_dtype(rows_ID, weights_NA)
    weights_NA, terms = weights_NA.astype(sum_dtype), []
    for slots_N, weights_N in zip(arrangement.slots_NA.T, weights_NA.T, strict=True):
        rows_ND = take_or_zero(rows_ID, slots_N).astype(sum_dtype)
        terms.append(rows_ND * weights_N[:, None])
    return functools.reduce(operator.add, terms).astype(rows_ID.dtype)
