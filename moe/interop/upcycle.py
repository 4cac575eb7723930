"""Sparse upcycling: the parameters of a mixture of experts made from those of a dense model. Pure
functions of parameter trees.

The dense feed-forward part is cut along F into slices of `expert_dim`. The shared experts take the
first of them, and the routed ones the G that are left: expert e starts as a copy of slice e % G
(Komatsuzaki et al. 2022 has G = 1: every expert is a copy of the whole). All else is copied, and
the router is drawn as for a new model. The down projections of routed experts are multiplied by G
over the sum of a token's combine weights, so that weights that are equal over all slices add up to
what the slices did.

The model's function is exactly the dense one's if all of these hold:
- no noise is added, and no assignment dropped: `dispatch` is "dense" or "dropless" (or nothing finds its expert full);
- the weights have a known sum: they are normalized, or the router is "hash", or every expert is chosen by a softmax;
- every token chooses whole copies: `experts_per_token` is a multiple of G, and with `num_groups` a group's experts are too. For then the
  G experts of a copy start with one router column (virtual groups, He et al. 2024), have equal scores, and are chosen together. The hash
  router chooses consecutive experts with equal weights, which hold each slice equally often.
G = 1 fulfils the last. Otherwise the function is only near: the scale is right for a router whose
scores are all equal, on average over choices, and a router whose A is no multiple of G keeps the
columns it was drawn with, since ties would never choose the last slices.
"""

import math
import operator
from typing import Any

import einops
import jax
import jax.numpy as jnp

from moe.config import ConfigError, ModelConfig, MoEConfig

