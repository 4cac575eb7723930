"""Tests that a step computes the same from the same parameters, however the run is laid out.

A layout is a choice of mesh, loop or unrolled program, recomputation, microbatches, padding,
dispatch and exchange. For each layout, the loss, the balance loss, the z-loss, every leaf of the
gradient, every statistic and the updated biases are compared with those of one device that sends
every token through every expert. The plain tests cover every pair of choices with remat "none" and
"full", and the slow ones with the policies between these. `pytest -m exhaustive` covers all layouts
with remat "none" and "full". `python -m tests.test_invariance` prints their largest differences as
the table of docs/invariance.md.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import losses
from moe.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moe.model.transformer import Transformer
from moe.parallel.mesh import global_batch, make_mesh, shardings
from moe.parameters import unbox
from moe.tasks import make_task
from moe.tasks.language_modelling import DIMS
from moe.training.optimizer import make_schedule
from moe.training.train_step import make_train_step, new_state
from tests.model.plain import draw_scales

ROWS, LENGTH, PADDED = 32, 16, 24

MOE = MoEConfig(
    num_experts=8,
    experts_per_token=2,
    expert_dim=12,
    num_shared_experts=1,
    first_dense_layers=1,
    balance_weight=0.1,
    z_weight=0.01,
    bias_update_rate=0.01,
    capacity_factor=4.0,  # as many rows as there are tokens: nothing is dropped
)
MODEL = ModelConfig(
    vocab_size=256,
    num_layers=3,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    compute_dtype="float32",
    moe=MOE,
)

CHOICES: dict[str, dict[str, Any]] = {
    "mesh": {
        "one device": {"data": 1},
        "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
        "data 2, expert 4": {"data": 2, "expert": 4},
        "fsdp 2, expert 2, tensor 2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
        "expert 4, context 2": {"data": 1, "expert": 4, "context": 2},
    },
    "layers": {"scanned": True, "unrolled": False},
    "remat": {name: name for name in get_args(get_type_hints(ModelConfig)["remat"])},
    "microbatches": {"1": 1, "4": 4},
    "padding": {"none": LENGTH, "a third": PADDED},
    "dispatch": {
        "dense": ("dense", "all_gather"),
        "capacity": ("capacity", "all_gather"),
        "capacity, all-to-all": ("capacity", "all_to_all"),
        "dropless": ("dropless", "all_gather"),
    },
    "scope": {"row": "row", "batch": "batch"},
}
Layout = tuple[str, ...]  # a name of each choice
REFERENCE = ("one device", "scanned", "none", "1", "none", "dense")


def is_valid(layout: Layout) -> bool:
    """Returns False if the balance loss is another one by definition.

    With scope "batch", the batch is the microbatch: see
    `test_the_batch_of_a_balance_loss_is_the_microbatch`.
    """
    microbatches, scope = layout[3], layout[-1]
    return not (microbatches == "4" and scope == "batch")


LAYOUTS = [layout for layout in itertools.product(*CHOICES.values()) if is_valid(layout)]
# Of remat, the table has the two that keep most and least. The others are in slow pairs alone.
TABLE = [layout for layout in LAYOUTS if layout[2] in ("none", "full")]


def pairs(layout: Layout) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(layout), 2))


def pairwise(layouts: Sequence[Layout]) -> list[Layout]:
    """Returns those of the layouts that, with the reference, have every pair that any of them has.

    A mesh without an expert axis exchanges nothing, so its all-to-all is left out, and so is the
    mesh of data and expert, both of which other meshes have. The next layout is always the one with
    the most new pairs, and of equal ones the first. A choice that takes long to compile has to
    bring one pair more.
    """
    exchanging = {name for name, sizes in CHOICES["mesh"].items() if "expert" in sizes}
    layouts = [
        layout
        for layout in layouts
        if layout[0] != "data 2, expert 4"
        and (layout[0] in exchanging or layout[5] != "capacity, all-to-all")
    ]
    slow_to_compile = {"unrolled", "4"}
    worth = lambda layout: len(pairs(layout) & missing) - len(slow_to_compile & {*layout})
    missing = set().union(*map(pairs, layouts)) - pairs((*REFERENCE, "row"))
    chosen = []
    while missing:
        chosen.append(max((x for x in layouts if pairs(x) & missing), key=worth))
        missing -= pairs(chosen[-1])
    return chosen


def model_config(first_dense_layers: int) -> ModelConfig:
    """Returns a model of two sparse layers that come after some dense ones.

    The model of the table has a dense layer. That of the pairs has none, but norms of queries and
    keys.
    """
    moe = dataclasses.replace(MOE, first_dense_layers=first_dense_layers)
    layers, qk_norm = 2 + first_dense_layers, not first_dense_layers
    return dataclasses.replace(MODEL, num_layers=layers, qk_norm=qk_norm, moe=moe)


def run_config(layout: Layout, first_dense_layers: int = 1) -> RunConfig:
    mesh, layers, remat, microbatches, padding, dispatch, scope = (
        options[name] for options, name in zip(CHOICES.values(), layout, strict=True)
    )
    model = model_config(first_dense_layers)
    moe = dataclasses.replace(
        model.moe, dispatch=dispatch[0], exchange=dispatch[1], balance_scope=scope
    )
    return RunConfig(
        model=dataclasses.replace(model, scan_layers=layers, remat=remat, moe=moe),
        data=DataConfig(sequence_length=padding),
        optimizer=OptimizerConfig(warmup_fraction=0.1),
        mesh=MeshConfig(**mesh),
        train=TrainConfig(batch_size=ROWS, accumulation=microbatches, steps=10),
    )


def batch_rows(length: int = LENGTH) -> dict[str, np.ndarray]:
    """Returns packed rows, the same ones for every length, with padding beyond LENGTH.

    The rows have unequal numbers of tokens and targets.
    """
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 256, (2, ROWS, LENGTH)).astype(np.int32)
    starts = rng.random((ROWS, LENGTH)) < 0.2
    index = np.arange(LENGTH)
    real = index < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    rows = {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": real & (rng.random((ROWS, LENGTH)) < 0.9),
        "segment_ids": np.where(real, 1 + np.cumsum(starts, axis=1), 0).astype(np.int32),
        "positions": (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(
            np.int32
        ),
    }
    return {name: np.pad(x, ((0, 0), (0, length - LENGTH))) for name, x in rows.items()}


def init(first_dense_layers: int, key: jax.Array) -> Any:
    model = Transformer(model_config(first_dense_layers))
    return model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})


@functools.cache
def declared(first_dense_layers: int) -> Any:
    """Returns the parameters' shapes and dimensions, which are the same in every layout."""
    return jax.eval_shape(functools.partial(init, first_dense_layers), jax.random.key(0))


