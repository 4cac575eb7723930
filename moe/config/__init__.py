"""Provides the types of a run's config, with their defaults and checks.

Config files hold ml_collections ConfigDicts; the code sees only these frozen dataclasses. Every
default lives here, and every field and every pair of fields is checked here, before JAX is
imported: a mistake costs a second and one line, not a queue slot.
"""

from moe.config.checks import ConfigError
from moe.config.data import BYTE_VOCABULARY, MIXTURE_BLOCK, DataConfig, SourceConfig
from moe.config.layout import AXES, RULES, MeshConfig, Schedule, check_layout, split_axes
from moe.config.model import AttentionConfig, ModelConfig
from moe.config.run import PLACE_FIELDS, RunConfig, flatten
from moe.config.sparse import MoEConfig
from moe.config.training import OptimizerConfig, TrackingConfig, TrainConfig

__all__ = [
    "AXES",
    "BYTE_VOCABULARY",
    "MIXTURE_BLOCK",
    "PLACE_FIELDS",
    "RULES",
    "AttentionConfig",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Schedule",
    "SourceConfig",
    "TrackingConfig",
    "TrainConfig",
    "check_layout",
    "flatten",
    "split_axes",
]
