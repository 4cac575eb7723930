"""Sums over tokens, rows, microbatches and devices are taken in float32, whatever the activations
are.

A bfloat16 model's gradients are compared with those of the float32 model that has the same
parameters, leaf by leaf, on long rows of few distinct tokens: a sum that is rounded to bfloat16 on
the way loses most of such a gradient, while rounded activations cost it less than 1 %.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moe.model.arrangement import arrange_equally, combine
from moe.model.dispatch import dense, with_capacity
from moe.model.layers import look_up
from moe.model.transformer import Transformer
from moe.parallel.context import ulysses_attention
from moe.parallel.mesh import global_batch, make_mesh, shardings
from moe.parameters import unbox
from moe.tasks import make_task
from moe.tasks.language_modelling import DIMS
from moe.training.optimizer import make_schedule
from moe.training.train_step import make_train_step, new_state

TOLERANCE = 0.02  # of a leaf's norm
DISTINCT = 4  # tokens of the vocabulary that the rows hold

MOE = MoEConfig(
    num_experts=4,
    experts_per_token=2,
    expert_dim=32,
    num_shared_experts=1,
    capacity_factor=2.0,
    z_weight=0.01,
)
DENSE = ModelConfig(
    vocab_size=256,
    num_layers=2,
    model_dim=32,
    feed_forward_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
SPARSE = dataclasses.replace(DENSE, moe=MOE)

ONE_DEVICE = {"data": 1}
MESHES = {
    "one device": ONE_DEVICE,
    "data 2, expert 4": {"data": 2, "expert": 4},
    "fsdp 2, expert 2, tensor 2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp 2, context 2, tensor 2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
# No experts, or a dispatch and, where the mesh has an expert axis, an exchange.
KINDS = {
    "no experts": None,
    "dense": ("dense", "all_gather"),
    "capacity": ("capacity", "all_gather"),
    "capacity, all-to-all": ("capacity", "all_to_all"),
    "dropless": ("dropless", "all_gather"),
}


def make_config(
    kind: str, mesh: str, *, tied: bool, scan: bool, microbatches: int, rows: int, length: int
) -> RunConfig:
    model = dataclasses.replace(DENSE, tied_embeddings=tied, scan_layers=scan)
    if KINDS[kind]:
        dispatch, exchange = KINDS[kind]
        model = dataclasses.replace(
            model,
            moe=dataclasses.replace(MOE, dispatch=dispatch, exchange=exchange, balance_scope="row"),
        )
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        optimizer=OptimizerConfig(warmup_fraction=0.1),
        mesh=MeshConfig(**MESHES[mesh]),
        train=TrainConfig(batch_size=rows, accumulation=microbatches, steps=10, loss_chunk=512),
    )


def batch_rows(rows: int, length: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(4).integers(0, DISTINCT, (rows, length + 1)).astype(np.int32)
    shape = (rows, length)
    whole = {
        "loss_mask": np.ones(shape, bool),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.arange(length, dtype=np.int32),
    }
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]} | {
        name: np.broadcast_to(x, shape) for name, x in whole.items()
    }


@functools.cache
def declared(sparse: bool, tied: bool) -> Any:
    model = Transformer(dataclasses.replace(SPARSE if sparse else DENSE, tied_embeddings=tied))
    return jax.eval_shape(
        lambda key: model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)}), jax.random.key(0)
    )


@functools.cache
def variables(sparse: bool, tied: bool) -> Any:
    """Parameters drawn once; embeddings are large, so that rounding does not change which experts
    are chosen.
    """
    model = Transformer(dataclasses.replace(SPARSE if sparse else DENSE, tied_embeddings=tied))
    drawn = jax.jit(lambda key: unbox(model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})))(
        jax.random.key(0)
    )
    return jax.device_get(
        {"params": drawn["params"] | {"embedding": 32 * drawn["params"]["embedding"]}}
    )


KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)


def gradients(config: RunConfig, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each leaf of the gradient that a train step computes, and the experts' load."""
    mesh = make_mesh(config, jax.devices()[: int(np.prod(config.mesh.sizes))])
    sparse, tied = bool(config.model.moe.num_experts), config.model.tied_embeddings
    placed = jax.device_put(variables(sparse, tied), shardings(declared(sparse, tied), mesh))[
        "params"
    ]
    state = new_state(placed, KEEP_GRADIENT.init(placed), {})
    model = Transformer(dataclasses.replace(config.model, compute_dtype=dtype))
    step = make_train_step(config, model, KEEP_GRADIENT, make_task(config), make_schedule(config))
    rows, length = config.train.batch_size, config.data.sequence_length
    with jax.set_mesh(mesh):
        new, metrics = jax.jit(step)(
            state, global_batch(batch_rows(rows, length), mesh, rows, DIMS)
        )
    leaves = {
        jax.tree_util.keystr(path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(new.opt_state)
    }
    return leaves, np.asarray(metrics["router"]["load"] if sparse else 1.0)


@functools.cache
def float32_gradients(
    sparse: bool, tied: bool, rows: int, length: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """On one device, in one batch, every token to every expert."""
    kind = "dense" if sparse else "no experts"
    config = make_config(
        kind, "one device", tied=tied, scan=True, microbatches=1, rows=rows, length=length
    )
    return gradients(config, "float32")


def assert_close(config: RunConfig) -> None:
    arguments = config.train.batch_size, config.data.sequence_length
    expected, expected_load = float32_gradients(
        bool(config.model.moe.num_experts), config.model.tied_embeddings, *arguments
    )
    actual, load = gradients(config, "bfloat16")
    np.testing.assert_allclose(
        load,
        expected_load,
        atol=1e-3,
        err_msg="the models route tokens differently: compare others",
    )
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = np.linalg.norm(actual[name] - gradient) / np.linalg.norm(gradient)
        assert difference <= TOLERANCE, f"{name} differs by {difference:.1%} of its norm"


@pytest.mark.parametrize(
    ("kind", "mesh", "tied", "scan", "microbatches"),
    [
        # Cases whose embeddings are tied alike share the gradients in float32.
        ("no experts", "one device", False, True, 1),
        pytest.param("dropless", "one device", False, True, 4, marks=pytest.mark.slow),
        pytest.param("dense", "data 2, expert 4", True, True, 1, marks=pytest.mark.slow),
        ("capacity, all-to-all", "fsdp 2, expert 2, tensor 2", True, True, 1),
    ],
)
def test_gradients_of_a_bfloat16_model(
    kind: str, mesh: str, tied: bool, scan: bool, microbatches: int
) -> None:
    assert_close(
        make_config(kind, mesh, tied=tied, scan=scan, microbatches=microbatches, rows=8, length=512)
    )


def every_case() -> list[tuple[Any, ...]]:
    """Returns all combinations that can run. Several microbatches run on one device alone.

    The meshes would need more rows than the tests have, to split each microbatch.
    """
    cases = itertools.product(KINDS, MESHES, (False, True), (True, False), (1, 4))
    return [case for case in cases if case[1] == "one device" or case[-1] == 1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "mesh", "tied", "scan", "microbatches"), every_case())
def test_gradients_of_every_bfloat16_model(
    kind: str, mesh: str, tied: bool, scan: bool, microbatches: int
) -> None:
    assert_close(
        make_config(kind, mesh, tied=tied, scan=scan, microbatches=microbatches, rows=8, length=512)
    )


KINDS_OF_LONG_ROWS = ("no experts", "dense", "capacity", "dropless")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_LONG_ROWS)
def test_gradients_of_a_row_of_16k_tokens(kind: str) -> None:
    assert_close(
        make_config(kind, "one device", tied=False, scan=True, microbatches=1, rows=1, length=16384)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS_OF_LONG_ROWS)
