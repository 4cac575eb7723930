"""Provides the collectives of sparse layers, which all run inside shard_map.

Weights are gathered over the fsdp axis, and rows are exchanged over the expert axis. Outside of
shard_map, or on a mesh that lacks an axis, that axis counts as one of size 1, and nothing is sent
over it. The letter P stands for the devices along the expert axis. Device p holds experts p E/P to
(p + 1) E/P - 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.parallel.collectives.weights import gather, scatter
from moe.parallel.mesh import axis_size

EXCHANGED = "exchanged rows"  # names what a device received for its experts


def _name(received: jax.Array) -> jax.Array:
    """Names what devices received, so that policies of `parallel.remat` can save it."""
    return checkpoint_name(received, EXCHANGED)


# Weights, over the fsdp and tensor axes


def gather_weight(w: jax.Array, dtype: jnp.dtype, dim: int | None) -> jax.Array:
    """Returns the weight in `dtype`, whole along the dimension that fsdp splits, if it does."""
    w = w.astype(dtype)
    return w if dim is None else gather(w, ("fsdp",), dim)


def scatter_gradient(gradient: jax.Array, dim: int | None) -> jax.Array:
    """Returns the sum over fsdp of a whole weight's gradients, split as the weight is.

    Where fsdp splits no dimension of the weight, its devices keep what they have.
    """
    return gradient if dim is None else scatter(gradient, ("fsdp",), dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def expert_matmul(rows_ECX: jax.Array, w_EXY: jax.Array, fsdp_dim: int | None) -> jax.Array:
    """Multiplies each expert's C rows by its own weight, [E, C, Y].

    X is the width of a row, and Y that of a result. All matmuls of experts on equally many rows go
    through here. The weight is this device's shard, which fsdp splits along `fsdp_dim`, if at all.
    It is gathered in the rows' dtype, and again in the backward pass. Its gradient is summed in
    float32.
    """
    return jnp.einsum("ecx,exy->ecy", rows_ECX, gather_weight(w_EXY, rows_ECX.dtype, fsdp_dim))


def _expert_matmul_forward(
    rows_ECX: jax.Array, w_EXY: jax.Array, fsdp_dim: int | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return expert_matmul(rows_ECX, w_EXY, fsdp_dim), (rows_ECX, w_EXY)


def _expert_matmul_backward(
    fsdp_dim: int | None, residuals: tuple[jax.Array, jax.Array], grad_ECY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_ECX, w_EXY = residuals
    whole_w_EXY = gather_weight(w_EXY, rows_ECX.dtype, fsdp_dim)
    grad_rows = jnp.einsum("ecy,exy->ecx", grad_ECY, whole_w_EXY)
    grad_w = jnp.einsum("ecx,ecy->exy", rows_ECX, grad_ECY, preferred_element_type=jnp.float32)
    return grad_rows, scatter_gradient(grad_w, fsdp_dim).astype(w_EXY.dtype)


expert_matmul.defvjp(_expert_matmul_forward, _expert_matmul_backward)


def sum_over_tensor(y_BTD: jax.Array, splits_time: bool) -> jax.Array:
    """Adds up the parts of a sum that devices with other slices of the experts' width hold.

    With `splits_time` each device gets the sums of its own part of T alone.
    """
    if axis_size("tensor") == 1:
        return y_BTD
    if not splits_time:
        return jax.lax.psum(y_BTD, "tensor")
    return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)


# The all-gather exchange: every device sees all tokens of its expert group


def gather_tokens(x: jax.Array) -> jax.Array:
    """Joins the tokens of all devices of the expert group, in the order of the devices."""
    return _name(jax.lax.all_gather(x, "expert", tiled=True))


def own_experts(experts_NA: jax.Array, num_own: int) -> jax.Array:
    """Renumbers experts, so that this device's `num_own` experts are 0, 1, and so on.

    An expert of another device gets the number `num_own`, which is no expert's.
    """
    own_NA = experts_NA - jax.lax.axis_index("expert") * num_own
    return jnp.where((own_NA >= 0) & (own_NA < num_own), own_NA, num_own)


def scatter_sums(y: jax.Array) -> jax.Array:
    """Adds up the devices' values of each token, and gives each device its own tokens' sums."""
    return jax.lax.psum_scatter(y, "expert", tiled=True)


# The all-to-all exchange: each device sends every expert the same number of rows


def all_to_all(rows_ECD: jax.Array) -> jax.Array:
    """Sends this device's rows for all experts to them: [E, C, D] to [E/P, P C, D].

    The result holds the rows from all devices for this device's experts.
    """
    return _name(jax.lax.all_to_all(rows_ECD, "expert", split_axis=0, concat_axis=1, tiled=True))


def all_to_all_back(rows_ECD: jax.Array) -> jax.Array:
    """Sends rows back to where `all_to_all` had them: [E/P, P C, D] to [E, C, D]."""
    return _name(jax.lax.all_to_all(rows_ECD, "expert", split_axis=1, concat_axis=0, tiled=True))


# The ragged exchange: each device sends the assigned rows alone


class ExchangePlan(NamedTuple):
    """Says which rows each device sends to each other one, as int32 [sender, receiver].

    A sender's rows are sorted by expert, so the rows for one receiver are next to one another. A
    receiver's buffer begins with the rows of device 0; then come those of device 1, and so on.
    """

    starts_PP: jax.Array  # the first row for the receiver, among the sender's rows
    offsets_PP: jax.Array  # the place of that row in the receiver's buffer
    sizes_PP: jax.Array  # the number of rows sent


class RaggedExchange(NamedTuple):
    """Holds a plan as one device of the group sees it.

    Every array but `experts_R` has one entry for each device of the group: "that device" below.
    """

    starts_P: jax.Array  # the first row for that device, among this device's rows
    sizes_P: jax.Array  # the number of rows that this device sends there
    remote_offsets_P: jax.Array  # the place of these rows in that device's buffer
    offsets_P: jax.Array  # the place in this device's buffer of the rows from that device
    received_sizes_P: jax.Array  # the number of rows that come from there
    remote_starts_P: jax.Array  # the first of these, among that device's rows
    experts_R: jax.Array  # the local expert of each row in this device's buffer


def plan_exchange(loads_PE: jax.Array, room: int) -> ExchangePlan:
    """Plans a ragged exchange from the number of rows that each device has for each expert.

    A buffer has room for `room` rows. The rows that do not fit, from the last devices, are not
    sent.
    """
    devices = loads_PE.shape[0]
    wanted_PP = jnp.sum(loads_PE.reshape(devices, devices, -1), axis=-1, dtype=jnp.int32)
    starts_PP = jnp.cumsum(wanted_PP, axis=1, dtype=jnp.int32) - wanted_PP
    offsets_PP = jnp.cumsum(wanted_PP, axis=0, dtype=jnp.int32) - wanted_PP
    offsets_PP = jnp.minimum(offsets_PP, room)
    return ExchangePlan(starts_PP, offsets_PP, jnp.minimum(wanted_PP, room - offsets_PP))


def received_experts(loads_PE: jax.Array, device: jax.Array, room: int) -> jax.Array:
    """Returns the local expert of each row in a device's buffer, int32 [room].

    The rows are sorted by sender, then by expert. The empty rest of the buffer has E/P, which is no
    local expert.
    """
    num_own = loads_PE.shape[1] // loads_PE.shape[0]
    own_loads = jax.lax.dynamic_slice_in_dim(loads_PE, device * num_own, num_own, axis=1)
    # A segment is the rows of one sender for one expert.
    segment_ends = jnp.cumsum(own_loads.reshape(-1), dtype=jnp.int32)
    every_row = jnp.arange(room, dtype=jnp.int32)
    segment_R = jnp.searchsorted(segment_ends, every_row, side="right")
    return jnp.where(segment_R < own_loads.size, segment_R % num_own, num_own)


def prepare_ragged(loads_E: jax.Array, room: int) -> RaggedExchange:
    """Shares each device's loads with the whole group, and plans the exchange from them."""
    device = jax.lax.axis_index("expert")
    loads_PE = _name(jax.lax.all_gather(loads_E, "expert"))
    plan = plan_exchange(loads_PE, room)
    return RaggedExchange(
        starts_P=plan.starts_PP[device],
        sizes_P=plan.sizes_PP[device],
        remote_offsets_P=plan.offsets_PP[device],
        offsets_P=plan.offsets_PP[:, device],
        received_sizes_P=plan.sizes_PP[:, device],
        remote_starts_P=plan.starts_PP[:, device],
        experts_R=received_experts(loads_PE, device, room),
    )


