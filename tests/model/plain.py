"""A Transformer of plain loops in float64, which the models are compared with.

Arrays have no batch dimension: each function takes one row. Parameters are those of one layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe.config import ModelConfig

Tree = dict[str, Any]
# Whether query t of the first sequence sees key s of the second.
Sees = Callable[[int, int], bool]


def float64(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def draw_scales(tree: Tree) -> Tree:
    """Draws the norms' scales, which start as ones: where one is left out, that would not show."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf * rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key == "scale" else leaf

    return jax.tree_util.tree_map_with_path(draw, tree)


def norm(config: ModelConfig, x: np.ndarray, params: Tree) -> np.ndarray:
    mean_square = np.mean(x * x, -1, keepdims=True)
    return x / np.sqrt(mean_square + config.norm_epsilon) * params["scale"]


def rotate(config: ModelConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary positions as complex numbers: pair i of a head turns by position / base^(2i/H)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * config.rope_base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def attention(
    config: ModelConfig,
    params: Tree,
    x: np.ndarray,
    memory: np.ndarray,
    sees: Sees,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of `x` to `memory`, with rotary positions if these are given."""
    query = np.einsum("td,dnh->tnh", x, params["query"])
    key, value = (np.einsum("sd,dkh->skh", memory, params[name]) for name in ("key", "value"))
    if config.qk_norm:
        query = norm(config, query, params["query_norm"])
        key = norm(config, key, params["key_norm"])
    if positions is not None:
        query, key = rotate(config, query, positions), rotate(config, key, positions)
    mixed = np.zeros_like(query)
    for t in range(len(x)):
        seen = [s for s in range(len(memory)) if sees(t, s)]
        for n in range(config.num_heads):
            shared = n // (config.num_heads // config.num_kv_heads)
            weights = np.exp(key[seen, shared] @ query[t, n] / np.sqrt(config.head_dim))
            if seen:
                mixed[t, n] = weights @ value[seen, shared] / weights.sum()
    return np.einsum("tnh,nhd->td", mixed, params["output"])


def feed_forward(params: Tree, x: np.ndarray) -> np.ndarray:
    gate, up = x @ params["gate"], x @ params["up"]
    return (gate / (1 + np.exp(-gate)) * up) @ params["down"]


def stack(
    config: ModelConfig,
    params: Tree,
    x: np.ndarray,
    sees: Sees,
    positions: np.ndarray,
    memory: np.ndarray | None = None,
    sees_memory: Sees | None = None,
) -> np.ndarray:
    """All layers of a dense stack and its final norm. `params` is the stack's whole tree."""
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[number], params["layers_0"]["block_0"])  # noqa: B023
        normed = norm(config, x, layer["attention_norm"])
        x = x + attention(config, layer["attention"], normed, normed, sees, positions)
        if memory is not None and sees_memory is not None:
            normed = norm(config, x, layer["cross_attention_norm"])
            x = x + attention(config, layer["cross_attention"], normed, memory, sees_memory)
        normed = norm(config, x, layer["feed_forward_norm"])
        x = x + feed_forward(layer["feed_forward"], normed)
    return norm(config, x, params["final_norm"])
