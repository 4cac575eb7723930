"""The collectives of sparse layers: weights gathered over fsdp, rows exchanged over the expert
axis. Everything here is inside shard_map.

Outside of it, and where the mesh lacks an axis, its size is 1 and nothing is sent. Device p of P
holds experts p E/P to (p + 1) E/P - 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.parallel.mesh import axis_size

# (rows [N, D], their experts [N, A], their weights [N, A]) -> the weighted sums of what a device's
# own experts make of them, [N, D], and how many assignments of each row found no room there, [N],
# or None where there is always room.
RunExperts = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


def gather_weight(w: jax.Array, dtype: jnp.dtype, dim: int) -> jax.Array:
    """The weight in `dtype`, whole along the dimension that fsdp splits."""
    w = w.astype(dtype)
    return jax.lax.all_gather(w, "fsdp", axis=dim, tiled=True) if axis_size("fsdp") > 1 else w


def scatter_gradient(g: jax.Array, dim: int) -> jax.Array:
    """The sum over fsdp of a whole weight's gradients, split as the weight is."""
    return (
        jax.lax.psum_scatter(g, "fsdp", scatter_dimension=dim, tiled=True)
        if axis_size("fsdp") > 1
        else g
    )


def sum_over_tensor(y: jax.Array) -> jax.Array:
    """Adds up what each device's part of the experts' feed-forward width contributes."""
    return jax.lax.psum(y, "tensor") if axis_size("tensor") > 1 else y


def all_gather_exchange(
    x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array, num_experts: int, run: RunExperts
) -> tuple[jax.Array, jax.Array | None]:
    """Every device sees all tokens of its expert group and runs its own experts; the sums return to
    each token's device.
    """
    gather = lambda x: jax.lax.all_gather(x, "expert", tiled=True)
    size = num_experts // axis_size("expert")
    local_NA = gather(experts_NA) - jax.lax.axis_index("expert") * size
    local_NA = jnp.where((local_NA >= 0) & (local_NA < size), local_NA, size)
    outputs = run(gather(x_ND), local_NA, gather(weights_NA))
    return jax.tree.map(lambda x: jax.lax.psum_scatter(x, "expert", tiled=True), outputs)


def all_to_all(rows_ECD: jax.Array) -> jax.Array:
    """Rows for all experts from this device, to rows for this device's experts from all: [E, C, D]
    to [E/P, P C, D].
    """
    return jax.lax.all_to_all(rows_ECD, "expert", split_axis=0, concat_axis=1, tiled=True)


def all_to_all_back(rows_ECD: jax.Array) -> jax.Array:
    """The inverse of `all_to_all`."""
    return jax.lax.all_to_all(rows_ECD, "expert", split_axis=1, concat_axis=0, tiled=True)


def ragged_exchange(
    rows_RD: jax.Array, loads_E: jax.Array, room: int, run: RunExperts
) -> tuple[jax.Array, jax.Array]:
    """Sends rows, sorted by expert, to the experts' devices and brings back what those make of
    them.

    A device receives at most `room` rows. What comes after those, from the last devices first, is
    dropped: its rows come back as zeros. Returns [R, D], and for each row whether it was dropped.
    """
    me = jax.lax.axis_index("expert")
    loads_PE = jax.lax.all_gather(loads_E, "expert")
    plan = plan_exchange(loads_PE, room)
    starts_P, offsets_P, sizes_P = (x[me] for x in (plan.starts_PP, plan.offsets_PP, plan.sizes_PP))
    buffer = jnp.zeros((room, rows_RD.shape[1]), rows_RD.dtype)
    received = jax.lax.ragged_all_to_all(
        rows_RD, buffer, starts_P, sizes_P, offsets_P, plan.sizes_PP[:, me], axis_name="expert"
    )
    experts = received_experts(loads_PE, me, room)
    made, _ = run(received, experts[:, None], jnp.ones((room, 1), jnp.float32))  # drops nothing
    back = jax.lax.ragged_all_to_all(
        made,
        jnp.zeros_like(rows_RD),
        plan.offsets_PP[:, me],
        plan.sizes_PP[:, me],
        plan.starts_PP[:, me],
        sizes_P,
        axis_name="expert",
    )
    row = jnp.arange(rows_RD.shape[0], dtype=jnp.int32)
    to = jnp.searchsorted(starts_P, row, side="right") - 1
    return back, (row - starts_P[to] >= sizes_P[to]) & (row < jnp.sum(loads_E))


class ExchangePlan(NamedTuple):
    """Who sends how many rows from where to where: int32 matrices [from, to]."""

    starts_PP: jax.Array  # of the rows for each device, among the sender's
    offsets_PP: jax.Array  # of a sender's rows in the receiver's buffer
    sizes_PP: jax.Array  # rows sent


def plan_exchange(loads_PE: jax.Array, room: int) -> ExchangePlan:
    """The plan of a ragged exchange, from every device's rows per expert. A buffer takes the first
    device's rows, then the second's.
    """
    devices = loads_PE.shape[0]
    wanted_PP = jnp.sum(loads_PE.reshape(devices, devices, -1), axis=-1, dtype=jnp.int32)
    offsets_PP, starts_PP = (
        jnp.cumsum(wanted_PP, axis=axis, dtype=jnp.int32) - wanted_PP for axis in (0, 1)
    )
    offsets_PP = jnp.minimum(offsets_PP, room)
    return ExchangePlan(starts_PP, offsets_PP, jnp.minimum(wanted_PP, room - offsets_PP))


def received_experts(loads_PE: jax.Array, me: jax.Array, room: int) -> jax.Array:
    """The local expert of each received row, which come by device, then by expert; E/P for the
    empty rest of the buffer.
    """
    size = loads_PE.shape[1] // loads_PE.shape[0]
    mine = jax.lax.dynamic_slice_in_dim(loads_PE, me * size, size, axis=1)
    segment = jnp.searchsorted(
        jnp.cumsum(mine.reshape(-1), dtype=jnp.int32),
        jnp.arange(room, dtype=jnp.int32),
        side="right",
    )
    return jnp.where(segment < mine.size, segment % size, size)
