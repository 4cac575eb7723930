"""Compares three training steps of small models with committed numbers: the golden step.

A refactoring must not move these numbers. Parameters and batches come from golden/inputs.npz, which
has the field's names and shapes. So the file stays as it is if modules are renamed, if a weight is
stored transposed, or if random draws change. Then only the tables below are edited.

    python -m tests.test_golden            prints this checkout's numbers beside the committed ones
    python -m tests.test_golden --write    writes golden/expected.json

Write new numbers only if the right answer changed. The commit then says which one and why.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
import pytest

from moe.config import DataConfig, ModelConfig, MoEConfig, OptimizerConfig, RunConfig, TrainConfig
from moe.parallel.mesh import global_batch
from moe.training.train_step import TrainState, make_program

FOLDER = Path(__file__).parent / "golden"
STEPS = 3

DENSE = ModelConfig(
    num_layers=2,
    model_dim=32,
    feed_forward_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_base=100.0,
)
EXPERTS = MoEConfig(
    num_experts=6,
    expert_dim=24,
    num_shared_experts=1,
    first_dense_layers=1,
    router="sigmoid",
    weight_scale=1.5,
    balance_weight=0.1,
    z_weight=0.01,
    bias_update_rate=0.01,
)
SPARSE = dataclasses.replace(DENSE, num_layers=3, tied_embeddings=True, moe=EXPERTS)
MODELS = {"dense": DENSE, "sparse": SPARSE}

# Each parameter's name in the file, its path in our tree, and how its dimensions are reordered on
# the way from the file into the tree (L: layer, the rest as in the legend of docs/design.md).
EMBEDDINGS = {
    "embedding": ("embedding", "V D -> V D"),
    "final_norm": ("final_norm/scale", "D -> D"),
    "unembedding": ("unembedding", "D V -> D V"),
}
ATTENTION = {
    "attention_norm": ("attention_norm/scale", "L D -> L D"),
    "query": ("attention/query", "L D N H -> L D N H"),
    "key": ("attention/key", "L D K H -> L D K H"),
    "value": ("attention/value", "L D K H -> L D K H"),
    "output": ("attention/output", "L N H D -> L N H D"),
    "feed_forward_norm": ("feed_forward_norm/scale", "L D -> L D"),
}
FEED_FORWARD = {
    "gate": ("feed_forward/gate", "L D F -> L D F"),
    "up": ("feed_forward/up", "L D F -> L D F"),
    "down": ("feed_forward/down", "L F D -> L F D"),
}
MOE = {
    "router": ("moe/router", "L D E -> L D E"),
    "experts_gate": ("moe/gate", "L E D F -> L E D F"),
    "experts_up": ("moe/up", "L E D F -> L E D F"),
    "experts_down": ("moe/down", "L E F D -> L E F D"),
    "shared_gate": ("moe/shared/gate", "L D F -> L D F"),
    "shared_up": ("moe/shared/up", "L D F -> L D F"),
    "shared_down": ("moe/shared/down", "L F D -> L F D"),
}


def names_of(model: str) -> dict[str, tuple[str, str]]:
    """Maps each parameter's name in the file to its path in our tree and its reordering."""
    if model == "dense":
        return EMBEDDINGS | within("dense_layers", "layers_0/block_0", ATTENTION | FEED_FORWARD)
    # The sparse model's embedding is tied, so there is no unembedding.
    names = {name: EMBEDDINGS[name] for name in ("embedding", "final_norm")}
    names |= within("dense_layers", "layers_0/block_0", ATTENTION | FEED_FORWARD)
    return names | within("sparse_layers", "layers_1/block_0", ATTENTION | MOE)


