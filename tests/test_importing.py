"""The examples of docs/importing.md, run as they stand there, in the order of the page."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import ModelConfig, MoE, MoEConfig, Transformer
from moe.experts import Weights, dropless
from moe.kernels.attention import flash_attention
from moe.routing import route

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/importing.md").read_text(), re.DOTALL)
NAMES = {"eqx": eqx, "jax": jax, "nnx": nnx, "MoE": MoE, "MoEConfig": MoEConfig, "ModelConfig": ModelConfig, "route": route}
NAMES |= {"flash_attention": flash_attention, "q": jnp.ones((1, 9, 4, 8)), "k": jnp.ones((1, 9, 2, 8)), "v": jnp.ones((1, 9, 2, 8))}
NAMES |= {"Weights": Weights, "dropless": dropless, "gate": jnp.ones((8, 16, 4)), "up": jnp.ones((8, 16, 4)), "down": jnp.ones((8, 4, 16))}


def run(block: str) -> dict:
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    names = NAMES | {"Transformer": Transformer, "tokens": jnp.ones((2, 6), jnp.int32), "x": x, "w_router": jnp.ones((16, 8))}
    exec(block, names)  # what the page says, word for word
    return names


def test_the_page_has_the_examples() -> None:
    assert len(BLOCKS) == 7


def test_a_transformer() -> None:
    assert run(BLOCKS[0])["output"].hidden.shape == (2, 6, 256)


def test_a_sparse_layer_in_linen() -> None:
    names = run(BLOCKS[1])
    assert names["y"].shape == (2, 6, 16)
    assert names["balance_loss"] >= 0.5


def test_a_sparse_layer_in_nnx() -> None:
    names = run(BLOCKS[2])
    assert names["y"].shape == (2, 6, 16)
    assert names["routing"].sums["load"].sum() == 2 * 6 * 2


def test_the_router_alone() -> None:
    assert run(BLOCKS[3])["routing"].experts_BTA.shape == (2, 6, 2)


def test_the_router_in_equinox() -> None:
    names = run(BLOCKS[4])
    router = names["Router"](names["w_router"])
    loss = lambda router: jnp.sum(router(names["x"]).weights_BTA[..., 0])  # noqa: E731
    assert eqx.filter_grad(loss)(router).weight.shape == (16, 8)


def test_the_experts_alone() -> None:
    names = run(BLOCKS[5])
    total = jnp.sum(names["x"][0], axis=-1, keepdims=True)  # of weights that are all 1, and four experts' hidden units
    expected = jnp.broadcast_to(4 * jax.nn.silu(total) * total, (6, 16))
    # What rounding takes off `total` is a part of the 16 numbers that it sums, which may cancel: of the largest result, not of each.
    np.testing.assert_allclose(names["y"], expected, atol=1e-6 * float(jnp.max(expected)))


@pytest.mark.parametrize("name", ["MoE", "MoEConfig"])
def test_names_are_importable_from_the_top(name: str) -> None:
    import moe

    assert name in dir(moe)


def test_attention_alone() -> None:
    np.testing.assert_allclose(run(BLOCKS[6])["output"], np.ones((1, 9, 4, 8)), rtol=1e-6)
