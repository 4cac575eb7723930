"""Sends tokens to their experts and adds up what the experts return.

The data passes through these functions, inside jax.shard_map, on one device's tokens:

    MoE                        routes the tokens (experts.py)
      run_experts              makes one list of N tokens, and chooses a strategy
        a strategy             all_gather, all_to_all, ragged_all_to_all, or on one device dense,
          |                    capacity, dropless
          | arrange            gives each assignment a slot among its expert's rows (arrangement.py)
          | copy_to_slots      copies each slot's token
          | expert_parallel    sends rows to the devices of their experts (moe.parallel.collectives)
          | weights(rows)      applies the experts
          | expert_parallel    sends rows back
          | combine            adds up each token's slots, times their weights

Every strategy has one signature: `(x_ND, experts_NA, weights_NA, weights) -> ExpertOutput`. An
expert number that is no expert (E, or any other outside [0, E)) gets nothing and adds nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.config import ConfigError, MoEConfig
from moe.kernels.grouped_matmul import (
    Choice,
    Inputs,
    Name,
    Shapes,
    choose,
    grouped_swiglu,
    grouped_swiglu_backward,
    why_not,
    with_blocks,
)
from moe.kernels.settings import check_axes
from moe.model.arrangement import (
    Arrangement,
    add_rows,
    arrange,
    arrange_equally,
    check_assignments,
    combine,
    copy_to_slots,
    expert_loads,
    gather_from_slots,
    gather_into_slots,
)
from moe.model.layers import swiglu
from moe.parallel.collectives import expert as expert_parallel
from moe.parallel.mesh import axis_size, chip

WIDTH_DIMS = (1, 1, 2)  # the dimensions of gate, up and down that fsdp splits


class Weights(NamedTuple):
    """Holds this device's shards of the experts' weights: `(silu(x gate) * x up) down`."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    @property
    def num_experts(self) -> int:
        """Returns the number of experts on this device."""
        return self.gate_EDF.shape[0]

    def __call__(self, rows_ECD: jax.Array) -> jax.Array:
        """Applies each expert to its C rows.

        If the tensor axis splits F, the result is this device's part of a sum.
        """
        gate_dim, up_dim, down_dim = self.split_dims(rows_ECD.shape[-1])
        gate_ECF = expert_parallel.expert_matmul(rows_ECD, self.gate_EDF, gate_dim)
        up_ECF = expert_parallel.expert_matmul(rows_ECD, self.up_EDF, up_dim)
        return expert_parallel.expert_matmul(swiglu(gate_ECF, up_ECF), self.down_EFD, down_dim)

    def split_dims(self, width: int) -> tuple[int | None, ...]:
        """Returns the dimension of each weight that fsdp splits, if it splits a width of D."""
        is_split = self.gate_EDF.shape[1] < width
        return WIDTH_DIMS if is_split else (None, None, None)

    def gather(self, dtype: jnp.dtype, width: int) -> "Weights":
        """Returns the weights in `dtype`, whole along the dimensions that fsdp splits."""
        pairs = zip(self, self.split_dims(width), strict=True)
        return Weights(*(expert_parallel.gather_weight(w, dtype, dim) for w, dim in pairs))


class ExpertOutput(NamedTuple):
    """Holds what a strategy returns for N tokens."""

    y_ND: jax.Array  # each token's weighted sum of its experts' outputs
    # The number of each token's assignments that found no room, float32. It is None if the strategy
    # always has room, so that nothing is sent or summed for it.
    dropped_N: jax.Array | None = None


Strategy = Callable[[jax.Array, jax.Array, jax.Array, Weights], ExpertOutput]


