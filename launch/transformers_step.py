"""Builds the training step of a config with Hugging Face's transformers on PyTorch, on a CPU.

`launch.benchmark --beside=transformers` times it in turn with this project's step. A dense config
becomes a Llama and a sparse one a Mixtral, with the same sizes, batches of the same shape, clipping
and AdamW. This project depends on neither package: pip install torch transformers.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from moe.config import ConfigError, RunConfig
from moe.config.sparse import MoEConfig

# What Mixtral computes as we do, whatever the values are.
_FREE = (
    *("num_experts", "experts_per_token", "expert_dim", "normalize_weights"),
    *("balance_weight", "balance_scope", "implementation", "exchange", "receive_factor"),
)


class TransformersStep(NamedTuple):
    """Holds a training step, and what describes it."""

    run: Callable[[], float]  # trains on one batch of random tokens, and returns the loss
    num_parameters: int
    versions: dict[str, str]
    experts: str | None  # which implementation of the experts transformers has chosen


def transformers_step(config: RunConfig) -> TransformersStep:
    """Makes the model, the optimizer and a batch. Raises ConfigError for what they cannot do."""
    try:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    except ImportError as error:
        raise ConfigError(
            f"--beside=transformers needs a package ({error}): pip install torch transformers"
        ) from None
    check_counterpart(config)
    torch.manual_seed(config.seed)
    sizes, sparse = _sizes(config), config.model.moe
    if sparse.num_experts:
        settings: Any = transformers.MixtralConfig(
            **sizes,
            intermediate_size=sparse.expert_dim,
            num_local_experts=sparse.num_experts,
            num_experts_per_tok=sparse.experts_per_token,
            output_router_logits=True,  # without them it computes no balance loss
            router_aux_loss_coef=sparse.balance_weight,
        )
        model: Any = transformers.MixtralForCausalLM(settings)
    else:
        settings = transformers.LlamaConfig(
            **sizes, intermediate_size=config.model.feed_forward_dim
        )
        model = transformers.LlamaForCausalLM(settings)
    return TransformersStep(
        _step(config, torch, model),
        sum(parameter.numel() for parameter in model.parameters()),
        {"torch": torch.__version__, "transformers": transformers.__version__},
        getattr(model.config, "_experts_implementation", None) if sparse.num_experts else None,
    )


def check_counterpart(config: RunConfig) -> None:
    """Raises ConfigError if transformers has no model that computes what a config says."""
    if config.task != "language_modelling":
        _refuse("task", config.task, "language_modelling")
    if config.model.compute_dtype != "float32":
        _refuse("model.compute_dtype", config.model.compute_dtype, "float32")
    if config.model.remat != "none":
        _refuse("model.remat", config.model.remat, "none")
    if config.model.qk_norm:
        _refuse("model.qk_norm", True, False)  # Llama and Mixtral have none
    sparse, default = config.model.moe, MoEConfig()
    if not sparse.num_experts:
        return
    if sparse.experts_per_token == 1:
        _refuse("model.moe.experts_per_token", 1, 2)  # Mixtral divides the only weight by itself
    if not sparse.normalized:
        _refuse("model.moe.normalize_weights", False, True)
    for field in dataclasses.fields(MoEConfig):
        value = getattr(sparse, field.name)
        if field.name not in _FREE and value != getattr(default, field.name):
            _refuse(f"model.moe.{field.name}", value, getattr(default, field.name))


def _refuse(name: str, value: Any, possible: Any) -> None:
    raise ConfigError(
        f"{name}={value!r} has no counterpart in the models of --beside=transformers: "
        f"set {name} to {possible!r}"
    )


def _sizes(config: RunConfig) -> dict[str, Any]:
    """Returns the fields that the configs of Llama and Mixtral share."""
    model = config.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": False,
    }


def _step(config: RunConfig, torch: Any, model: Any) -> Callable[[], float]:
    train, optimizer = config.train, config.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        fused=True,  # the fastest of its implementations
    )
    shape = (train.accumulation, train.batch_size // train.accumulation)
    tokens = torch.randint(config.model.vocab_size, (*shape, config.data.sequence_length))

    def run() -> float:
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for microbatch in tokens:
            loss = model(input_ids=microbatch, labels=microbatch).loss / train.accumulation
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
        adamw.step()
        return total

    return run