def send_ragged(rows_RD: jax.Array, exchange: RaggedExchange) -> jax.Array:
    """Sends rows, sorted by expert, to the experts' devices; returns this device's buffer."""
    room = exchange.experts_R.shape[0]
    received_RD = jax.lax.ragged_all_to_all(
        rows_RD,
        jnp.zeros((room, rows_RD.shape[1]), rows_RD.dtype),
        exchange.starts_P,
        exchange.sizes_P,
        exchange.remote_offsets_P,
        exchange.received_sizes_P,
        axis_name="expert",
    )
    return _name(received_RD)


def return_ragged(buffer_RD: jax.Array, exchange: RaggedExchange, num_rows: int) -> jax.Array:
    """Sends the rows of a buffer back to where `send_ragged` had them, [num_rows, D].

    A row that was not sent for lack of room comes back as zeros.
    """
    returned_RD = jax.lax.ragged_all_to_all(
        buffer_RD,
        jnp.zeros((num_rows, buffer_RD.shape[1]), buffer_RD.dtype),
        exchange.offsets_P,
        exchange.received_sizes_P,
        exchange.remote_starts_P,
        exchange.sizes_P,
        axis_name="expert",
    )
    return _name(returned_RD)


@jax.custom_vjp
def send_numbers(values_I: jax.Array, exchange: RaggedExchange) -> jax.Array:
    """Sends a number for each row to the place of the row in its receiver's buffer, [room].

    Empty places get 0. Every device gathers the numbers of all, and takes its own. A ragged
    exchange sends 128 numbers for each one on TPUs. The gradient goes back in the same way.
    """
    all_PI = _name(jax.lax.all_gather(values_I, "expert"))
    row_R = jnp.arange(exchange.experts_R.shape[0], dtype=jnp.int32)
    ends_P = exchange.offsets_P + exchange.received_sizes_P
    sender_R = jnp.searchsorted(ends_P, row_R, side="right")
    index_R = exchange.remote_starts_P[sender_R] + row_R - exchange.offsets_P[sender_R]
    return all_PI.at[sender_R, index_R].get(mode="fill", fill_value=0)


