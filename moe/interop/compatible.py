"""Says which model can start from the parameters of another one. It imports no JAX."""

import math
from collections.abc import Sequence

from moe.config import ConfigError, ModelConfig

# The fields besides `moe` that a model's function or its parameter tree depends on.
SHARED_FIELDS = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "feed_forward_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_base",
    "norm_epsilon",
    "qk_norm",
    "tied_embeddings",
)


def check_upcycle(dense: ModelConfig, config: ModelConfig) -> None:
    """Raises ConfigError if a model of `config` cannot start from one of `dense`."""
    if dense.moe.num_experts:
        raise ConfigError(
            f"model.moe.num_experts={dense.moe.num_experts} of the run to start from is sparse "
            "already: set --from to a dense run"
        )
    if not config.moe.num_experts:
        raise ConfigError(
            "model.moe.num_experts=0 leaves every layer dense: "
            "set model.moe.num_experts to 1 or more"
        )
    check_fields(dense, config, SHARED_FIELDS)
    _check_slices(config)


def check_fields(before: ModelConfig, after: ModelConfig, names: Sequence[str]) -> None:
    """Raises ConfigError for the first of these fields that differs from the run to start from.

    A name that starts with "moe." is a field of the sparse layers.
    """
    for name in names:
        old, new = (
            getattr(model.moe if "." in name else model, name.removeprefix("moe."))
            for model in (before, after)
        )
        if old != new:
            raise ConfigError(
                f"model.{name}={new!r} is {old!r} in the run to start from: "
                f"set model.{name} to {old!r}"
            )


def _check_slices(config: ModelConfig) -> None:
    """Raises ConfigError if the feed-forward part cannot be cut into the experts' slices."""
    moe = config.moe
    number, rest = divmod(config.feed_forward_dim, moe.expert_dim)
    if rest:
        raise ConfigError(
            f"model.moe.expert_dim={moe.expert_dim} does not divide "
            f"model.feed_forward_dim={config.feed_forward_dim}: "
            f"set model.moe.expert_dim to a divisor of {config.feed_forward_dim}"
        )
    if number <= moe.num_shared_experts:
        raise ConfigError(
            f"model.moe.num_shared_experts={moe.num_shared_experts} leaves the routed experts none "
            f"of the {number} slices of width {moe.expert_dim}: "
            f"set model.moe.num_shared_experts to at most {number - 1}"
        )
    slices = num_slices(config)
    if moe.num_experts % slices:
        raise ConfigError(
            f"model.moe.num_experts={moe.num_experts} cannot hold {slices} slices equally often: "
            f"set model.moe.num_experts to {slices * math.ceil(moe.num_experts / slices)}"
        )


def num_slices(config: ModelConfig) -> int:
    """Returns G, the number of slices of a feed-forward part that the routed experts take."""
    return config.feed_forward_dim // config.moe.expert_dim - config.moe.num_shared_experts