@functools.cache
def variables(first_dense_layers: int = 1) -> Any:
    """Draws parameters once, and biases that change which experts are chosen."""
    drawn = jax.jit(lambda key: unbox(init(first_dense_layers, key)))(jax.random.key(0))
    biases = jax.tree.map(
        lambda x: 0.05 * jax.random.normal(jax.random.key(1), x.shape), drawn["router_state"]
    )
    # The scales of the table's model are ones, as they start.
    params = drawn["params"] if first_dense_layers else draw_scales(drawn["params"])
    return jax.device_get({"params": params, "router_state": biases})


# An optimizer that keeps the gradient as its state, and changes no parameter.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)


def step(config: RunConfig, rows: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Returns everything that one step computes of the rows, as named arrays."""
    first_dense_layers = config.model.moe.first_dense_layers
    return step_from(config, declared(first_dense_layers), variables(first_dense_layers), rows)


def step_from(
    config: RunConfig,
    declared: Any,
    variables: Any,
    rows: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns the same from given variables, whose declarations are `declared`."""
    rows = rows or batch_rows(config.data.sequence_length)
    mesh = make_mesh(config, jax.devices()[: int(np.prod(config.mesh.sizes))])
    task = make_task(config)
    model = task.model(config.model)
    placed = jax.device_put(variables, shardings(declared, mesh))
    opt_state = KEEP_GRADIENT.init(placed["params"])
    state = new_state(placed["params"], opt_state, placed["router_state"])
    train_step = make_train_step(config, model, KEEP_GRADIENT, task, make_schedule(config))
    with jax.set_mesh(mesh):
        batch = global_batch(rows, mesh, ROWS, DIMS)
        new, metrics = jax.jit(train_step)(state, batch)
    leaves = {
        "gradient": new.opt_state,
        "bias": new.router_state,
        "statistics": metrics.get("router", {}),
        "loss": metrics["loss"],
    }
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }


