"""Counts the parameters and floating-point operations of a model from its config alone.

A matmul of [m, k] by [k, n] counts as 2mkn FLOPs, and the backward pass as twice the forward pass.
Recomputation (remat, and the scores that flash attention makes again) is not counted: these are
the FLOPs that the model needs, not those that a program spends. Norms, activations, softmax and
rotary positions are not matmuls, and are not counted either. docs/scaling_laws/counting.md has
the formulas.
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from moe.config import ModelConfig, RunConfig

# Which keys a query is counted with: those that a causal mask shows, or all keys of its row, as in
# an encoder. Where a row packs several documents, the boundaries between them are not counted.
Mask = Literal["causal", "none"]


@dataclasses.dataclass(frozen=True)
class Count:
    """Says how many parameters one component of a model has, and what it costs each token."""

    name: str
    shapes: str  # the shapes of its arrays, as a table prints them
    repeats: int  # how often the model has this component
    parameters: int  # in all repeats
    active_parameters: int  # those parameters that the forward pass of one token reads
    forward_flops: float  # per token, in all repeats


def component_counts(
    config: ModelConfig, sequence_length: int, mask: Mask = "causal"
) -> list[Count]:
    """Returns the components of a decoder in order.

    FLOPs are a mean over the tokens of a row of `sequence_length`. Each token is counted with
    exactly `experts_per_token` routed experts, although "capacity" may drop some and the "dense"
    dispatch computes all.
    """
    stack = _stack_counts(config, sequence_length, mask)
    return [_embedding(config), *stack, _unembedding(config)]


def encoder_counts(config: ModelConfig, sequence_length: int) -> list[Count]:
    """Returns the components of an encoder without logits, whose tokens see their whole row."""
    return [_embedding(config), *_stack_counts(config, sequence_length, "none")]


def encoder_decoder_counts(
    decoder: ModelConfig,
    encoder: ModelConfig,
    sequence_length: int,
    encoder_length: int,
    mask: Mask = "causal",
) -> list[Count]:
    """Returns the components of an encoder and its decoder, with FLOPs per token of the decoder.

    The rows of the decoder have `sequence_length` tokens, and those of the encoder, all of which
    each token of the decoder reads, have `encoder_length`.
    """
    ratio = encoder_length / sequence_length  # tokens of the encoder for each one of the decoder
    encoder_stack = [
        dataclasses.replace(
            count, name=f"encoder {count.name}", forward_flops=ratio * count.forward_flops
        )
        for count in _stack_counts(encoder, encoder_length, "none")
    ]
    embedding, *rest = component_counts(decoder, sequence_length, mask)
    cross = _cross_attention_counts(decoder, encoder_length, ratio)
    return [embedding, *encoder_stack, *rest[:-1], *cross, rest[-1]]


def run_counts(config: RunConfig) -> list[Count]:
    """Returns the components of the model that a run trains, which its task chooses.

    FLOPs are per token of a row of `config.data.sequence_length`. In span corruption these are the
    encoder's tokens, of which there are several for each one of the decoder.
    """
    model, length = config.model, config.data.sequence_length
    match config.task:
        case "masked_tokens":
            return [*encoder_counts(model, length), _unembedding(model)]
        case "span_corruption":
            targets = config.corrupted_row.targets
            counts = encoder_decoder_counts(model, model, targets, length)
            return [
                dataclasses.replace(count, forward_flops=count.forward_flops * targets / length)
                for count in counts
            ]
        case "language_modelling" | "fill_in_the_middle" | "custom":
            return component_counts(model, length)


def run_training_flops(config: RunConfig) -> float:
    """Returns the FLOPs of a run's forward and backward pass per token of its rows."""
    return training_flops(run_counts(config))


def run_recomputed_flops(config: RunConfig) -> float:
    """Returns the FLOPs per token that the backward pass repeats of the forward pass.

    They are those of the layers, less those of attention where its outputs are saved. The loss
    takes its gradient in the forward pass, and nothing of it is repeated.
    """
    if config.model.remat == "none":
        return 0.0
    counts = [count for count in run_counts(config) if "embedding" not in count.name]
    if config.model.remat == "save_attention":
        counts = [count for count in counts if not count.name.endswith("scores and sums")]
    return float(sum(count.forward_flops for count in counts))