def within(group: str, path: str, names: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {f"{group}/{name}": (f"{path}/{leaf}", order) for name, (leaf, order) in names.items()}


def read_inputs(model: str) -> dict[str, np.ndarray]:
    """Returns parameters and batches of a model, by their names in the file."""
    with np.load(FOLDER / "inputs.npz") as file:
        return {
            name.removeprefix(f"{model}/"): file[name]
            for name in file.files
            if name.startswith((f"{model}/", "batches/"))
        }


def to_tree(model: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameter tree of our model, made from the file's arrays."""
    tree: dict[str, Any] = {}
    for name, (path, order) in names_of(model).items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = einops.rearrange(inputs[name], order)
    return tree


def leaf_at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def measure(model: str, dtype: str) -> dict[str, Any]:
    """Returns the loss and gradient norm of each step, and the final norm of every parameter."""
    inputs = read_inputs(model)
    config = RunConfig(
        model=dataclasses.replace(MODELS[model], compute_dtype=dtype),
        data=DataConfig(sequence_length=inputs["batches/tokens"].shape[2]),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=0.01),
        train=TrainConfig(
            steps=100, batch_size=inputs["batches/tokens"].shape[1], accumulation=2, loss_chunk=16
        ),
    )
    program = make_program(config, jax.devices()[:1])
    state = program.init_state()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    params = jax.device_put(to_tree(model, inputs), shardings)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, state.params)
    state = state.replace(params=params)
    losses, gradient_norms = [], []
    with jax.set_mesh(program.mesh):
        for step in range(STEPS):
            rows = {
                name.removeprefix("batches/"): array[step]
                for name, array in inputs.items()
                if name.startswith("batches/")
            }
            state, metrics = program.train_step(
                state, global_batch(rows, program.mesh, config.train.batch_size, program.task.dims)
            )
            losses.append(float(metrics["loss"]))
            gradient_norms.append(float(metrics["gradient_norm"]))
    return {"loss": losses, "gradient_norm": gradient_norms, "norms": norms(model, state)}


def norms(model: str, state: TrainState) -> dict[str, float]:
    """Returns the norm of each parameter, by its name in the file, and of all router biases."""
    values = {name: leaf_at(state.params, path) for name, (path, _) in names_of(model).items()}
    if model == "sparse":
        values["router_biases"] = np.concatenate(
            [np.ravel(leaf) for leaf in jax.tree.leaves(state.router_state)]
        )
    return {
        name: float(np.linalg.norm(np.asarray(value, np.float64))) for name, value in values.items()
    }


# Programs that round differently (AVX-512, SSE4, with and without XLA's optimisations) agree to
# 2e-7 in float32. In bfloat16 they agree to 3e-3, since an early rounding changes activations.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}

ADVICE = """{count} of {total} golden numbers moved: the {model} model in {dtype}.
Relative differences, of which {allowed:g} is allowed:
{table}
Find the first of these that applies:
- The loss of step 1 moved: the forward pass or the loss changed. If it moved in bfloat16 alone, the
  rounding changed; if in float32 too, a definition.
- The gradient norm of step 1 moved, but not its loss: a backward pass changed, or a sum over
  microbatches.
- Only later steps or norms moved: the optimizer changed, its schedule, the mask of weight decay, or
  the update of biases.
- The norm of one parameter alone moved: its gradient changed, or its row in this test's tables.
If the new numbers are right, say why in the commit, and write them:
python -m tests.test_golden --write"""


def flatten(measured: dict[str, Any]) -> dict[str, float]:
    steps = {
        f"{name} of step {step}": value
        for name in ("loss", "gradient_norm")
        for step, value in enumerate(measured[name], start=1)
    }
    return steps | {f"norm of {name}": value for name, value in measured["norms"].items()}


def compare(
    measured: dict[str, Any], expected: dict[str, Any]
) -> list[tuple[str, float, float, float]]:
    """Returns the name, the number here, the committed one and their difference, of each number."""
    here, there = flatten(measured), flatten(expected)
    assert here.keys() == there.keys()
    return [
        (
            name,
            here[name],
            there[name],
            abs(here[name] - there[name]) / max(abs(there[name]), 1e-12),
        )
        for name in here
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("model", MODELS)
def test_three_steps_give_the_committed_numbers(model: str, dtype: str) -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())[f"{model} {dtype}"]
    rows = compare(measure(model, dtype), expected)
    moved = [row for row in rows if not row[3] <= TOLERANCE[dtype]]
    table = "\n".join(
        f"  {name}: {here:.7g}, was {there:.7g} ({difference:.1e})"
        for name, here, there, difference in moved
    )
    counts = {"count": len(moved), "total": len(rows)}
    assert not moved, ADVICE.format(
        model=model, dtype=dtype, allowed=TOLERANCE[dtype], table=table, **counts
    )