def test_gradients_of_rows_of_16k_tokens_in_microbatches(kind: str) -> None:
    assert_close(
        make_config(kind, "one device", tied=True, scan=True, microbatches=4, rows=4, length=16384)
    )


def test_a_token_that_stands_often_gets_all_of_its_gradient() -> None:
    ids = jnp.zeros((1, 16384), jnp.int32)
    total = lambda table: jnp.sum(look_up(jnp.bfloat16, table, ids).astype(jnp.float32))
    gradient = jax.jit(jax.grad(total))(jnp.ones((2, 1)))
    np.testing.assert_array_equal(gradient, [[16384], [0]])


class TimesParts(NamedTuple):
    """Stands for experts' weights: each expert multiplies its row by its own number."""

    parts_E11: jax.Array

    @property
    def num_experts(self) -> int:
        return self.parts_E11.shape[0]

    def __call__(self, rows_ECD: jax.Array) -> jax.Array:
        return rows_ECD * self.parts_E11


def test_a_token_adds_up_its_rows_and_their_gradients_in_float32() -> None:
    """One expert adds 1, and 16 others 2^-9 each, which rounding would lose one by one."""
    number = 17
    parts = jnp.full((number, 1, 1), 2**-9, jnp.bfloat16).at[0].set(1)
    total = 1 + 16 * 2**-9
    x, ones, experts = (
        jnp.ones((1, 1), jnp.bfloat16),
        jnp.ones((1, number)),
        jnp.arange(number)[None],
    )
    experts_of_parts = TimesParts(parts)
    for strategy in (dense, functools.partial(with_capacity, capacity=1)):
        y, pull_back = jax.vjp(
            jax.jit(lambda x: strategy(x, experts, ones, experts_of_parts).y_ND),  # noqa: B023
            x,
        )
        assert y[0, 0] == total
        assert pull_back(jnp.ones_like(y))[0][0, 0] == total


def test_a_weights_gradient_is_summed_in_float32() -> None:
    """Its products are not rounded to bfloat16, and their sum over D goes beyond 256 of them."""
    value = 1 + 2**-7
    g = jnp.full((1, 300), value, jnp.bfloat16)
    rows = jnp.full((1, 300), value, jnp.bfloat16)

    def loss(weights: jax.Array) -> jax.Array:
        arrangement = arrange_equally(jnp.zeros((1, 1), jnp.int32), 1, 1)
        y = combine(rows, weights, arrangement)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(jnp.ones((1, 1)))
    np.testing.assert_allclose(gradient, 300 * value**2, rtol=1e-6)


def test_copies_of_a_head_add_up_their_gradients_in_float32() -> None:
    """Ulysses on 8 devices copies one key/value head to all, and adds up the copies' gradients."""
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "context")
    q, k = jnp.zeros((1, 8, 8, 4), jnp.bfloat16), jnp.zeros((1, 8, 1, 4), jnp.bfloat16)
    attend = functools.partial(
        ulysses_attention, axis_name="context", causal=False, implementation=None
    )
    sharded = jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    )
    g = (
        jnp.full(q.shape, 1 + 2**-6, jnp.bfloat16).at[:, :, 1:].set(2**-8)
    )  # one copy gives 1 + 2^-6, and seven give 2^-8
    _, pull_back = jax.vjp(jax.jit(lambda v: sharded(q, k, v)), jnp.zeros_like(k))
    expected = jnp.float32(1 + 2**-6 + 7 * 2**-8).astype(jnp.bfloat16)
    np.testing.assert_array_equal(pull_back(g)[0].astype(jnp.float32), expected.astype(jnp.float32))