@functools.cache
def reference(scope: str, first_dense_layers: int = 1) -> dict[str, Any]:
    return step(run_config((*REFERENCE, scope), first_dense_layers))


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Returns each array's largest difference, divided by its largest value."""
    assert actual.keys() == expected.keys()
    return {
        name: float(
            np.abs(actual[name] - expected[name]).max() / (np.abs(expected[name]).max() + 1e-12)
        )
        for name in expected
    }


def assert_same(layout: Layout, first_dense_layers: int) -> None:
    actual = step(run_config(layout, first_dense_layers))
    expected = reference(layout[-1], first_dense_layers)
    for name, difference in differences(actual, expected).items():
        assert difference < 2e-5, f"{name} differs by {difference:.1e}"


PAIRS = pairwise(TABLE)
OTHER_PAIRS = [layout for layout in pairwise(LAYOUTS) if layout not in PAIRS]


@pytest.mark.parametrize(
    "layout",
    [*PAIRS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in OTHER_PAIRS)],
    ids=", ".join,
)
def test_pairs_of_choices(layout: Layout) -> None:
    """Leaves the dense layer to the tests below, since it takes a third of the compile time."""
    assert_same(layout, first_dense_layers=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", TABLE, ids=", ".join)
def test_all_choices(layout: Layout) -> None:
    assert_same(layout, first_dense_layers=1)


def test_the_reference_computes_something() -> None:
    """If everything were zero, it would be equal too."""
    values = reference("row")
    assert all(
        np.abs(value).max() > 0
        for name, value in values.items()
        if "dropped" not in name and "dead" not in name
    )
    assert {name for name in values if "gradient" in name and "moe" in name} >= {
        f"['gradient']['layers_1']['block_0']['moe']['{name}']"
        for name in ("router", "gate", "up", "down")
    }


def router_gradients(layout: Layout, **weights: float) -> Any:
    """Returns the routers' gradient of the router's losses.

    No token has a target, so the loss of the tokens is 0.
    """
    config = run_config(layout)
    moe = dataclasses.replace(config.model.moe, **weights)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    rows = batch_rows()
    values = step(config, rows | {"loss_mask": np.zeros_like(rows["loss_mask"])})
    assert values["['loss']"] == 0
    return values["['gradient']['layers_1']['block_0']['moe']['router']"]


@functools.cache
def layer_by_layer(scope: str, balance_weight: float, z_weight: float) -> np.ndarray:
    """Returns the same by calling each block in plain Python, without scan, remat or mesh."""
    from moe.model.stack import Block
    from moe.model.tokens import TokenInfo

    config = run_config((*REFERENCE, scope)).model
    batch = jax.tree.map(jnp.asarray, batch_rows())
    tokens = TokenInfo.from_batch(batch, config)
    params, biases = variables()["params"], variables()["router_state"]

    def loss(router: jax.Array) -> jax.Array:
        x, total = params["embedding"][batch["tokens"]], 0.0
        dense = jax.tree.map(lambda leaf: leaf[0], params["layers_0"]["block_0"])
        x = Block(config, "dense").apply({"params": dense}, x, tokens).hidden_BTD
        for layer in range(2):
            here, bias = (
                jax.tree.map(lambda leaf: leaf[layer], tree["layers_1"]["block_0"])  # noqa: B023
                for tree in (params, biases)
            )
            here = here | {"moe": here["moe"] | {"router": router[layer]}}
            output = Block(config, "moe").apply({"params": here, "router_state": bias}, x, tokens)
            x, stats = output.hidden_BTD, output.stats
            weighted = balance_weight * stats.balance_loss + z_weight * stats.z_loss
            total += weighted / stats.tokens / 2
        return total

    return np.asarray(jax.jit(jax.grad(loss))(params["layers_1"]["block_0"]["moe"]["router"]))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("remat", "layers"),
    [
        ("full", "scanned"),
        slow("full", "unrolled"),
        slow("none", "scanned"),
        slow("none", "unrolled"),
    ],
)
def test_router_losses_are_neither_lost_nor_doubled_under_scan_and_remat(
    layers: str, remat: str
) -> None:
    """Covers MaxText #4829 (lost under scan), Megatron-LM #1330 (doubled), torchtitan #3686."""
    layout = ("one device", layers, remat, "1", "none", "dense", "row")
    expected = layer_by_layer("row", 1.0, 0.1)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(
        router_gradients(layout, balance_weight=1.0, z_weight=0.1),
        expected,
        atol=2e-5 * np.abs(expected).max(),
    )


