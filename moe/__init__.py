"""Provides dense and sparse Transformers in JAX.

    from moe import ModelConfig, MoE, MoEConfig, Transformer

Names are loaded when first used (PEP 562), so importing a kernel loads no Flax, and importing a
config no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.config import ConfigError, ModelConfig, MoEConfig, RunConfig
    from moe.inference.generate import generate
    from moe.model.experts import MoE
    from moe.model.routing import route
    from moe.model.transformer import Transformer
    from moe.training.train_step import make_program
    from moe.training.trainer import fit, load_run

# The module in which each public name is defined.
_MODULES = {
    "ConfigError": "config",
    "MoE": "model.experts",
    "MoEConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Transformer": "model.transformer",
    "fit": "training.trainer",
    "generate": "inference.generate",
    "load_run": "training.trainer",
    "make_program": "training.train_step",
    "route": "model.routing",
}

__all__ = [
    "ConfigError",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "Transformer",
    "fit",
    "generate",
    "load_run",
    "make_program",
    "route",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Lists the public names too, although they are not loaded yet."""
    return sorted({*globals(), *__all__})
