"""Runs the examples of docs/importing.md as they stand there, in the order of the page.

Those of README.md and docs/kernels.md, which show the same calls, are run too.
"""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import ModelConfig, RunConfig
from moe.config import TrainConfig
from moe.training import trainer
from moe.training.train_step import make_program

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = CODE.findall((ROOT / "docs/importing.md").read_text())
# What the page says is the reader's own. Everything else it imports.
NAMES = {
    "jax": jax,
    "jnp": jnp,
    "np": np,
    "optax": optax,
    "q": jnp.ones((1, 9, 4, 8)),
    "k": jnp.ones((1, 9, 2, 8)),
    "v": jnp.ones((1, 9, 2, 8)),
    "gate": jnp.ones((8, 16, 4)),
    "up": jnp.ones((8, 16, 4)),
    "down": jnp.ones((8, 4, 16)),
}


def run(block: str, **more: object) -> dict:
    """Runs an example with the names that the page assumes, and returns the names it leaves."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    names = (
        NAMES
        | {
            "tokens": jnp.ones((2, 6), jnp.int32),
            "sources": jnp.ones((2, 5), jnp.int32),
            "x": x,
            "w_router": jnp.ones((16, 8)),
        }
        | more
    )
    exec(block, names)  # word for word what the page says
    return names


def test_the_page_has_the_examples() -> None:
    assert len(BLOCKS) == 12


def test_the_readme() -> None:
    (block,) = CODE.findall((ROOT / "README.md").read_text())
    names: dict = {}
    exec(block, names)  # it needs nothing but its own lines
    assert names["output"].hidden.shape == (2, 16, 256)


def test_the_page_about_kernels() -> None:
    block, *_ = CODE.findall((ROOT / "docs/kernels.md").read_text())
    names = run(block, ids=jnp.ones((1, 9), jnp.int32))
    np.testing.assert_allclose(names["output"], np.ones((1, 9, 4, 8)), rtol=1e-6)


def test_a_transformer() -> None:
    assert run(BLOCKS[0])["output"].hidden.shape == (2, 6, 256)


def test_an_encoder_and_an_encoder_decoder() -> None:
    names = run(BLOCKS[1])
    assert names["encoded"].hidden.shape == names["output"].hidden.shape == (2, 6, 256)


def test_a_checkpoint_as_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writes a run's first state. Other tests show that load_run reads a checkpoint."""
    pytest.importorskip("safetensors")
    config = RunConfig(
        model=ModelConfig(num_layers=1, model_dim=16, num_heads=2, head_dim=8),
        train=TrainConfig(batch_size=1),
    )
    program = make_program(config, jax.devices()[:1])
    variables = program.init_state().variables
    monkeypatch.setattr(trainer, "load_run", lambda workdir: (config, program, variables, 3))
    names = run(BLOCKS[2], workdir=tmp_path, file=tmp_path / "params.safetensors")
    assert names["output"].hidden.shape == (2, 6, 16)
    jax.tree.map(np.testing.assert_array_equal, names["params"], names["arrays"])


def test_a_training_loop_with_biases_and_jitter() -> None:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 6)), jnp.int32)
    batch = {
        "tokens": ids,
        "targets": ids,
        "loss_mask": ids >= 0,
        "segment_ids": jnp.ones((2, 6), jnp.int32),
    }
    names = run(BLOCKS[3], batch=batch | {"positions": jnp.broadcast_to(jnp.arange(6), (2, 6))})
    [bias] = jax.tree.leaves(names["router_state"])
    assert np.isfinite(names["metrics"]["loss"]) and 0 < np.abs(bias).max() <= 0.03


def test_attention_on_a_mesh_of_its_own() -> None:
    assert run(BLOCKS[4])["output"].sharding.spec[:3] == ("rows", None, "heads")


def test_a_ring_inside_shard_map() -> None:
    np.testing.assert_allclose(run(BLOCKS[5])["output"], np.ones((1, 16, 4, 8)), rtol=1e-6)


def test_a_sparse_layer_in_linen() -> None:
    names = run(BLOCKS[6])
    assert names["y"].shape == (2, 6, 16)
    assert names["balance_loss"] >= 0.5


def test_a_sparse_layer_in_nnx() -> None:
    names = run(BLOCKS[7])
    assert names["y"].shape == (2, 6, 16)
    assert names["routing"].stats.load.sum() == 2 * 6 * 2


def test_the_router_alone() -> None:
    assert run(BLOCKS[8])["routing"].experts_BTA.shape == (2, 6, 2)


def test_the_router_in_equinox() -> None:
    names = run(BLOCKS[9])
    router = names["Router"](names["w_router"])
    loss = lambda router: jnp.sum(router(names["x"]).weights_BTA[..., 0])
    assert eqx.filter_grad(loss)(router).weight.shape == (16, 8)


def test_the_experts_alone() -> None:
    names = run(BLOCKS[10])
    # All weights are 1, so every hidden unit is silu(total) * total, and down adds up four of them.
    total = jnp.sum(names["x"][0], axis=-1, keepdims=True)
    expected = jnp.broadcast_to(4 * jax.nn.silu(total) * total, (6, 16))
    # The 16 numbers in `total` may cancel, so a small result has a large relative error. The error
    # is therefore compared with the largest result.
    np.testing.assert_allclose(names["y"], expected, atol=1e-6 * float(jnp.max(expected)))


@pytest.mark.parametrize("name", ["MoE", "MoEConfig"])
def test_names_are_importable_from_the_top(name: str) -> None:
    import moe

    assert name in dir(moe)


def test_attention_alone() -> None:
    np.testing.assert_allclose(run(BLOCKS[11])["output"], np.ones((1, 9, 4, 8)), rtol=1e-6)