# What a model's function or its tree depends on besides `moe`.
KEPT_FIELDS = (
    *(
        "vocab_size",
        "num_layers",
        "model_dim",
        "feed_forward_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ),
    *("rope_base", "norm_epsilon", "tied_embeddings"),
)


def check_upcycle(dense: ModelConfig, config: ModelConfig) -> None:
    """Raises ConfigError where a model of `config` cannot start from one of `dense`."""
    moe = config.moe
    if dense.moe.num_experts:
        raise ConfigError(
            f"model.moe.num_experts={dense.moe.num_experts} of the run to start from is sparse already: set --from to a dense run"
        )
    if not moe.num_experts:
        raise ConfigError(
            "model.moe.num_experts=0 leaves every layer dense: set model.moe.num_experts to 1 or more"
        )
    for name in KEPT_FIELDS:
        before, after = getattr(dense, name), getattr(config, name)
        if before != after:
            raise ConfigError(
                f"model.{name}={after} is {before} in the run to start from: set model.{name} to {before}"
            )
    whole, rest = divmod(config.feed_forward_dim, moe.expert_dim)
    if rest:
        raise ConfigError(
            f"model.moe.expert_dim={moe.expert_dim} does not divide model.feed_forward_dim={config.feed_forward_dim}: "
            f"set model.moe.expert_dim to a divisor of {config.feed_forward_dim}"
        )
    if whole <= moe.num_shared_experts:
        raise ConfigError(
            f"model.moe.num_shared_experts={moe.num_shared_experts} leaves the routed experts none of the {whole} slices of width "
            f"{moe.expert_dim}: set model.moe.num_shared_experts to at most {whole - 1}"
        )
    slices = num_slices(config)
    if moe.num_experts % slices:
        raise ConfigError(
            f"model.moe.num_experts={moe.num_experts} cannot hold {slices} slices equally often: "
            f"set model.moe.num_experts to {slices * math.ceil(moe.num_experts / slices)}"
        )


def num_slices(config: ModelConfig) -> int:
    """G: how many slices of a feed-forward part are the routed experts'."""
    return config.feed_forward_dim // config.moe.expert_dim - config.moe.num_shared_experts


def total_weight(config: MoEConfig) -> float:
    """The sum of a token's combine weights, if all of its scores are equal."""
    if config.normalized or config.router == "hash":
        return config.weight_scale
    return (
        config.weight_scale
        * config.experts_per_token
        * (0.5 if config.router == "sigmoid" else 1 / config.num_experts)
    )


def layers_of(params: Any, config: ModelConfig) -> list[Any]:
    """Each layer's parameters, in order, out of the stacks [repeats, ...] of `config.layer_groups`."""
    return [
        jax.tree.map(operator.itemgetter(repeat), params[f"layers_{group}"][f"block_{index}"])
        for group, (kinds, repeats) in enumerate(config.layer_groups)
        for repeat in range(repeats)
        for index in range(len(kinds))
    ]


def stack_layers(layers: list[Any], config: ModelConfig) -> dict[str, Any]:
    """The inverse of `layers_of`: the stacks of `config.layer_groups`, by name. Between two configs
    the pair changes the grouping.
    """
    groups: dict[str, Any] = {}
    for group, (kinds, repeats) in enumerate(config.layer_groups):
        size = len(kinds)
        of_group, layers = layers[: size * repeats], layers[size * repeats :]
        stacks = [
            jax.tree.map(lambda *x: jnp.stack(x), *of_group[index::size]) for index in range(size)
        ]
        groups[f"layers_{group}"] = {f"block_{index}": stack for index, stack in enumerate(stacks)}
    return groups


def upcycle(
    dense_params: Any,
    new_params: Any,
    key: jax.Array,
    *,
    dense: ModelConfig,
    config: ModelConfig,
    noise: float = 0.0,
) -> Any:
    """The parameters of a model of `config` made from a dense one's, and from a new model's
    routers.

    To each routed expert's matrices, normal noise of `noise` times the matrix's standard deviation
    is added, a function of `key`.
    """
    layers = []
    for number, (layer, new) in enumerate(
        zip(layers_of(dense_params, dense), layers_of(new_params, config), strict=True)
    ):
        if "moe" in new:
            layer_key = jax.random.fold_in(key, number)
            sparse = _sparse(layer["feed_forward"], new["moe"], layer_key, config, noise)
            layer = {name: value for name, value in layer.items() if name != "feed_forward"} | {
                "moe": sparse
            }
        layers.append(layer)
    others = {name: value for name, value in dense_params.items() if not name.startswith("layers_")}
    return others | stack_layers(layers, config)


def _sparse(
    feed_forward: dict[str, jax.Array], new: Any, key: jax.Array, config: ModelConfig, noise: float
) -> dict[str, Any]:
    """The parameters of a sparse part, from the matrices [D, F] of a dense one."""
    moe, slices = config.moe, num_slices(config)
    shared_dim = moe.num_shared_experts * moe.expert_dim
    sparse: dict[str, Any] = {}
    for (name, w_DF), matrix_key in zip(
        sorted(feed_forward.items()), jax.random.split(key, 3), strict=True
    ):
        slices_GDF = einops.rearrange(w_DF[:, shared_dim:], "d (g f) -> g d f", g=slices)
        w_EDF = _add_noise(
            jnp.tile(slices_GDF, (moe.num_experts // slices, 1, 1)), matrix_key, noise
        )
        sparse[name] = slices / total_weight(moe) * w_EDF.mT if name == "down" else w_EDF
    if shared_dim:
        sparse["shared"] = {name: w_DF[:, :shared_dim] for name, w_DF in feed_forward.items()}
    if "router" in new:
        tied = slices if moe.experts_per_token % slices == 0 else 1
        sparse["router"] = jnp.repeat(new["router"][:, ::tied], tied, axis=1)
    return sparse


def _add_noise(w_EDF: jax.Array, key: jax.Array, noise: float) -> jax.Array:
    if not noise:  # else drawing it would be most of the program
        return w_EDF
    return w_EDF + noise * jnp.std(w_EDF, axis=(1, 2), keepdims=True) * jax.random.normal(
        key, w_EDF.shape, w_EDF.dtype
    )
