"""Parameters and floating-point operations of a model, counted from its config alone.

A matmul of [m, k] by [k, n] counts 2mkn FLOPs. The backward pass costs twice the forward.
Recomputation (remat) is not counted: these are the FLOPs that the model needs, not those that a
program spends.
"""

import dataclasses

from moe.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Count:
    """One component of a model: where it stands, how many of it, and what it costs a token."""

    name: str
    shapes: str  # for a table
    repeats: int
    parameters: int  # in all repeats
    active_parameters: int  # of them, those that a token's forward pass reads
    forward_flops: float  # per token, all repeats


def component_counts(config: ModelConfig, sequence_length: int) -> list[Count]:
    """The components of a model in order, with FLOPs averaged over the tokens of a causal row of
    `sequence_length`.

    A token passes `experts_per_token` routed experts: neither drops nor the dense oracle's extra
    work are counted.
    """
    d, v, layers = config.model_dim, config.vocab_size, config.num_layers
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    projections = d * (n + 2 * k) * h + n * h * d
    # A token sees (T + 1) / 2 keys on average, and spends 2H FLOPs per key and head on its score
    # and as many on the weighted sum.
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
    """What dense and sparse layers do after attention, without the parts that a model lacks."""
    d, f, moe = config.model_dim, config.feed_forward_dim, config.moe
    e, a, w, wide = (
        moe.num_experts,
        moe.experts_per_token,
        moe.expert_dim,
        moe.num_shared_experts * moe.expert_dim,
    )
    sparse = sum(kinds.count("moe") * repeats for kinds, repeats in config.layer_groups)
    dense = config.num_layers - sparse
    counts = (
        _linear("feed-forward", f"2 x {d}x{f}, {f}x{d}", dense, 3 * d * f),
        _linear("router", f"{d}x{e}", sparse, 0 if moe.router == "hash" else d * e),
        _linear(
            "experts",
            f"{e} of (2 x {d}x{w}, {w}x{d}), {a} active",
            sparse,
            e * 3 * d * w,
            a * 3 * d * w,
        ),
        _linear("shared experts", f"2 x {d}x{wide}, {wide}x{d}", sparse, 3 * d * wide),
    )
    return [count for count in counts if count.parameters]


def total_parameters(config: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return sum(count.parameters for count in component_counts(config, 1))


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token's forward pass reads, embeddings included."""
    return sum(count.active_parameters for count in component_counts(config, 1))


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the embedding and, where it is not tied, the unembedding."""
    return config.vocab_size * config.model_dim * (1 if config.tied_embeddings else 2)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token: 6 per active matmul parameter (Kaplan et al. 2020,
    section 2.1), plus causal attention.
    """
    return 3 * sum(count.forward_flops for count in component_counts(config, sequence_length))


def _linear(
    name: str, shape: str, repeats: int, parameters: int, active: int | None = None
) -> Count:
    """Matrices of so many parameters in each repeat, of which a token's forward pass reads `active`
    (all, where not given).
    """
    active = parameters if active is None else active
    return Count(
        name, shape, repeats, repeats * parameters, repeats * active, 2.0 * repeats * active
    )
