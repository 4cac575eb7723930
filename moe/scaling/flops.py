"""Counts the parameters and floating-point operations of a model from its config alone.

A matmul of [m, k] by [k, n] counts as 2mkn FLOPs, and the backward pass as twice the forward pass.
Recomputation (remat) is not counted: these are the FLOPs that the model needs, not those that a
program spends.
"""

import dataclasses

from moe.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Count:
    """Says how many parameters one component of a model has, and what it costs each token."""

    name: str
    shapes: str  # the shapes of its arrays, as a table prints them
    repeats: int  # how often the model has this component
    parameters: int  # in all repeats
    active_parameters: int  # those parameters that the forward pass of one token reads
    forward_flops: float  # per token, in all repeats


def component_counts(config: ModelConfig, sequence_length: int) -> list[Count]:
    """Returns the components of a model in order.

    FLOPs are a mean over the tokens of a causal row of `sequence_length`. Each token is counted
    with exactly `experts_per_token` routed experts, although "capacity" may drop some and the
    "dense" dispatch computes all.
    """
    d, v, layers = config.model_dim, config.vocab_size, config.num_layers
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    projections = d * (n + 2 * k) * h + n * h * d
    # On average a token attends to (T + 1) / 2 keys. For each key and head it spends 2H FLOPs on
    # the score and as many on the weighted sum of values.
    mixing = 4 * n * h * (sequence_length + 1) / 2
    counts = [
        Count("embedding", f"{v}x{d}", 1, v * d, v * d, 0.0),
        _linear(
            "attention projections",
            f"{d}x{n}x{h}, 2 x {d}x{k}x{h}, {n}x{h}x{d}",
            layers,
            projections,
        ),
        Count("attention scores and sums", f"{n} heads of {h}", layers, 0, 0, layers * mixing),
        *_feed_forward_counts(config),
        Count("norms", f"{d}", 2 * layers + 1, (2 * layers + 1) * d, (2 * layers + 1) * d, 0.0),
    ]
    if config.tied_embeddings:
        return [*counts, Count("unembedding (tied)", f"{d}x{v}", 1, 0, 0, 2.0 * d * v)]
    return [*counts, _linear("unembedding", f"{d}x{v}", 1, d * v)]


def _feed_forward_counts(config: ModelConfig) -> list[Count]:
    """Returns the components that follow attention in dense and sparse layers.

    Components that the model does not have are left out.
    """
    d, f, moe = config.model_dim, config.feed_forward_dim, config.moe
    e, a, f_expert = moe.num_experts, moe.experts_per_token, moe.expert_dim
    f_shared = moe.num_shared_experts * moe.expert_dim
    num_sparse = sum(kinds.count("moe") * repeats for kinds, repeats in config.layer_groups)
    num_dense = config.num_layers - num_sparse
    one_expert = 3 * d * f_expert  # its gate, up and down matrices
    counts = (
        _linear("feed-forward", f"2 x {d}x{f}, {f}x{d}", num_dense, 3 * d * f),
        _linear("router", f"{d}x{e}", num_sparse, 0 if moe.router == "hash" else d * e),
        _linear(
            "experts",
            f"{e} of (2 x {d}x{f_expert}, {f_expert}x{d}), {a} active",
            num_sparse,
            parameters=e * one_expert,
            active=a * one_expert,
        ),
        _linear(
            "shared experts", f"2 x {d}x{f_shared}, {f_shared}x{d}", num_sparse, 3 * d * f_shared
        ),
    )
    return [count for count in counts if count.parameters]


def total_parameters(config: ModelConfig) -> int:
    """Returns the number of all parameters, embeddings included."""
    return sum(count.parameters for count in component_counts(config, 1))


def active_parameters(config: ModelConfig) -> int:
    """Returns how many parameters the forward pass of one token reads, embeddings included."""
    return sum(count.active_parameters for count in component_counts(config, 1))


def embedding_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of the embedding and, if it is not tied, the unembedding."""
    return config.vocab_size * config.model_dim * (1 if config.tied_embeddings else 2)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Returns the FLOPs of the forward and backward pass per token.

    They are 6 for each active parameter of a matmul (Kaplan et al. 2020, section 2.1), plus those
    of causal attention.
    """
    return 3 * sum(count.forward_flops for count in component_counts(config, sequence_length))


def _linear(
    name: str, shape: str, repeats: int, parameters: int, active: int | None = None
) -> Count:
    """Returns the count of matrices that have so many `parameters` in each repeat.

    `active` is how many of them the forward pass of one token reads, by default all.
    """
    active = parameters if active is None else active
    return Count(
        name, shape, repeats, repeats * parameters, repeats * active, 2.0 * repeats * active
    )
