"""Holds the model that most tests train."""

from moe.config import ModelConfig

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