def make_inputs() -> dict[str, np.ndarray]:
    """Makes what golden/inputs.npz holds: parameters and batches of both models.

    Parameters have a scale of 1/sqrt(fan-in). The order of the draws decides the numbers.
    """
    rng = np.random.default_rng(20260101)
    v, d = 256, DENSE.model_dim
    inputs: dict[str, np.ndarray] = {}
    for model in MODELS:
        ends = {
            "embedding": rng.standard_normal((v, d)) / d**0.5,
            "final_norm": 1 + 0.1 * rng.standard_normal(d),
        }
        if model == "dense":
            ends["unembedding"] = rng.standard_normal((d, v)) / d**0.5
        inputs |= with_prefix(model, ends)
        num_dense = 1 if model == "sparse" else 2
        dense_layers = make_layers(rng, num_dense, ATTENTION_SHAPES | FEED_FORWARD_SHAPES)
        inputs |= with_prefix(f"{model}/dense_layers", dense_layers)
    sparse_layers = make_layers(rng, 2, ATTENTION_SHAPES | MOE_SHAPES)
    inputs |= with_prefix("sparse/sparse_layers", sparse_layers)
    return inputs | make_batches(rng)


def parameter_shapes() -> tuple[dict[str, tuple[int, ...]], ...]:
    """Returns the shapes of a layer's attention, feed-forward part and sparse part."""
    d, f = DENSE.model_dim, DENSE.feed_forward_dim
    n, k, h = DENSE.num_heads, DENSE.num_kv_heads, DENSE.head_dim
    e, w = EXPERTS.num_experts, EXPERTS.expert_dim
    attention = {"query": (d, n, h), "key": (d, k, h), "value": (d, k, h), "output": (n, h, d)}
    feed_forward = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    moe = {
        "router": (d, e),
        "experts_gate": (e, d, w),
        "experts_up": (e, d, w),
        "experts_down": (e, w, d),
        "shared_gate": (d, w),
        "shared_up": (d, w),
        "shared_down": (w, d),
    }
    return attention, feed_forward, moe


ATTENTION_SHAPES, FEED_FORWARD_SHAPES, MOE_SHAPES = parameter_shapes()

# The inputs that each output is a sum of. For all other weights it is the model's width.
FAN_IN = {
    "output": DENSE.num_heads * DENSE.head_dim,
    "down": DENSE.feed_forward_dim,
    "experts_down": EXPERTS.expert_dim,
    "shared_down": EXPERTS.expert_dim,
}


def make_layers(
    rng: np.random.Generator, count: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Draws the norms and the weights of some layers, stacked."""
    norms = {
        name: 1 + 0.1 * rng.standard_normal((count, DENSE.model_dim))
        for name in ("attention_norm", "feed_forward_norm")
    }
    weights = {
        name: rng.standard_normal((count, *shape)) / FAN_IN.get(name, DENSE.model_dim) ** 0.5
        for name, shape in shapes.items()
    }
    if "router" in weights:
        weights["router"] *= 4  # clear choices, which no rounding turns into others
    return norms | weights


def with_prefix(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array.astype(np.float32) for name, array in arrays.items()}


def make_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Makes batches [steps, B, T] of documents of random lengths, padded at the end.

    Their tokens are few distinct ones, as in text.
    """
    shape = (STEPS, 8, 40)
    starts = rng.random(shape) < 0.1
    index = np.broadcast_to(np.arange(shape[2]), shape)
    real = index < rng.integers(shape[2] // 2, shape[2] + 1, (*shape[:2], 1))
    segments = 1 + np.cumsum(starts, axis=2)
    stream = np.minimum(rng.geometric(0.05, (*shape[:2], shape[2] + 1)), 255)
    return {
        "batches/tokens": np.where(real, stream[..., :-1], 0).astype(np.int32),
        "batches/targets": np.where(real, stream[..., 1:], 0).astype(np.int32),
        "batches/loss_mask": real & (rng.random(shape) < 0.9),
        "batches/segment_ids": np.where(real, segments, 0).astype(np.int32),
        "batches/positions": (
            index - np.maximum.accumulate(np.where(starts, index, 0), axis=2)
        ).astype(np.int32),
    }


def main(arguments: list[str]) -> None:
    if not (FOLDER / "inputs.npz").exists():
        np.savez_compressed(FOLDER / "inputs.npz", **make_inputs())
    measured = {
        f"{model} {dtype}": measure(model, dtype) for model in MODELS for dtype in TOLERANCE
    }
    if arguments == ["--write"]:
        (FOLDER / "expected.json").write_text(json.dumps(measured, indent=2) + "\n")
    expected = json.loads((FOLDER / "expected.json").read_text())
    for case, values in measured.items():
        print(case)
        for name, here, there, difference in compare(values, expected[case]):
            print(f"  {name:40} {here:.7g}  committed {there:.7g}  ({difference:.1e})")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(sys.argv[1:])
