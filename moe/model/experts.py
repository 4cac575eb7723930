"""Defines the sparse feed-forward part: a router, and experts that see only their own tokens.

This file declares the parameters and calls the parts: `routing` chooses each token's experts, and
`dispatch` brings tokens to experts and their outputs back.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe.config import ConfigError, MoEConfig
from moe.model import routing
from moe.model.dispatch import Weights, run_experts
from moe.model.layers import FeedForward, check_static, einsum
from moe.model.tokens import TokenInfo
from moe.parallel.mesh import axis_size, constrain, on_auto_axes, per_shard
from moe.parallel.sequence import gather_time, splits_time
from moe.parameters import parameter


def _hide_padding(x_BTD: jax.Array, tokens: TokenInfo) -> tuple[jax.Array, TokenInfo]:
    """Returns zeros in the place of padding, and the tokens with their mask laid out.

    Padding may hold anything. A NaN there would reach the weights' gradients as 0 * NaN.
    """
    # Without this layout the compiler would split what the router computes as it splits the mask,
    # and would gather the mask beside the activations.
    mask_BT = constrain(tokens.mask_BT, "BT")
    x_BTD = jnp.where(mask_BT[..., None], x_BTD, jnp.zeros((), x_BTD.dtype))
    return constrain(x_BTD, "BtD"), dataclasses.replace(tokens, mask_BT=mask_BT)


def _output_specs(x_BTD: PartitionSpec) -> tuple[PartitionSpec, routing.Routing]:
    """Returns how `MoE` lays out its results on Explicit axes, from the layout of its input."""
    rows_BT = PartitionSpec(*x_BTD[:2])
    # A tree of specs has the structure of the results, with specs in place of arrays.
    specs: tuple[Any, ...] = (rows_BT, rows_BT, PartitionSpec(), rows_BT)
    return x_BTD, routing.Routing(*specs)


class MoE(nn.Module):
    """Adds up the outputs of each token's experts, weighted by a router.

    This is equation 1 of Shazeer et al. 2017, with SwiGLU experts and optional shared experts. The
    initial output is multiplied by `output_scale`. A model of many layers adds up their outputs, so
    it sets a factor below 1 (`layers.residual_scale`).
    """

    config: MoEConfig
    output_scale: float = 1.0

    @on_auto_axes(_output_specs)
    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo | None = None
    ) -> tuple[jax.Array, routing.Routing]:
        """Returns [B, T, D], and the routing with its statistics, which hold the router's losses.

        Without `tokens`, no token is padding. The router "hash" needs the tokens' ids, and `jitter`
        needs their keys. To evaluate a model that was trained with jitter, set it to 0.0.
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
            x_BTD, tokens = _hide_padding(x_BTD, tokens)
        # The router reads each row's limit from this table. Its last entry is the limit of a row
        # without padding, which dispatch makes room for.
        limited = c.dispatch == "capacity" or c.router == "expert_choice"
        capacities = routing.capacity_table(c, length) if limited else None
        # Router and experts gather the same tokens, which is done once. Their gradients are summed
        # over the tensor axis apart, since the router's is the same on all of its devices.
        routed = self._route(gather_time(x_BTD), tokens, capacities)
        capacity = 0 if capacities is None else int(capacities[length])
        weights = self._weights(d)
        e = "E" if weights.num_experts == c.num_experts else "e"
        y_BTD, dropped_BT = per_shard(
            functools.partial(run_experts, c, capacity, splits_time=splits_time(length)),
            ("BTD", "BTA", "BTA", f"{e}DF", f"{e}DF", f"{e}FD"),
            ("BtD", "BT"),
            *(gather_time(x_BTD), routed.experts_BTA, routed.weights_BTA, *weights),
        )
        if c.num_shared_experts:
            width = c.num_shared_experts * c.expert_dim
            y_BTD = y_BTD + FeedForward(width, self.output_scale, name="shared")(x_BTD)
        dropped = routed.stats.dropped + jnp.sum(dropped_BT)
        return y_BTD, routed._replace(stats=routed.stats._replace(dropped=dropped))

    def _num_given(self) -> int:
        """Returns how many experts' weights are given: all, or in a shard_map a device's own."""
        num_experts, devices = self.config.num_experts, axis_size("expert")
        for gate in jax.tree.leaves(self.get_variable("params", "gate")):
            if len(gate) * devices == num_experts:
                return len(gate)
        return num_experts

    def _weights(self, d: int) -> Weights:
        """Declares the experts' weights, for activations of width `d`."""
        e, f, scale = self._num_given(), self.config.expert_dim, self.output_scale
        return Weights(
            parameter(self, "gate", "EDF", (e, d, f), kind="linear", fan_in=d),
            parameter(self, "up", "EDF", (e, d, f), kind="linear", fan_in=d),
            parameter(self, "down", "EFD", (e, f, d), kind="linear", fan_in=f, scale=scale),
        )

    def _check(self, x_BTD: jax.Array, tokens: TokenInfo | None) -> None:
        """Raises ConfigError or ValueError if this layer cannot compute its inputs."""
        c = self.config
        if not c.num_experts:
            raise ConfigError(
                "num_experts=0 makes a sparse layer without experts: "
                "set num_experts to 1 or more, or use FeedForward"
            )
        if x_BTD.ndim != 3:
            raise ValueError(f"x has shape {x_BTD.shape}: give MoE activations [B, T, D]")
        if tokens is None and c.router == "hash":
            raise ValueError(
                "router='hash' chooses by token ids, and tokens=None has none: "
                "pass tokens=TokenInfo(ids, mask)"
            )
        has_keys = tokens is not None and tokens.row_keys_B is not None
        if c.jitter and not has_keys and not self.is_initializing():
            raise ValueError(
                f"jitter={c.jitter} draws from keys that are not there: "
                "pass tokens=TokenInfo(ids, mask, keys) in training, "
                "and set jitter to 0.0 elsewhere"
            )

    def _route(
        self, x_BTD: jax.Array, tokens: TokenInfo, capacities: np.ndarray | None
    ) -> routing.Routing:
        """Returns the experts of each token, within their capacity if the dispatch has one."""
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
            # Logits are computed in float32 on every chip: a rounded logit would change which
            # experts are chosen (Switch Transformer, section 2.4).
            logits_BTE = einsum(
                "BTD,DE->BTE", x_BTD.astype(jnp.float32), w_router_DE, precision="highest"
            )
            logits_BTE = constrain(logits_BTE, "BTE")
        bias_E = None
        # Trained biases steer the choice whenever the caller gives them, even if this config does
        # not update them.
        if c.bias_update_rate or self.has_variable("router_state", "bias"):
            bias_E = self.variable(
                "router_state", "bias", jnp.zeros, (c.num_experts,), jnp.float32
            ).value
        routed = routing.route(logits_BTE, c, tokens.mask_BT, bias_E, capacities)
        if c.dispatch == "capacity":
            routed = routing.limit_to_capacity(routed, c, tokens.mask_BT, capacities)
        return routed
