"""Configures the model and its attention."""

import dataclasses
import math
from typing import Literal

from moe.config.checks import (
    LARGEST_INT,
    ConfigError,
    as_computed,
    check_positive,
    check_range,
    check_types,
    nearest_divisors,
)
from moe.config.data import BYTE_VOCABULARY
from moe.config.sparse import MoEConfig

# The layers of a period are unrolled in the program, and each layer has its own lines in
# router.jsonl, so the number of layers has a bound.
MAX_LAYERS = 2**16
# The largest number of elements in an array. XLA counts bytes in int64, and a training state holds
# each parameter several times.
MAX_ELEMENTS = 2**59


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Says how attention is computed. None of these fields changes what it computes."""

    # The program that computes attention. "auto" takes the fastest one for the mesh's chip, and
    # docs/kernels.md says what each one can do.
    implementation: Literal["auto", "blockwise", "tpu", "hopper", "hopper_fused", "cudnn"] = "auto"
    # How attention works over the mesh's context axis: "ring" sends keys around a ring of devices,
    # and "ulysses" gives each device all tokens of some heads. docs/context.md compares them.
    context_parallelism: Literal["ring", "ulysses"] = "ring"

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describes a Transformer: RMSNorm, rotary positions, grouped queries and SwiGLU.

    Decoders and encoders read the same fields. The class of the model says which of them it is.
    """

    vocab_size: int = BYTE_VOCABULARY  # the number of token ids that the model can read and predict
    num_layers: int = 4  # the number of Transformer layers
    model_dim: int = 256  # the width of the residual stream
    feed_forward_dim: int = 704  # the hidden width of a dense layer's feed-forward network
    num_heads: int = 4  # the number of query heads
    # The number of key/value heads. Each is shared by num_heads / num_kv_heads query heads.
    num_kv_heads: int = 2
    head_dim: int = 64  # the width of one head
    rope_base: float = 10_000.0  # the base of the frequencies of rotary positions
    norm_epsilon: float = 1e-6  # the number that RMSNorm adds to the mean square before the root
    # True gives each head of a query and of a key a norm of its own before the rotation (QK-norm),
    # so that the scores of attention cannot grow with these.
    qk_norm: bool = False
    tied_embeddings: bool = False  # True computes the logits with the embedding's own matrix
    # The type of activations. Parameters, norms, softmax and losses are float32 in any case.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass computes again to save memory: "none" stores all activations, "full"
    # only the input of each layer, and "offload" stores that in the host's memory. Between these,
    # "save_attention" also stores the outputs of attention, and "save_exchange" what devices sent
    # each other for experts (docs/training.md has a table).
    remat: Literal["none", "save_exchange", "save_attention", "offload", "full"] = "none"
    # True compiles one layer and loops over it; False writes every layer into the program.
    # Parameters are stored in the same way for both.
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
        if not as_computed(self, "rope_base") >= 1:
            raise ConfigError(
                f"rope_base={self.rope_base} turns later pairs faster than the first: "
                "set rope_base to 1.0 or more"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}: "
                f"set num_kv_heads to {nearest_divisors(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs of numbers: "
                "set head_dim to an even number"
            )
        self._check_experts()
        self._check_sizes()

    def _check_experts(self) -> None:
        """Raises ConfigError for fields that leave no layer for experts, or ask for some."""
        reach = self.moe.first_dense_layers + self.moe.layer_period
        if self.moe.num_experts and reach > self.num_layers:
            raise ConfigError(
                f"moe.first_dense_layers={self.moe.first_dense_layers} and "
                f"moe.layer_period={self.moe.layer_period} leave no sparse layer among "
                f"num_layers={self.num_layers}: set num_layers to at least {reach}"
            )
        if self.remat == "save_exchange" and not self.moe.num_experts:
            raise ConfigError(
                "remat='save_exchange' saves what experts receive, and no layer has experts: "
                "set remat to 'save_attention', or moe.num_experts to a positive number"
            )

    def _check_sizes(self) -> None:
        """Raises ConfigError for a parameter that is larger than an array can be."""
        products = [
            (LARGEST_INT, ("num_heads", "head_dim")),
            (MAX_ELEMENTS, ("vocab_size", "model_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "num_heads", "head_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "feed_forward_dim")),
        ]
        if self.moe.num_experts:
            layer = ("num_layers", "model_dim")
            products += [
                (LARGEST_INT, ("moe.num_shared_experts", "moe.expert_dim")),
                (MAX_ELEMENTS, (*layer, "moe.num_experts", "moe.expert_dim")),
                (MAX_ELEMENTS, (*layer, "moe.num_shared_experts", "moe.expert_dim")),
            ]
        for limit, names in products:
            values = {
                name: getattr(self.moe if name.startswith("moe.") else self, name.split(".")[-1])
                for name in names
            }
            if math.prod(values.values()) > limit:
                sizes = ", ".join(f"{name}={value}" for name, value in values.items())
                raise ConfigError(
                    f"{sizes} make an array that is too large: "
                    f"set them to a product of at most {limit}"
                )

    def without_jitter(self) -> "ModelConfig":
        """Returns the same config for evaluation, in which nothing is random."""
        return dataclasses.replace(self, moe=dataclasses.replace(self.moe, jitter=0.0))

    @property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Returns the groups of layers, each as (the kinds of the layers of one period, repeats).

        A kind is "dense" or "moe". The model runs one scan for each group, over its periods.
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
    def pipelined_group(self) -> int:
        """Returns the number of the group whose layers are the stages of a pipeline.

        It is the group with the experts, or that of all layers. The few dense layers before and
        after the experts are no part of any stage.
        """
        return next((n for n, (kinds, _) in enumerate(self.layer_groups) if "moe" in kinds), 0)

    @property
    def sparse_layers(self) -> list[int]:
        """Returns the numbers of the layers that have experts, counting all layers from 0."""
        kinds = [kind for kinds, repeats in self.layer_groups for kind in kinds * repeats]
        return [number for number, kind in enumerate(kinds) if kind == "moe"]
