"""Compares mixtures of experts with a dense model that spends as many FLOPs on a token.

dense        The base: two layers of width 64 with feed-forward parts of width 256, so small that
             4M bytes of text are enough for it.
moe_8_top1   Eight experts of that width, one for each token. What do eight times the feed-forward
             parameters give for the same FLOPs?
moe_32_top4  32 experts of a quarter of the width, four for each token. Are fine-grained experts
             (DeepSeekMoE, Dai et al. 2024) better?
unbalanced   moe_32_top4 without the balance loss. How uneven does the load become, and does it cost
             anything where nothing is dropped?
loss_free    moe_32_top4 balanced by biases on sigmoid scores (Wang et al. 2024). Is balance without
             a gradient of its own cheaper?
capacity_1   moe_32_top4 with experts that take no more than their even share and drop the rest.
             What do drops cost?

All but capacity_1 are dropless. All spend the same FLOPs on a token, but for the routers, which add
2.4 % where there are 32 experts and 0.6 % where there are eight.

Command:  python -m launch.compare --sweep=configs/experiments/moe_vs_dense.py
          --workdir=runs/moe_vs_dense --jobs=2
          One variant alone: python -m launch.train
          --config=configs/experiments/moe_vs_dense.py:moe_32_top4
          --workdir=runs/moe_32_top4
Hardware: 2 CPU cores.
Time:     18 runs in 58 minutes, two at a time, on one core each (AMD EPYC, Zen 3, jax 0.10.2).
          One run after the other was not measured.
Result:   nats per byte: dense 1.516, moe_8_top1 1.462, moe_32_top4 1.417, unbalanced 1.438,
          loss_free 1.426, capacity_1 1.419, with standard errors of 0.005 to 0.009. docs/moe.md
          says what this shows and what it does not.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from moe.config import RunConfig
from moe.scaling.experiments.sweep import Point, repeat

SEEDS = (0, 1, 2)

_WIDTH = 256
_FINE = {
    "model.moe.num_experts": 32,
    "model.moe.experts_per_token": 4,
    "model.moe.expert_dim": _WIDTH // 4,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe_8_top1": {
        "model.moe.num_experts": 8,
        "model.moe.experts_per_token": 1,
        "model.moe.expert_dim": _WIDTH,
        # Normalised, the weight of a single expert is always 1 and teaches the router nothing.
        "model.moe.normalize_weights": False,
    },
    "moe_32_top4": _FINE,
    "unbalanced": _FINE | {"model.moe.balance_weight": 0.0},
    "loss_free": _FINE
    | {
        "model.moe.router": "sigmoid",
        "model.moe.balance_weight": 0.0,
        "model.moe.bias_update_rate": 0.001,
    },
    "capacity_1": _FINE | {"model.moe.dispatch": "capacity", "model.moe.capacity_factor": 1.0},
}


def get_config(variant: str = "dense") -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=2,
        model_dim=64,
        feed_forward_dim=_WIDTH,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    config.model.compute_dtype = "float32"
    config.data.sequence_length = 256
    config.optimizer.update(learning_rate=3e-3, warmup_fraction=0.05)
    config.train.update(
        batch_size=16, steps=1000, eval_every=500, checkpoint_every=250, keep_last=1
    )
    config.tracking.tensorboard = False
    config.update_from_flattened_dict(VARIANTS[variant])
    return config


def get_sweep() -> Iterator[Point]:
    return repeat((Point(name, fields) for name, fields in VARIANTS.items()), SEEDS)