def _send_numbers_forward(
    values_I: jax.Array, exchange: RaggedExchange
) -> tuple[jax.Array, tuple[RaggedExchange, jax.Array]]:
    # The empty array carries the number of rows in its shape.
    return send_numbers(values_I, exchange), (exchange, jnp.zeros((*values_I.shape, 0)))


def _send_numbers_backward(
    residuals: tuple[RaggedExchange, jax.Array], grad_R: jax.Array
) -> tuple[jax.Array, None]:
    exchange, like_I = residuals
    all_PR = jax.lax.all_gather(grad_R, "expert")
    row_I = jnp.arange(like_I.shape[0], dtype=jnp.int32)
    receiver_I, place_I = _receivers(exchange, row_I)
    index_I = exchange.remote_offsets_P[receiver_I] + place_I
    grads_I = all_PR.at[receiver_I, index_I].get(mode="fill", fill_value=0)
    return jnp.where(place_I < exchange.sizes_P[receiver_I], grads_I, 0), None


send_numbers.defvjp(_send_numbers_forward, _send_numbers_backward)


def _receivers(exchange: RaggedExchange, row_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the receiver of each of this device's rows, and its place among those sent there."""
    receiver_R = jnp.searchsorted(exchange.starts_P, row_R, side="right") - 1
    return receiver_R, row_R - exchange.starts_P[receiver_R]


def unsent_rows(exchange: RaggedExchange, loads_E: jax.Array, num_rows: int) -> jax.Array:
    """Returns for each of this device's rows whether it was not sent for lack of room."""
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    receiver_R, place_R = _receivers(exchange, row_R)
    return (place_R >= exchange.sizes_P[receiver_R]) & (row_R < jnp.sum(loads_E))