def stage_training_flops(config: RunConfig) -> float:
    """Returns the part of `run_training_flops` that the stages of a pipeline compute.

    The rest is that of the unembedding, and of the dense layers beside a group of sparse ones.
    """
    kinds, repeats = config.model.layer_groups[config.model.pipelined_group]
    outside = config.model.num_layers - len(kinds) * repeats
    flops = 0.0
    for count in run_counts(config):
        if "embedding" not in count.name:
            is_in_dense_layers = count.name.startswith(("attention", "feed-forward"))
            layers = count.repeats - outside if is_in_dense_layers else count.repeats
            flops += 3 * count.forward_flops * layers / count.repeats
    return flops


def run_parameters(config: RunConfig) -> int:
    """Returns the number of all parameters of the model that a run trains."""
    return sum(count.parameters for count in run_counts(config))


def run_active_parameters(config: RunConfig) -> int:
    """Returns how many parameters the forward pass of one token reads, in all of a run's model."""
    return sum(count.active_parameters for count in run_counts(config))


def training_flops(counts: Iterable[Count]) -> float:
    """Returns the FLOPs of the forward and backward pass per token."""
    return 3 * sum(count.forward_flops for count in counts)


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
    """Returns the FLOPs of the forward and backward pass of a decoder per token.

    They are 6 for each active parameter of a matmul (Kaplan et al. 2020, section 2.1), plus those
    of causal attention.
    """
    return training_flops(component_counts(config, sequence_length))


def planned_tokens(config: RunConfig) -> int:
    """Returns the number of tokens that a run is trained on."""
    return config.train.steps * config.train.batch_size * config.data.sequence_length


def planned_flops(config: RunConfig) -> float:
    """Returns the FLOPs of a run's training."""
    return planned_tokens(config) * run_training_flops(config)


def model_columns(run: RunConfig) -> dict[str, float]:
    """Returns what the columns of a table of runs say of a model. A dense one is one expert."""
    config = run.model
    moe, experts, active, width = config.moe, 1, 1, config.feed_forward_dim
    if moe.num_experts:
        experts, active, width = moe.num_experts, moe.experts_per_token, moe.expert_dim
    return {
        "parameters": run_parameters(run),
        "active_parameters": run_active_parameters(run),
        "embedding_parameters": embedding_parameters(config),
        "experts": experts,
        "experts_per_token": active,
        "granularity": config.feed_forward_dim / width,
        "sparsity": 1 - active / experts,
    }


def _embedding(config: ModelConfig) -> Count:
    """Returns the count of the embedding, which is looked up and not multiplied."""
    v, d = config.vocab_size, config.model_dim
    return Count("embedding", f"{v}x{d}", 1, v * d, v * d, 0.0)


def _unembedding(config: ModelConfig) -> Count:
    """Returns the count of the logits, whose matrix may be the embedding's own."""
    d, v = config.model_dim, config.vocab_size
    if config.tied_embeddings:
        return Count("unembedding (tied)", f"{d}x{v}", 1, 0, 0, 2.0 * d * v)
    return _linear("unembedding", f"{d}x{v}", 1, d * v)


def _stack_counts(config: ModelConfig, sequence_length: int, mask: Mask) -> list[Count]:
    """Returns the components of the layers and of the final norm."""
    d, layers = config.model_dim, config.num_layers
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    # With a causal mask a token sees 1 to T keys, which are (T + 1) / 2 on average.
    keys = (sequence_length + 1) / 2 if mask == "causal" else sequence_length
    return [
        _linear(
            "attention projections",
            f"{d}x{n}x{h}, 2 x {d}x{k}x{h}, {n}x{h}x{d}",
            layers,
            2 * d * (n + k) * h,
        ),
        _mixing("attention scores and sums", config, keys),
        *_feed_forward_counts(config, sequence_length),
        _norms("norms", d, 2 * layers + 1),
        *_head_norms("attention norms of queries and keys", config),
    ]


