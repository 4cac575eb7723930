"""Holds the model that most tests train, and the names of the tasks that they all train."""

from typing import get_args

from moe.config import ModelConfig
from moe.config.objectives import TaskName

# The tasks that a config can name, but for that of most tests. Where a test takes these, a new task
# is tested as the others are.
OTHER_TASKS = tuple(
    name for name in get_args(TaskName) if name not in ("language_modelling", "custom")
)

# One layer, whose training takes seconds. Tests that need another size replace a field of it.
TINY_MODEL = ModelConfig(
    num_layers=1,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    compute_dtype="float32",
)
