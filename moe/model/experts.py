"""The sparse feed-forward part: a router, and experts that each see only the rows dispatched to
them.

A `Dispatch` is two pure functions: `send` copies tokens to rows in the experts' order, `receive`
adds up what the experts made of them. Each is the other's transpose, and both are gathers, forward
and backward. `dropless` does the whole at once, and sends no rows: its kernel gathers them where it
needs them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.config import ConfigError, MoEConfig
from moe.kernels.grouped_matmul import (
    Inputs,
    Name,
    Shapes,
    choose,
    grouped_swiglu,
    grouped_swiglu_backward,
)
from moe.kernels.settings import check_axes
from moe.model import routing
from moe.model.layers import FeedForward, check_static, einsum, swiglu
from moe.model.tokens import TokenInfo
from moe.parallel import expert as expert_parallel
from moe.parallel.mesh import axis_size, chip, constrain, on_auto_axes, per_shard
from moe.parameters import parameter


class Dispatch(NamedTuple):
    """Rows in the experts' order, of N tokens."""

    send: Callable[[jax.Array], jax.Array]  # [N, D] to rows [E, C, D]
    receive: Callable[[jax.Array], jax.Array]  # rows to [N, D]: each token's weighted sum
    # Each token's assignments that found no room, float32; None where there is always room.
    dropped_N: jax.Array | None = None


class Arrangement(NamedTuple):
    """A one-to-one map between some of R assignments and some of I slots for rows."""

    slots_NA: jax.Array  # the slot of each assignment; I where it has none
    sources_I: jax.Array  # the assignment (n A + a) of each slot; R where it has none

    @property
    def tokens_I(self) -> jax.Array:
        """The token of each slot's assignment; N where it has none."""
        return self.sources_I // self.slots_NA.shape[1]


def dense_dispatch(experts_NA: jax.Array, weights_NA: jax.Array, num_experts: int) -> Dispatch:
    """Every token to every expert, weighted by zero where it did not choose it: the oracle, E / A
    times the work.
    """
    chosen_NAE = jax.nn.one_hot(experts_NA, num_experts, dtype=bool)
    weights_NE = jnp.sum(jnp.where(chosen_NAE, weights_NA[..., None], 0.0), axis=1)

    def receive(rows_END: jax.Array) -> jax.Array:
        y_ND = jnp.einsum(
            "end,ne->nd", rows_END.astype(jnp.float32), weights_NE, precision="highest"
        )
        return y_ND.astype(rows_END.dtype)

    def send(x_ND: jax.Array) -> jax.Array:
        # By way of float32, in which the backward pass then adds up the experts' gradients.
        return jnp.broadcast_to(x_ND.astype(jnp.float32), (num_experts, *x_ND.shape)).astype(
            x_ND.dtype
        )

    return Dispatch(send, receive)


def capacity_dispatch(
    experts_NA: jax.Array, weights_NA: jax.Array, num_experts: int, capacity: int
) -> Dispatch:
    """Gives each expert `capacity` rows; what comes after them is dropped and counted.

    `routing.limit_to_capacity` drops in the papers' order, and leaves no more than have room.
    """
    starts_E, size = jnp.arange(num_experts, dtype=jnp.int32) * capacity, num_experts * capacity
    arranged = _arrange(experts_NA, starts_E, size)
    assigned_NA = (experts_NA >= 0) & (experts_NA < num_experts)
    return Dispatch(
        lambda x_ND: _send(x_ND, arranged).reshape(num_experts, capacity, x_ND.shape[1]),
        lambda rows_ECD: _receive(rows_ECD.reshape(size, rows_ECD.shape[2]), weights_NA, arranged),
        jnp.sum(assigned_NA & (arranged.slots_NA == size), axis=1, dtype=jnp.float32),
    )


def _loads(experts_NA: jax.Array, num_experts: int) -> jax.Array:
    """Assignments of each expert, [E]."""
    return jnp.sum(
        jax.nn.one_hot(experts_NA, num_experts, dtype=bool), axis=(0, 1), dtype=jnp.int32
    )