def _cross_attention_counts(
    config: ModelConfig, encoder_length: int, encoder_tokens: float
) -> list[Count]:
    """Returns the components of a decoder's cross-attention, and its norm, in each layer.

    For each token of the decoder, the keys and values of `encoder_tokens` are projected.
    """
    d, layers = config.model_dim, config.num_layers
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = (f"{d}x{n}x{h}, {n}x{h}x{d}", f"2 x {d}x{k}x{h}")
    keys_and_values = _linear("cross-attention keys and values", shapes[1], layers, 2 * d * k * h)
    return [
        _linear("cross-attention queries and output", shapes[0], layers, 2 * d * n * h),
        dataclasses.replace(
            keys_and_values, forward_flops=encoder_tokens * keys_and_values.forward_flops
        ),
        _mixing("cross-attention scores and sums", config, encoder_length),
        _norms("cross-attention norms", d, layers),
        *_head_norms("cross-attention norms of queries and keys", config),
    ]


def _mixing(name: str, config: ModelConfig, keys: float) -> Count:
    """Returns the count of attention to so many `keys`, which has no parameters.

    For each key and head a token spends 2H FLOPs on the score and as many on the weighted sum of
    values.
    """
    n, h, layers = config.num_heads, config.head_dim, config.num_layers
    return Count(name, f"{n} heads of {h}", layers, 0, 0, layers * 4 * n * h * keys)


def _norms(name: str, width: int, repeats: int) -> Count:
    """Returns the count of so many scales of norms."""
    return Count(name, f"{width}", repeats, repeats * width, repeats * width, 0.0)


def _head_norms(name: str, config: ModelConfig) -> list[Count]:
    """Returns the count of the norms of queries and keys, if a model has them."""
    return [_norms(name, config.head_dim, 2 * config.num_layers)] if config.qk_norm else []


def _feed_forward_counts(config: ModelConfig, sequence_length: int) -> list[Count]:
    """Returns the components that follow attention in dense and sparse layers.

    Components that the model does not have are left out.
    """
    d, f, moe = config.model_dim, config.feed_forward_dim, config.moe
    e, f_expert = moe.num_experts, moe.expert_dim
    f_shared = moe.num_shared_experts * moe.expert_dim
    num_sparse = len(config.sparse_layers)
    one_expert = 3 * d * f_expert  # its gate, up and down matrices
    active = _active_experts(config, sequence_length)
    counts = (
        _linear("feed-forward", f"2 x {d}x{f}, {f}x{d}", config.num_layers - num_sparse, 3 * d * f),
        _linear("router", f"{d}x{e}", num_sparse, 0 if moe.router == "hash" else d * e),
        _linear(
            "experts",
            f"{e} of (2 x {d}x{f_expert}, {f_expert}x{d}), {float(active):g} active",
            num_sparse,
            parameters=e * one_expert,
            active=active * one_expert,
        ),
        _linear(
            "shared experts", f"2 x {d}x{f_shared}, {f_shared}x{d}", num_sparse, 3 * d * f_shared
        ),
    )
    return [count for count in counts if count.parameters]


def _active_experts(config: ModelConfig, sequence_length: int) -> Fraction:
    """Returns how many routed experts process a token, which is a mean with expert choice.

    There each expert takes a number of tokens of the row, whatever the tokens want (Zhou et al.
    2022, section 3.1).
    """
    moe = config.moe
    if not moe.num_experts or moe.router != "expert_choice":
        return Fraction(moe.experts_per_token)
    tokens_of_expert = min(math.floor(moe.row_share * sequence_length), sequence_length)
    return Fraction(moe.num_experts * tokens_of_expert, sequence_length)


def _linear(
    name: str, shape: str, repeats: int, parameters: int, active: int | Fraction | None = None
) -> Count:
    """Returns the count of matrices that have so many `parameters` in each repeat.

    `active` is how many of them the forward pass of one token reads, by default all.
    """
    active = parameters if active is None else active
    flops = float(2 * repeats * active)
    return Count(name, shape, repeats, repeats * parameters, round(repeats * active), flops)