@pytest.mark.parametrize("scope", ["row", "batch"])
def test_router_gradients_are_not_divided_by_the_data_parallel_devices(scope: str) -> None:
    """Covers Megatron-LM #3672: the gradient was too small by the data-parallel factor."""
    expected = layer_by_layer(scope, 1.0, 0.1)
    layout = ("data 2, expert 4", "scanned", "none", "1", "none", "dense", scope)
    np.testing.assert_allclose(
        router_gradients(layout, balance_weight=1.0, z_weight=0.1),
        expected,
        atol=2e-5 * np.abs(expected).max(),
    )


@pytest.mark.parametrize(
    ("remat", "microbatches"),
    [("full", "4"), slow("full", "1"), slow("none", "1"), slow("none", "4")],
)
def test_load_counts_every_token_once_and_moves_the_bias_once(
    microbatches: str, remat: str
) -> None:
    """Covers torchtitan #2061 (counted twice under recomputation) and megablocks #85."""
    config = run_config(
        ("data 2, expert 4", "scanned", remat, microbatches, "none", "dense", "row")
    )
    model, batch = Transformer(config.model), jax.tree.map(jnp.asarray, batch_rows())
    output = jax.jit(model.apply)(variables(), batch)
    load = np.asarray(losses.in_layer_order(output.stats).load)
    assert (
        load.sum()
        == 2 * config.model.moe.experts_per_token * (batch_rows()["segment_ids"] > 0).sum()
    )
    values = step(config)
    np.testing.assert_allclose(
        values["['statistics']['load']"], load / load.sum(axis=1, keepdims=True), rtol=1e-6
    )
    moved = (
        values["['bias']['layers_1']['block_0']['moe']['bias']"]
        - variables()["router_state"]["layers_1"]["block_0"]["moe"]["bias"]
    )
    np.testing.assert_allclose(
        moved, 0.01 * np.sign(load.mean(axis=1, keepdims=True) - load), atol=1e-7
    )


@pytest.mark.slow
def test_the_batch_of_a_balance_loss_is_the_microbatch() -> None:
    """With scope "batch", accumulation changes the loss by definition.

    It becomes the mean over the microbatches, weighted by their tokens.
    """
    config = run_config((*REFERENCE, "batch"))
    accumulated = dataclasses.replace(
        config, train=dataclasses.replace(config.train, accumulation=4)
    )
    whole, parts = (
        values["['statistics']['balance_loss']"]
        for values in (reference("batch"), step(accumulated))
    )
    assert (np.abs(whole - parts) > 1e-4).all()
    apply, expected, tokens = jax.jit(Transformer(config.model).apply), 0.0, 0.0
    for first in range(4):
        batch = jax.tree.map(lambda x: jnp.asarray(x[first::4]), batch_rows())  # noqa: B023
        sums = losses.in_layer_order(apply(variables(), batch).stats)
        expected, tokens = expected + sums.balance_loss, tokens + sums.tokens
    np.testing.assert_allclose(parts, expected / tokens, rtol=1e-5)


@pytest.mark.slow
def test_jitter_is_the_same_on_every_layout() -> None:
    """A row's random draws depend on the seed, the row's number in the run and the layer alone."""

    def noisy(layout: Layout) -> dict[str, Any]:
        config = run_config(layout)
        return step(
            dataclasses.replace(
                config,
                model=dataclasses.replace(
                    config.model, moe=dataclasses.replace(config.model.moe, jitter=0.1)
                ),
            )
        )

    expected = noisy((*REFERENCE, "row"))
    assert max(differences(expected, reference("row")).values()) > 1e-3
    layout = ("data 2, expert 4", "unrolled", "full", "4", "none", "dense", "row")
    assert max(differences(noisy(layout), expected).values()) < 2e-5


def main() -> None:
    """Prints every layout's largest difference, as Markdown."""
    columns = [*CHOICES, "gradient", "statistics, losses", "bias"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for layout in TABLE:
        found = differences(step(run_config(layout)), reference(layout[-1]))
        gradient = largest(found, "gradient")
        statistics = max(largest(found, "statistics"), largest(found, "loss"))
        numbers = [f"{x:.1e}" for x in (gradient, statistics, largest(found, "bias"))]
        print(f"| {' | '.join([*layout, *numbers])} |", flush=True)


def largest(found: dict[str, float], kind: str) -> float:
    """Returns the largest difference among the arrays of one kind, such as "gradient"."""
    return max(value for name, value in found.items() if name.startswith(f"['{kind}']"))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
