"""The config of the model and of its attention."""

import dataclasses
import math
from typing import Literal

from moe.config.checks import (
    LARGEST_INT,
    ConfigError,
    check_positive,
    check_range,
    check_types,
    computed,
    nearest_divisors,
)
from moe.config.data import BYTE_VOCABULARY
from moe.config.sparse import MoEConfig

MAX_LAYERS = (
    2**16
    # the layers of a period are unrolled in the program, and each layer has lines of its own in
    # router.jsonl
)
MAX_ELEMENTS = (
    2**59
)  # of an array; XLA counts bytes in int64, and a training state holds each parameter several times


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; what it computes is the model's."""

    # "auto" takes the fastest on the chip that the mesh is made of; docs/kernels.md says what each
    # can do.
    implementation: Literal["auto", "blockwise", "tpu", "hopper", "hopper_fused"] = "auto"
    # Over the mesh's context axis: keys go around a ring, or each device gets all tokens of some
    # heads. docs/context.md compares them.
    context_parallelism: Literal["ring", "ulysses"] = "ring"

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int = BYTE_VOCABULARY  # token ids that the embedding and the logits have
    num_layers: int = 4  # Transformer layers
    model_dim: int = 256  # width of the residual stream
    feed_forward_dim: int = 704  # width within a dense feed-forward part
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key/value heads, each shared by as many query heads
    head_dim: int = 64  # width of a head
    rope_base: float = 10_000.0  # base of the rotary positions' frequencies
    norm_epsilon: float = 1e-6  # added to the mean square that RMSNorm divides by
    tied_embeddings: bool = False  # the embedding makes the logits too
    # The type of activations. Parameters, norms, softmax and losses are float32 whatever this says.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What is computed again in the backward pass: "full" keeps only each layer's input.
    remat: Literal["none", "full"] = "none"
    # True compiles one layer and loops; False unrolls the loop in the program. Parameters are
    # stacked either way.
    scan_layers: bool = True
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self,
            "vocab_size",
            "num_layers",
            "model_dim",
            "feed_forward_dim",
            "num_heads",
            "num_kv_heads",
        )
        check_positive(self, "head_dim", "rope_base", "norm_epsilon")
        check_range(self, 1, MAX_LAYERS, "num_layers")
        if not computed(self, "rope_base") >= 1:
            raise ConfigError(
                f"rope_base={self.rope_base} turns later pairs faster than the first: set rope_base to 1.0 or more"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                f"set num_kv_heads to {nearest_divisors(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd, and rotary positions turn pairs: set an even head_dim"
            )
        reach = self.moe.first_dense_layers + self.moe.layer_period
        if self.moe.num_experts and reach > self.num_layers:
            raise ConfigError(
                f"moe.first_dense_layers={self.moe.first_dense_layers} and moe.layer_period={self.moe.layer_period} leave no sparse layer "
                f"of num_layers={self.num_layers}: set num_layers to at least {reach}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises ConfigError for parameters with a dimension or a number of elements that no array
        can have.
        """
        products = [
            (LARGEST_INT, ("num_heads", "head_dim")),
            (MAX_ELEMENTS, ("vocab_size", "model_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "num_heads", "head_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "feed_forward_dim")),
        ]
        if self.moe.num_experts:
            products += [
                (LARGEST_INT, ("moe.num_shared_experts", "moe.expert_dim")),
                (MAX_ELEMENTS, ("num_layers", "model_dim", "moe.num_experts", "moe.expert_dim")),
                (
                    MAX_ELEMENTS,
                    ("num_layers", "model_dim", "moe.num_shared_experts", "moe.expert_dim"),
                ),
            ]
        for limit, names in products:
            values = [
                getattr(self.moe if name.startswith("moe.") else self, name.removeprefix("moe."))
                for name in names
            ]
            if math.prod(values) > limit:
                sizes = ", ".join(
                    f"{name}={value}" for name, value in zip(names, values, strict=True)
                )
                raise ConfigError(
                    f"{sizes} make an array larger than any can be: set them to a product of at most {limit}"
                )

    @property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Groups of layers, each ((the kinds of one period, "dense" or "moe"), repeats); a group is
        one scan over its periods.
        """
        if not self.moe.num_experts:
            return ((("dense",), self.num_layers),)
        first, period = self.moe.first_dense_layers, self.moe.layer_period
        repeats, rest = divmod(self.num_layers - first, period)
        groups = (
            (("dense",), first),
            (("dense",) * (period - 1) + ("moe",), repeats),
            (("dense",), rest),
        )
        return tuple(group for group in groups if group[1])

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the layers that have experts, among all layers, from 0."""
        kinds = [kind for kinds, repeats in self.layer_groups for kind in kinds * repeats]
        return [number for number, kind in enumerate(kinds) if kind == "moe"]
