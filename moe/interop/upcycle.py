"""Sparse upcycling makes the parameters of a mixture of experts from those of a dense model.

These are pure functions of parameter trees. The dense feed-forward part is cut along F into slices
of `expert_dim`. The shared experts take the first slices, and G slices are left for the routed
experts: expert e starts as a copy of slice e % G. (Komatsuzaki et al. 2022 has G = 1: every expert
is a copy of the whole.) Everything else is copied, and the router is drawn as for a new model. The
down projections of routed experts are multiplied by G and divided by the sum of a token's combine
weights. Then equal weights over all slices add up to the output of the dense part.

The new model computes exactly the dense one's function if all of these hold:
- No noise is added.
- No assignment is dropped: `dispatch` is "dense" or "dropless", or no expert is full.
- The sum of a token's weights is known: they are normalized, or the router is "hash", or a softmax
  chooses every expert.
- Every token chooses whole copies: `experts_per_token` is a multiple of G. With `num_groups`, the
  number of experts in a group is too. The G experts of a copy start with the same router column
  (virtual groups, He et al. 2024), so they have equal scores and are chosen together. The hash
  router chooses consecutive experts with equal weights, which hold each slice equally often. G = 1
  always fulfils this.

Otherwise the function is close to the dense one's. On average over choices, the scale is right for
a router whose scores are all equal. If A is not a multiple of G, the router keeps the columns that
were drawn for it, since with equal columns the last slices would never be chosen.
"""

import operator
from typing import Any

import einops
import jax
import jax.numpy as jnp

from moe.config import ModelConfig, MoEConfig
from moe.interop.compatible import num_slices

Params = dict[str, Any]  # a tree of parameters by name


def total_weight(config: MoEConfig) -> float:
    """Returns the sum of a token's combine weights if all of its scores are equal."""
    if config.normalized or config.router == "hash":
        return config.weight_scale
    score = 0.5 if config.router == "sigmoid" else 1 / config.num_experts
    return config.weight_scale * config.experts_per_token * score


def unstack_layers(params: Params, config: ModelConfig) -> list[Params]:
    """Returns each layer's parameters, in order, from the stacks of `config.layer_groups`."""
    return [
        jax.tree.map(operator.itemgetter(repeat), params[f"layers_{group}"][f"block_{index}"])
        for group, (kinds, repeats) in enumerate(config.layer_groups)
        for repeat in range(repeats)
        for index in range(len(kinds))
    ]


def stack_layers(layers: list[Params], config: ModelConfig) -> Params:
    """Returns the stacks of `config.layer_groups` by name. It is the inverse of `unstack_layers`.

    With another config than `unstack_layers` was given, it regroups the layers.
    """
    groups: Params = {}
    for group, (kinds, repeats) in enumerate(config.layer_groups):
        period = len(kinds)
        group_layers, layers = layers[: period * repeats], layers[period * repeats :]
        groups[f"layers_{group}"] = {
            f"block_{index}": jax.tree.map(lambda *x: jnp.stack(x), *group_layers[index::period])
            for index in range(period)
        }
    return groups


def upcycle(
    dense_params: Params,
    new_params: Params,
    key: jax.Array,
    *,
    dense: ModelConfig,
    config: ModelConfig,
    noise: float = 0.0,
) -> Params:
    """Returns the parameters of a model of `config`, from a dense model's and new routers.

    The routers are those of `new_params`. Each routed expert's matrices get normal noise, drawn
    from `key`, of `noise` times the matrix's standard deviation.
    """
    layers = []
    for number, (layer, new) in enumerate(
        zip(unstack_layers(dense_params, dense), unstack_layers(new_params, config), strict=True)
    ):
        if "moe" in new:
            layer_key = jax.random.fold_in(key, number)
            experts = _make_experts(layer["feed_forward"], new["moe"], layer_key, config, noise)
            attention = {name: value for name, value in layer.items() if name != "feed_forward"}
            layer = attention | {"moe": experts}
        layers.append(layer)
    others = {name: value for name, value in dense_params.items() if not name.startswith("layers_")}
    return others | stack_layers(layers, config)


def _make_experts(
    feed_forward: dict[str, jax.Array],
    new: dict[str, jax.Array],
    key: jax.Array,
    config: ModelConfig,
    noise: float,
) -> Params:
    """Returns the parameters of a sparse part, from the matrices of a dense one.

    `new` is a new model's sparse part, whose router is used.
    """
    moe, slices = config.moe, num_slices(config)
    shared_dim = moe.num_shared_experts * moe.expert_dim
    experts: Params = {}
    shared: Params = {}
    matrices = zip(sorted(feed_forward.items()), jax.random.split(key, 3), strict=True)
    for (name, matrix), matrix_key in matrices:
        if name == "down":  # [F, D]; gate and up are [D, F]
            shared[name], routed = matrix[:shared_dim], matrix[shared_dim:]
            routed_slices = einops.rearrange(routed, "(g f) d -> g f d", g=slices)
        else:
            shared[name], routed = matrix[:, :shared_dim], matrix[:, shared_dim:]
            routed_slices = einops.rearrange(routed, "d (g f) -> g d f", g=slices)
        copies = jnp.tile(routed_slices, (moe.num_experts // slices, 1, 1))
        noisy = _add_noise(copies, matrix_key, noise)
        experts[name] = slices / total_weight(moe) * noisy if name == "down" else noisy
    if shared_dim:
        experts["shared"] = shared
    if "router" in new:
        # This many experts start with the same column of the router.
        same = slices if moe.experts_per_token % slices == 0 else 1
        experts["router"] = jnp.repeat(new["router"][:, ::same], same, axis=1)
    return experts


def _add_noise(experts: jax.Array, key: jax.Array, noise: float) -> jax.Array:
    """Adds normal noise of `noise` times each expert's standard deviation to its matrix."""
    if not noise:  # drawing the noise would be most of the program
        return experts
    deviation_E11 = jnp.std(experts, axis=(1, 2), keepdims=True)
    return experts + noise * deviation_E11 * jax.random.normal(key, experts.shape, experts.dtype)