def run_experts(
    config: MoEConfig,
    capacity: int,
    x_BTD: jax.Array,
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    *weights: jax.Array,
    splits_time: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Applies the experts of all devices of the group to one device's tokens.

    Returns each token's sum, [B, T, D], and its number of dropped assignments, [B, T]. With
    `splits_time` the sums are only those of this device's part of T (`parallel.sequence`).
    `capacity` is the most assignments that an expert takes of one packed row, the last entry of
    `routing.capacity_table`. `weights` are this device's shards of gate, up and down.
    """
    batch, length, dim = x_BTD.shape
    if not batch * length:
        sums_BTD = expert_parallel.sum_over_tensor(x_BTD, splits_time)
        return sums_BTD, jnp.zeros((batch, length), jnp.float32)
    # If the context axis splits rows, `length` is that of a part, and an expert cannot take more
    # tokens than the part has. An exchange needs at least one slot.
    slots_per_row = max(1, min(capacity, length))
    run = choose_strategy(config, batch * slots_per_row)
    x_ND, experts_NA, weights_NA = (
        x.reshape(batch * length, -1) for x in (x_BTD, experts_BTA, weights_BTA)
    )
    y_ND, dropped_N = run(x_ND, experts_NA, weights_NA, Weights(*weights))
    if dropped_N is None:
        dropped_N = jnp.zeros(batch * length, jnp.float32)
    y_BTD = expert_parallel.sum_over_tensor(y_ND.reshape(batch, length, dim), splits_time)
    return y_BTD, dropped_N.reshape(batch, length)


def choose_strategy(config: MoEConfig, capacity: int) -> Strategy:
    """Returns the strategy of a config on the devices of this shard_map.

    `capacity` is the number of one device's rows that an expert has room for.
    """
    devices = axis_size("expert")
    if devices > 1 and config.exchange == "all_to_all":
        return functools.partial(all_to_all, capacity=capacity)
    if devices > 1 and config.exchange == "ragged_all_to_all":
        return functools.partial(
            ragged_all_to_all,
            receive_factor=config.receive_factor,
            implementation=config.implementation,
        )
    strategies: dict[str, Strategy] = {
        "dense": dense,
        "capacity": functools.partial(with_capacity, capacity=devices * capacity),
        "dropless": functools.partial(dropless, implementation=config.implementation),
    }
    strategy = strategies[config.dispatch]
    return functools.partial(all_gather, strategy=strategy) if devices > 1 else strategy


# Strategies on one device


def dense(
    x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array, weights: Weights
) -> ExpertOutput:
    """Sends every token to every expert, and gives an expert that it did not choose the weight 0.

    This takes E / A times the work of the others. Tests compare the other strategies with it.
    """
    check_assignments(x_ND, experts_NA, weights_NA)
    num_experts = weights.num_experts
    # Tokens pass through float32, so that the backward pass adds up their gradients in float32.
    rows_END = jnp.broadcast_to(x_ND.astype(jnp.float32), (num_experts, *x_ND.shape))
    outputs_END = weights(rows_END.astype(x_ND.dtype))
    chosen_NAE = jax.nn.one_hot(experts_NA, num_experts, dtype=bool)
    weights_NAE = jnp.where(chosen_NAE, weights_NA[..., None], 0.0)
    weights_NE = jnp.sum(weights_NAE, axis=1, dtype=jnp.float32)
    y_ND = jnp.einsum(
        "end,ne->nd", outputs_END.astype(jnp.float32), weights_NE, precision="highest"
    )
    return ExpertOutput(y_ND.astype(outputs_END.dtype))


def with_capacity(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    *,
    capacity: int,
) -> ExpertOutput:
    """Gives each expert `capacity` rows, and drops and counts the assignments that do not fit.

    `routing.limit_to_capacity` drops in the papers' order, and what it leaves always fits.
    """
    check_assignments(x_ND, experts_NA, weights_NA)
    arrangement = arrange_equally(experts_NA, weights.num_experts, capacity)
    rows_ECD = _split(copy_to_slots(x_ND, arrangement), weights.num_experts)
    y_ND = combine(_join(weights(rows_ECD)), weights_NA, arrangement)
    return ExpertOutput(y_ND, _count_dropped(experts_NA, weights.num_experts, arrangement))


def dropless(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    *,
    block_rows: int = 0,
    implementation: Literal["auto"] | Name = "auto",
) -> ExpertOutput:
    """Gives each expert as many rows as chose it, and drops nothing.

    Rows are sorted by expert. Each expert's rows are padded to blocks of `block_rows` rows, or of a
    number that suits the kernel and the load. `implementation` names the kernel; "auto" takes the
    fastest one on the mesh's chip.
    """
    check_assignments(x_ND, experts_NA, weights_NA)
    check_axes("x_ND", x_ND)
    if not experts_NA.size:
        return ExpertOutput(jnp.zeros_like(x_ND))
    num_assignments, num_experts = experts_NA.size, weights.num_experts
    shapes = Shapes(num_assignments, num_experts, x_ND.dtype.name)
    choice = choose_kernel(implementation, shapes)
    block_rows = block_rows or choice.block_rows
    # Each expert with an assignment may need up to block_rows - 1 rows of padding.
    most_rows = num_assignments + min(num_experts, num_assignments) * (block_rows - 1)
    num_slots = -(-most_rows // block_rows) * block_rows
    blocks_E = -(-expert_loads(experts_NA, num_experts) // block_rows)
    room_E = blocks_E * block_rows
    ends_E = jnp.cumsum(room_E, dtype=jnp.int32)
    arrangement = arrange(experts_NA, ends_E - room_E, num_slots)
    first_slots_G = jnp.arange(0, num_slots, block_rows, dtype=jnp.int32)
    experts_G = jnp.searchsorted(ends_E, first_slots_G, side="right").astype(jnp.int32)
    blocks = Blocks(arrangement, experts_G)
    return ExpertOutput(_grouped_experts(choice.name, x_ND, weights_NA, weights, blocks))


def choose_kernel(implementation: Literal["auto"] | Name, shapes: Shapes) -> Choice:
    """Returns the kernel that a config asks for, on the chip of the mesh in use.

    Raises ConfigError if that kernel cannot compute the call.
    """
    kind = chip(jax.sharding.get_abstract_mesh())
    if implementation == "auto":
        return choose(kind, shapes)
    if reason := why_not(implementation, kind, shapes):
        raise ConfigError(
            f"model.moe.implementation={implementation!r} cannot be used, because {reason}: "
            "set model.moe.implementation to 'auto'"
        )
    return with_blocks(implementation, shapes)


def _split(rows_ID: jax.Array, num_experts: int) -> jax.Array:
    """Views the rows of experts with equally many slots as [E, C, D]."""
    return rows_ID.reshape(num_experts, -1, rows_ID.shape[1])


def _join(rows_ECD: jax.Array) -> jax.Array:
    """Views [E, C, D] as rows again."""
    return rows_ECD.reshape(-1, rows_ECD.shape[2])


def _count_dropped(experts_NA: jax.Array, num_experts: int, arrangement: Arrangement) -> jax.Array:
    """Returns the number of each token's assignments to experts that got no slot, float32."""
    assigned_NA = (experts_NA >= 0) & (experts_NA < num_experts)
    has_no_slot_NA = arrangement.slots_NA == arrangement.assignments_I.size
    return jnp.sum(assigned_NA & has_no_slot_NA, axis=1, dtype=jnp.float32)


# Strategies over the devices of an expert group


def all_gather(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    *,
    strategy: Strategy,
) -> ExpertOutput:
    """Shows all tokens of the group to every device, which applies its own experts to them."""
    experts_NA = expert_parallel.own_experts(
        expert_parallel.gather_tokens(experts_NA), weights.num_experts
    )
    x_ND, weights_NA = map(expert_parallel.gather_tokens, (x_ND, weights_NA))
    output = strategy(x_ND, experts_NA, weights_NA, weights)
    return jax.tree.map(expert_parallel.scatter_sums, output)


def all_to_all(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    *,
    capacity: int,
) -> ExpertOutput:
    """Sends each expert `capacity` of this device's rows, and drops what does not fit."""
    num_experts = weights.num_experts * axis_size("expert")
    arrangement = arrange_equally(experts_NA, num_experts, capacity)
    rows_ECD = _split(copy_to_slots(x_ND, arrangement), num_experts)
    weights_EC1 = _split(gather_into_slots(weights_NA, arrangement)[:, None], num_experts)
    outputs_ECD = weights(expert_parallel.all_to_all(rows_ECD))
    # An expert's device applies the rows' weights. If it left that to their senders, these would
    # need the outputs for the gradient of the weights, and remat would send all of them again.
    weighted_ECD = outputs_ECD.astype(jnp.float32) * expert_parallel.all_to_all(weights_EC1)
    returned_ECD = expert_parallel.all_to_all_back(weighted_ECD.astype(outputs_ECD.dtype))
    y_ND = add_rows(_join(returned_ECD), arrangement)
    return ExpertOutput(y_ND, _count_dropped(experts_NA, num_experts, arrangement))


def ragged_all_to_all(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    *,
    receive_factor: float,
    implementation: Literal["auto"] | Name = "auto",
) -> ExpertOutput:
    """Sends only the assigned rows, and drops what exceeds a device's room.

    A device has room for `receive_factor` times the rows that it would get under an even load.
    """
    num_experts = weights.num_experts * axis_size("expert")
    loads_E = expert_loads(experts_NA, num_experts)
    first_slots_E = jnp.cumsum(loads_E, dtype=jnp.int32) - loads_E
    arrangement = arrange(experts_NA, first_slots_E, experts_NA.size)
    room = math.ceil(experts_NA.size * receive_factor)
    exchange = expert_parallel.prepare_ragged(loads_E, room)
    received_RD = expert_parallel.send_ragged(copy_to_slots(x_ND, arrangement), exchange)
    # An expert's device applies the rows' weights, for the reason that `all_to_all` gives.
    weights_I = gather_into_slots(weights_NA, arrangement)
    weights_R1 = expert_parallel.send_numbers(weights_I, exchange)[:, None]
    experts_R1 = exchange.experts_R[:, None]
    output = dropless(received_RD, experts_R1, weights_R1, weights, implementation=implementation)
    returned_ID = expert_parallel.return_ragged(output.y_ND, exchange, experts_NA.size)
    unsent_I = expert_parallel.unsent_rows(exchange, loads_E, experts_NA.size)
    unsent_NA = gather_from_slots(unsent_I, arrangement)
    return ExpertOutput(
        add_rows(returned_ID, arrangement), jnp.sum(unsent_NA, axis=1, dtype=jnp.float32)
    )


# The experts on rows in blocks


class Blocks(NamedTuple):
    """Arranges rows in blocks of equally many rows, which all belong to the block's expert."""

    arrangement: Arrangement
    experts_G: jax.Array  # each block's expert, ascending; E for a block that no expert uses


class GroupedResiduals(NamedTuple):
    """Holds what the backward pass of `_grouped_experts` needs of its forward pass."""

    x_ND: jax.Array
    weights_NA: jax.Array
    weights: Weights
    blocks: Blocks
    gate_up: jax.Array  # what enters the experts' activation


def _apply_grouped(
    implementation: Name, x_ND: jax.Array, weights_NA: jax.Array, weights: Weights, blocks: Blocks
) -> jax.Array:
    """Returns each token's weighted sum. The kernel gathers the rows from `x_ND` as it goes."""
    return _grouped_experts_forward(implementation, x_ND, weights_NA, weights, blocks)[0]


def _kernel_inputs(x_ND: jax.Array, weights: Weights, blocks: Blocks) -> Inputs:
    """Gathers the weights over fsdp, and lists what the kernel takes."""
    x_ND, weights = jax.tree.map(jnp.asarray, (x_ND, weights))  # which may be NumPy's
    whole = weights.gather(x_ND.dtype, x_ND.shape[-1])
    return Inputs(x_ND, *whole, blocks.arrangement.tokens_I, blocks.experts_G)


def _grouped_experts_forward(
    implementation: Name, x_ND: jax.Array, weights_NA: jax.Array, weights: Weights, blocks: Blocks
) -> tuple[jax.Array, GroupedResiduals]:
    outputs = grouped_swiglu(_kernel_inputs(x_ND, weights, blocks), implementation)
    y_ND = combine(outputs.rows_ID, weights_NA, blocks.arrangement)
    # A policy of jax.checkpoint cannot keep the results of a loop, unless they have a name.
    gate_up = checkpoint_name(outputs.gate_up, "gate and up")
    return y_ND, GroupedResiduals(x_ND, weights_NA, weights, blocks, gate_up)


def _grouped_experts_backward(
    implementation: Name, residuals: GroupedResiduals, g_ND: jax.Array
) -> tuple[jax.Array, jax.Array, Weights, None]:
    x_ND, weights_NA, weights, blocks, gate_up = residuals
    arrangement = blocks.arrangement
    # Weights are gathered again, since storing gathered ones between the passes costs memory.
    inputs = _kernel_inputs(x_ND, weights, blocks)
    weights_I = gather_into_slots(weights_NA, arrangement)
    grads = grouped_swiglu_backward(inputs, gate_up, weights_I, g_ND, implementation)
    whole_grads = (grads.w_gate_EDF, grads.w_up_EDF, grads.w_down_EFD)
    split_dims = weights.split_dims(x_ND.shape[-1])
    parts = map(expert_parallel.scatter_gradient, whole_grads, split_dims)
    grad_weights = Weights(*(part.astype(w.dtype) for part, w in zip(parts, weights, strict=True)))
    grad_x = add_rows(grads.rows_ID, arrangement)
    grad_weights_NA = gather_from_slots(grads.weights_I, arrangement).astype(weights_NA.dtype)
    return grad_x, grad_weights_NA, grad_weights, None


_grouped_experts = jax.custom_vjp(_apply_grouped, nondiff_argnums=(0,))
_grouped_experts.defvjp(_grouped_experts_forward, _grouped_experts_backward)