def _arrange(experts_NA: jax.Array, starts_E: jax.Array, size: int) -> Arrangement:
    """Puts each expert's assignments, in order, into the slots from its start to the next.

    Those that find no slot there have none: they never take another expert's.
    """
    experts_R, num_experts = experts_NA.reshape(-1).astype(jnp.int32), starts_E.shape[0]
    experts_R = jnp.where((experts_R >= 0) & (experts_R < num_experts), experts_R, num_experts)
    index = jnp.arange(experts_R.size, dtype=jnp.int32)
    sorted_experts, order = jax.lax.sort((experts_R, index), num_keys=1)
    firsts = jnp.searchsorted(sorted_experts, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(
        jnp.int32
    )
    bounds = jnp.append(starts_E, jnp.array([size, size], starts_E.dtype))
    slots = bounds[sorted_experts] + index - firsts[sorted_experts]
    slots = jnp.where(slots < bounds[sorted_experts + 1], slots, size)
    sources_I = jnp.full(size, experts_R.size, jnp.int32).at[slots].set(order, mode="drop")
    return Arrangement(
        jnp.zeros_like(index).at[order].set(slots).reshape(experts_NA.shape), sources_I
    )


@jax.custom_vjp
def _send(x_ND: jax.Array, arranged: Arrangement) -> jax.Array:
    """The token of each slot's assignment, [I, D]; zeros where a slot has none."""
    return x_ND.at[arranged.tokens_I].get(mode="fill", fill_value=0)


def _send_backward(arranged: Arrangement, g_ID: jax.Array) -> tuple[jax.Array, None]:
    return _add_up(g_ID, jnp.ones(arranged.slots_NA.shape, jnp.float32), arranged), None


_send.defvjp(lambda x, arranged: (_send(x, arranged), arranged), _send_backward)


@jax.custom_vjp
def _receive(rows_ID: jax.Array, weights_NA: jax.Array, arranged: Arrangement) -> jax.Array:
    """Each token's rows times their weights, added up in float32: [N, D]."""
    return _add_up(rows_ID, weights_NA, arranged)


def _receive_backward(
    residuals: tuple[Any, ...], g_ND: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_ID, weights_NA, arranged = residuals
    g_ID = _send(g_ND, arranged)
    weights_I1 = _of_slots(weights_NA, arranged)[:, None]
    gradient_rows = (g_ID.astype(weights_I1.dtype) * weights_I1).astype(rows_ID.dtype)
    gradient_weights_I = jnp.sum(rows_ID.astype(jnp.float32) * g_ID.astype(jnp.float32), axis=1)
    return gradient_rows, _of_assignments(gradient_weights_I, arranged), None


_receive.defvjp(
    lambda rows, weights, arranged: (_receive(rows, weights, arranged), (rows, weights, arranged)),
    _receive_backward,
)


def _add_up(rows_ID: jax.Array, weights_NA: jax.Array, arranged: Arrangement) -> jax.Array:
    """Each token's rows times their weights, added up in float32: [N, D].

    An assignment without a slot adds zeros, not 0 times another token's row, which may be NaN.
    """
    # A gathers, which XLA fuses with the sum; one gather of all [N, A, D] takes four times as long
    # on a CPU.
    rows_of_choices = (
        rows_ID.at[slots_N].get(mode="fill", fill_value=0).astype(weights_NA.dtype)
        for slots_N in arranged.slots_NA.T
    )
    return sum(
        rows * weights_N[:, None]
        for rows, weights_N in zip(rows_of_choices, weights_NA.T, strict=True)
    ).astype(rows_ID.dtype)


def _of_slots(values_NA: jax.Array, arranged: Arrangement) -> jax.Array:
    """The value of each slot's assignment, [I]; 0 where a slot has none."""
    return values_NA.reshape(-1).at[arranged.sources_I].get(mode="fill", fill_value=0)


def _of_assignments(values_I: jax.Array, arranged: Arrangement) -> jax.Array:
    """The value of each assignment's slot, [N, A]; 0 where it has none."""
    return values_I.at[arranged.slots_NA].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def expert_matmul(rows_ECK: jax.Array, w_EKN: jax.Array, fsdp_dim: int) -> jax.Array:
    """Each expert's rows times its own weight, [E, C, N]: the door of the experts' matmuls on rows
    in equal numbers.

    The weight is this device's shard, split over fsdp along `fsdp_dim`: gathered in the rows'
    dtype, again in the backward pass, and its gradient is summed in float32.
    """
    return jnp.einsum(
        "eck,ekn->ecn", rows_ECK, expert_parallel.gather_weight(w_EKN, rows_ECK.dtype, fsdp_dim)
    )


def _expert_matmul_backward(
    fsdp_dim: int, residuals: tuple[jax.Array, jax.Array], g_ECN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_ECK, w_EKN = residuals
    gradient_rows = jnp.einsum(
        "ecn,ekn->eck", g_ECN, expert_parallel.gather_weight(w_EKN, rows_ECK.dtype, fsdp_dim)
    )
    gradient_w = jnp.einsum("eck,ecn->ekn", rows_ECK, g_ECN, preferred_element_type=jnp.float32)
    return gradient_rows, expert_parallel.scatter_gradient(gradient_w, fsdp_dim).astype(w_EKN.dtype)


expert_matmul.defvjp(
    lambda rows, w, fsdp_dim: (expert_matmul(rows, w, fsdp_dim), (rows, w)), _expert_matmul_backward
)


FSDP_DIMS = (1, 1, 2)  # of gate, up and down: the dimension that fsdp splits


class Weights(NamedTuple):
    """The experts' SwiGLU weights: `(silu(x gate) * x up) down`, each expert's own; this device's
    shards.
    """

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    def __call__(self, rows_ECD: jax.Array) -> jax.Array:
        """Each expert's output on its rows; over the tensor axis, this device's part of the sum."""
        gate_dim, up_dim, down_dim = FSDP_DIMS
        hidden = swiglu(
            expert_matmul(rows_ECD, self.gate_EDF, gate_dim),
            expert_matmul(rows_ECD, self.up_EDF, up_dim),
        )
        return expert_matmul(hidden, self.down_EFD, down_dim)

    def gather(self, dtype: jnp.dtype) -> list[jax.Array]:
        """The three in `dtype`, whole along the dimensions that fsdp splits."""
        return [
            expert_parallel.gather_weight(w, dtype, dim)
            for w, dim in zip(self, FSDP_DIMS, strict=True)
        ]


def dropless(
    x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array, weights: Weights, block: int = 0
) -> jax.Array:
    """Each token's weighted sum of its experts' outputs, [N, D]: as many rows as it takes, whoever
    chose what.

    Rows are sorted by expert, each expert's padded to blocks of `block` rows.
    """
    check_axes("x_ND", x_ND)
    if not experts_NA.size:
        return x_ND
    num_experts = weights.gate_EDF.shape[0]
    choice = choose(
        chip(jax.sharding.get_abstract_mesh()),
        Shapes(experts_NA.size, num_experts, x_ND.dtype.name),
    )
    block = block or choice.block_rows
    size = -(-(experts_NA.size + min(num_experts, experts_NA.size) * (block - 1)) // block) * block
    padded_E = -(-_loads(experts_NA, num_experts) // block) * block
    ends_E = jnp.cumsum(padded_E, dtype=jnp.int32)
    blocks_M = jnp.searchsorted(
        ends_E, jnp.arange(0, size, block, dtype=jnp.int32), side="right"
    ).astype(jnp.int32)
    return _dropless(
        choice.name,
        jnp.asarray(x_ND),
        weights_NA,
        weights,
        _arrange(experts_NA, ends_E - padded_E, size),
        blocks_M,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropless(
    implementation: Name,
    x_ND: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    arranged: Arrangement,
    blocks_M: jax.Array,
) -> jax.Array:
    return _dropless_forward(implementation, x_ND, weights_NA, weights, arranged, blocks_M)[0]


def _dropless_forward(
    implementation: Name,
    x_ND: jax.Array,
    weights_NA: jax.Array,
    weights: Weights,
    arranged: Arrangement,
    blocks_M: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    inputs = Inputs(x_ND, *weights.gather(x_ND.dtype), arranged.tokens_I, blocks_M)
    rows_ID, gate_up = grouped_swiglu(inputs, implementation)
    return _receive(rows_ID, weights_NA, arranged), (
        x_ND,
        weights_NA,
        weights,
        arranged,
        blocks_M,
        gate_up,
    )


def _dropless_backward(
    implementation: Name, residuals: tuple[Any, ...], g_ND: jax.Array
) -> tuple[jax.Array, jax.Array, Weights, None, None]:
    x_ND, weights_NA, weights, arranged, blocks_M, gate_up = residuals
    inputs = Inputs(x_ND, *weights.gather(x_ND.dtype), arranged.tokens_I, blocks_M)
    rows_ID, *gradients, gradient_weights_I = grouped_swiglu_backward(
        inputs, gate_up, _of_slots(weights_NA, arranged), g_ND, implementation
    )
    shards = [
        expert_parallel.scatter_gradient(g, dim)
        for g, dim in zip(gradients, FSDP_DIMS, strict=True)
    ]
    gradient_x = _add_up(rows_ID, jnp.ones_like(weights_NA), arranged)
    return (
        gradient_x,
        _of_assignments(gradient_weights_I, arranged),
        Weights(*(g.astype(w.dtype) for g, w in zip(shards, weights, strict=True))),
        None,
        None,
    )


_dropless.defvjp(_dropless_forward, _dropless_backward)


def run_experts(
    config: MoEConfig,
    capacity: int,
    x_BTD: jax.Array,
    experts_BTA: jax.Array,
    weights_BTA: jax.Array,
    *weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One device's tokens through the experts of all devices of its group: [B, T, D], and each
    token's dropped assignments, [B, T].

    `capacity` is the most assignments that an expert takes of one packed row
    (`routing.capacities`); `weights` are this device's shards of gate, up and down.
    """
    batch, length, dim = x_BTD.shape
    if not batch * length:
        return x_BTD, jnp.zeros((batch, length), jnp.float32)
    experts = Weights(*weights)
    x_ND, experts_NA, weights_NA = (
        x.reshape(batch * length, -1) for x in (x_BTD, experts_BTA, weights_BTA)
    )
    rows_per_expert = batch * max(1, min(capacity, length))  # nothing can be gathered from no rows

    def run(
        x_ND: jax.Array, experts_NA: jax.Array, weights_NA: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        if config.dispatch == "dropless":
            return dropless(x_ND, experts_NA, weights_NA, experts), None
        arguments = (experts_NA, weights_NA, experts.gate_EDF.shape[0])
        if config.dispatch == "dense":
            dispatch = dense_dispatch(*arguments)
        else:
            dispatch = capacity_dispatch(*arguments, rows_per_expert * axis_size("expert"))
        return dispatch.receive(experts(dispatch.send(x_ND))), dispatch.dropped_N

    if axis_size("expert") == 1:
        y_ND, dropped_N = run(x_ND, experts_NA, weights_NA)
    elif config.exchange == "all_gather":
        y_ND, dropped_N = expert_parallel.all_gather_exchange(
            x_ND, experts_NA, weights_NA, config.num_experts, run
        )
    elif config.exchange == "all_to_all":
        dispatch = capacity_dispatch(experts_NA, weights_NA, config.num_experts, rows_per_expert)
        rows_ECD = expert_parallel.all_to_all(dispatch.send(x_ND))
        y_ND, dropped_N = (
            dispatch.receive(expert_parallel.all_to_all_back(experts(rows_ECD))),
            dispatch.dropped_N,
        )
    else:
        y_ND, dropped_N = _run_ragged(config, x_ND, experts_NA, weights_NA, run)
    dropped_BT = (
        jnp.zeros((batch, length), jnp.float32)
        if dropped_N is None
        else dropped_N.reshape(batch, length)
    )
    return expert_parallel.sum_over_tensor(y_ND).reshape(batch, length, dim), dropped_BT


def _run_ragged(
    config: MoEConfig,
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    run: expert_parallel.RunExperts,
) -> tuple[jax.Array, jax.Array]:
    """The ragged exchange: each token's weighted sum, [N, D], and how many of its assignments found
    no room, [N].
    """
    loads_E = _loads(experts_NA, config.num_experts)
    arranged = _arrange(experts_NA, jnp.cumsum(loads_E, dtype=jnp.int32) - loads_E, experts_NA.size)
    room = math.ceil(experts_NA.size * config.receive_factor)
    rows_RD, lost_R = expert_parallel.ragged_exchange(_send(x_ND, arranged), loads_E, room, run)
    return _receive(rows_RD, weights_NA, arranged), jnp.sum(
        _of_assignments(lost_R, arranged), axis=1, dtype=jnp.float32
    )


def _output_specs(x_BTD: PartitionSpec) -> tuple[PartitionSpec, routing.Routing]:
    """Returns how `MoE` lays out its results on Explicit axes, from the layout of its input."""
    rows_BT = PartitionSpec(*x_BTD[:2])
    return x_BTD, routing.Routing(rows_BT, rows_BT, PartitionSpec(), rows_BT)


class MoE(nn.Module):
    """A sparse feed-forward part (Shazeer et al. 2017, eq. 1): the sum of the outputs of each
    token's experts, weighted by its router.

    `output_scale` shrinks the initial output, as a layer among many needs it.
    """

    config: MoEConfig
    output_scale: float = 1.0

    @on_auto_axes(_output_specs)
    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo | None = None
    ) -> tuple[jax.Array, routing.Routing]:
        """Returns [B, T, D], and the routing with its sums for losses and statistics.

        Without `tokens` none is padding. The router "hash" needs their ids, and `jitter` their
        keys: to evaluate a model that was trained with jitter, set it to 0.0.
        """
        self._check(x_BTD, tokens)
        x_BTD = jnp.asarray(x_BTD)
        c, (batch, length, d) = self.config, x_BTD.shape
        check_static("x_BTD", x_BTD.shape[1:] if c.dispatch == "dense" else x_BTD.shape)
        if tokens is None:
            tokens = TokenInfo(
                jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
            )
        else:
            # Padding may hold anything. A NaN there would reach the weights' gradients as 0 * NaN.
            x_BTD = jnp.where(tokens.mask_BT[..., None], x_BTD, jnp.zeros((), x_BTD.dtype))
        shape, scale = (c.num_experts, d, c.expert_dim), self.output_scale
        w_gate_EDF = parameter(self, "gate", "EDF", shape, kind="linear", fan_in=d)
        w_up_EDF = parameter(self, "up", "EDF", shape, kind="linear", fan_in=d)
        w_down_EFD = parameter(
            self,
            "down",
            "EFD",
            (c.num_experts, c.expert_dim, d),
            kind="linear",
            fan_in=c.expert_dim,
            scale=scale,
        )
        routed = self._route(x_BTD, tokens)
        # `routing.limit_to_capacity` reads the same table for rows with fewer real tokens.
        capacity = int(routing.capacities(c, length)[length]) if c.dispatch == "capacity" else 0
        y_BTD, dropped_BT = per_shard(
            functools.partial(run_experts, c, capacity),
            ("BTD", "BTA", "BTA", "EDF", "EDF", "EFD"),
            ("BTD", "BT"),
            *(x_BTD, routed.experts_BTA, routed.weights_BTA, w_gate_EDF, w_up_EDF, w_down_EFD),
        )
        if c.num_shared_experts:
            y_BTD = y_BTD + FeedForward(c.num_shared_experts * c.expert_dim, scale, name="shared")(
                x_BTD
            )
        sums = routed.sums | {"dropped": routed.sums.get("dropped", 0.0) + jnp.sum(dropped_BT)}
        return y_BTD, dataclasses.replace(routed, sums=sums)

    def _check(self, x_BTD: jax.Array, tokens: TokenInfo | None) -> None:
        c = self.config
        if not c.num_experts:
            raise ConfigError(
                "num_experts=0 makes a sparse layer without experts: set num_experts to 1 or more, or use FeedForward"
            )
        if x_BTD.ndim != 3:
            raise ValueError(f"x has shape {x_BTD.shape}: give MoE activations [B, T, D]")
        if tokens is None and c.router == "hash":
            raise ValueError(
                "router='hash' chooses by token ids, and tokens=None has none: pass tokens=TokenInfo(ids, mask)"
            )
        if (
            c.jitter
            and (tokens is None or tokens.row_keys_B is None)
            and not self.is_initializing()
        ):
            raise ValueError(
                f"jitter={c.jitter} draws from keys that are not there: pass tokens=TokenInfo(ids, mask, keys) in training, "
                "and set jitter to 0.0 elsewhere"
            )

    def _route(self, x_BTD: jax.Array, tokens: TokenInfo) -> routing.Routing:
        c = self.config
        if c.router == "hash":
            logits_BTE = routing.hash_logits(tokens.ids_BT, c)
        else:
            w_router_DE = parameter(
                self,
                "router",
                "DE",
                (x_BTD.shape[-1], c.num_experts),
                kind="router",
                fan_in=x_BTD.shape[-1],
            )
            if c.jitter and tokens.row_keys_B is not None:  # none in `init`
                x_BTD = routing.jitter(x_BTD, tokens.row_keys_B, c.jitter)
            # In float32 whatever the activations and the chip are: a rounded logit changes who is
            # chosen (Switch Transformer, section 2.4).
            logits_BTE = einsum(
                "BTD,DE->BTE", x_BTD.astype(jnp.float32), w_router_DE, precision="highest"
            )
            logits_BTE = constrain(logits_BTE, "BTE")
        bias_E = None
        # Biases that were trained steer the choice wherever they are given, also by a config that
        # no longer moves them.
        if c.bias_update_rate or self.has_variable("router_state", "bias"):
            bias_E = self.variable(
                "router_state", "bias", jnp.zeros, (c.num_experts,), jnp.float32
            ).value
        routed = routing.route(logits_BTE, c, tokens.mask_BT, bias_E)
        return (
            routing.limit_to_capacity(routed, c, tokens.mask_BT)
            if c.dispatch == "capacity"
            else routed
        )
