"""Chooses a model's shape from its width, and its hyperparameters from its size and tokens.

An experiment over sizes needs a rule for everything that it does not vary. These are the rules:

- A model keeps the proportions of a base model. Its depth and its feed-forward widths grow with its
  width, and its heads keep their width as nearly as they can.
- The learning rate, the batch and the warm-up follow Porian et al. 2024 (arXiv 2406.19146), who
  tuned models of 5M to 901M parameters. Their rounded fits are a learning rate of 0.0047 and 160
  rows of 2048 tokens at 108M parameters, with the exponents -1/3 and 2/3 in the number N of
  parameters. They warm up for as many tokens as the model has parameters.

They trained each size on D = 20 N tokens, so the batch may follow from either number. Here it
follows from D: on an iso-FLOP curve a large model sees few tokens, and a batch that grew with its
size would leave it too few steps. Where the batch is smaller than theirs, the learning rate goes
with its square root, as Adam's should (Malladi et al. 2022, arXiv 2205.10287). In all it then goes
as N^(-2/3) D^(1/3); Li et al. 2025 (arXiv 2503.04715) have found N^(-0.713) D^(0.307). Where the
batch is larger, the model sees more than 20 tokens per parameter, and the learning rate stays as it
is: small models on bytes were worse with a higher one.
"""

import dataclasses
import math
from typing import NamedTuple

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.config.layout import count_batch_parts
from moe.scaling.flops import total_parameters, training_flops_per_token

_PARAMETERS = 108e6  # the size at which the following two numbers hold
_LEARNING_RATE, _LEARNING_RATE_EXPONENT = 0.0047, -1 / 3
_BATCH_TOKENS, _BATCH_EXPONENT = 160 * 2048, 2 / 3
_TOKENS_PER_PARAMETER = 20
# The fractions of a run in which it warms up at least and at most: models that see many tokens have
# large batches for their size, so that as many tokens as they have parameters are few steps.
_SHORTEST_WARMUP, _LONGEST_WARMUP = 0.02, 0.2
_SAVES = 5  # checkpoints of a run
_WIDTH_UNIT = 8  # feed-forward widths are multiples of this


class Hyperparameters(NamedTuple):
    """Says how a model of some size is trained on some number of tokens."""

    learning_rate: float
    batch_size: int  # rows
    warmup_fraction: float
    steps: int


def scale_model(base: ModelConfig, width: int) -> ModelConfig:
    """Returns a model of another width with the proportions of `base`.

    The number of layers is rounded, and is at least 2, or what experts need: one layer of attention
    cannot copy (Olsson et al. 2022, arXiv 2209.11895). The number of heads is the divisor of the
    width that makes the heads' width, which is even, nearest to that of `base`.
    """
    ratio = width / base.model_dim
    least = base.moe.first_dense_layers + base.moe.layer_period if base.moe.num_experts else 0
    heads = _count_heads(width, base.head_dim)
    groups = heads * base.num_kv_heads / base.num_heads
    moe = dataclasses.replace(base.moe, expert_dim=_round_width(base.moe.expert_dim * ratio))
    return dataclasses.replace(
        base,
        model_dim=width,
        num_layers=max(2, least, round(base.num_layers * ratio)),
        feed_forward_dim=_round_width(base.feed_forward_dim * ratio),
        num_heads=heads,
        num_kv_heads=max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, groups)),
        head_dim=width // heads,
        moe=moe if base.moe.num_experts else base.moe,
    )


def _count_heads(width: int, head_dim: int) -> int:
    """Returns the number of heads whose width has the ratio to `head_dim` that is nearest to 1."""
    counts = [n for n in range(1, width + 1) if width % n == 0 and (width // n) % 2 == 0]
    return min(counts or [1], key=lambda n: abs(math.log(width / n / head_dim)))


def _round_width(width: float) -> int:
    return max(1, round(width / _WIDTH_UNIT)) * _WIDTH_UNIT


def tune(
    model: ModelConfig,
    sequence_length: int,
    tokens: float,
    learning_rate_factor: float = 1.0,
    batch_multiple: int = 1,
) -> Hyperparameters:
    """Returns the hyperparameters of a model that is trained on so many tokens.

    The batch is a multiple of `batch_multiple` rows, such as the parts into which a mesh splits it.
    Parameters are counted without the embedding matrix, also where it is the unembedding too. A
    model with experts counts as its dense twin, the model without experts whose feed-forward width
    is `feed_forward_dim`. `learning_rate_factor` moves the rule to another optimizer, data set or
    length of training.
    """
    twin = dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=0))
    parameters = total_parameters(twin) - model.vocab_size * model.model_dim
    size_by_tokens = tokens / _TOKENS_PER_PARAMETER
    batch_tokens = _BATCH_TOKENS * (size_by_tokens / _PARAMETERS) ** _BATCH_EXPONENT
    rate = _LEARNING_RATE * (parameters / _PARAMETERS) ** _LEARNING_RATE_EXPONENT
    batch_ratio = (size_by_tokens / parameters) ** _BATCH_EXPONENT  # to their batch at this size
    rate *= math.sqrt(min(batch_ratio, 1.0))
    multiples = max(1, round(batch_tokens / sequence_length / batch_multiple))
    batch_size = multiples * batch_multiple
    return Hyperparameters(
        learning_rate=_round_digits(rate * learning_rate_factor),
        batch_size=batch_size,
        warmup_fraction=_round_digits(
            min(max(parameters / tokens, _SHORTEST_WARMUP), _LONGEST_WARMUP)
        ),
        steps=max(1, round(tokens / (batch_size * sequence_length))),
    )


def _round_digits(value: float) -> float:
    """Rounds to three digits, as a person would write the value."""
    return float(f"{value:.3g}")


def scale_run(
    base: RunConfig, model: ModelConfig, tokens: float, learning_rate_factor: float = 1.0
) -> RunConfig:
    """Returns the run that trains `model` on so many tokens, by the rules of this file.

    It is evaluated at its end, and saved up to five times. Everything else is as in `base`, whose
    mesh splits the batch evenly. Raises ConfigError for fewer tokens than half a step has.
    """
    sizes = {axis: abs(size) for axis, size in dataclasses.asdict(base.mesh).items()}
    batch_multiple = count_batch_parts(sizes)
    length = base.data.sequence_length
    chosen = tune(model, length, tokens, learning_rate_factor, batch_multiple)
    if tokens < chosen.batch_size * length / 2:
        raise ConfigError(
            f"{tokens:.3g} tokens are too few for one step of a model of width {model.model_dim}, "
            f"which has at least {chosen.batch_size * length:,}: give it more tokens or FLOPs"
        )
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=chosen.learning_rate,
        warmup_fraction=chosen.warmup_fraction,
        warmup_steps=None,
    )
    train = dataclasses.replace(
        base.train,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        accumulation=1,
        eval_every=chosen.steps,
        checkpoint_every=-(-chosen.steps // _SAVES),
    )
    return dataclasses.replace(base, model=model, optimizer=optimizer, train=train)


def tokens_for(model: ModelConfig, sequence_length: int, flops: float) -> float:
    """Returns the number of tokens on which a model can be trained with so many FLOPs."""
    return flops / training_flops_per_token(model, sequence_length)
