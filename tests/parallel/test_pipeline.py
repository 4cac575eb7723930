"""Tests pipelines: their schedules, and that a step computes what one device computes."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from moe.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    Schedule,
)
from moe.model.layers import look_up
from moe.model.transformer import EncoderDecoder
from moe.parallel.mesh import constrain, global_batch, make_mesh, shardings, spec
from moe.parameters import unbox
from moe.tasks import make_task
from moe.tasks.language_modelling import DIMS
from moe.training.optimizer import make_schedule
from moe.training.train_step import (
    make_eval_step,
    make_program,
    make_train_step,
    new_state,
    on_schedule,
)
from moe.workdir import checkpoint, identity
from tests.test_invariance import (
    KEEP_GRADIENT,
    LENGTH,
    MODEL,
    MOE,
    ROWS,
    batch_rows,
    differences,
    run_config,
    step_from,
)

REFERENCE = ("one device", "scanned", "none", "4", "none", "dense", "batch")
SCHEDULES = [
    Schedule(stages, rounds, stages * groups)
    for stages, rounds, groups in itertools.product((2, 3, 4), (1, 2, 5), (1, 2, 3))
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_microbatch_goes_through_all_pieces_in_order(schedule: Schedule) -> None:
    """A microbatch is in a stage one tick after it was in the stage before."""
    visits: dict[int, list[tuple[int, int]]] = {}
    for tick in range(schedule.ticks):
        for stage in range(schedule.stages):
            turn = schedule.turn(tick, stage)
            if turn.is_busy:
                microbatch = turn.group * schedule.stages + turn.member
                piece = turn.round * schedule.stages + stage
                visits.setdefault(microbatch, []).append((tick, piece))
    assert sorted(visits) == list(range(schedule.microbatches))
    for visited in visits.values():
        first, pieces = visited[0][0], schedule.rounds * schedule.stages
        assert visited == [(first + piece, piece) for piece in range(pieces)]


def test_a_schedule_by_hand() -> None:
    """Two stages, two rounds, four microbatches: digits are microbatches, primes second rounds."""
    schedule = Schedule(stages=2, rounds=2, microbatches=4)
    names = []
    for stage in range(2):
        turns = [schedule.turn(tick, stage) for tick in range(schedule.ticks)]
        names.append(
            [f"{2 * t.group + t.member}{t.round * chr(39)}" if t.is_busy else "" for t in turns]
        )
    assert names[0] == ["0", "1", "0'", "1'", "2", "3", "2'", "3'", ""]
    assert names[1] == ["", "0", "1", "0'", "1'", "2", "3", "2'", "3'"]
    assert schedule.bubble == 1 / 9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_bubble_is_what_the_formulas_say(schedule: Schedule) -> None:
    """Counted tick by tick: (P-1)/(M+P-1) for GPipe, and (P-1)/(V M+P-1) for V rounds."""
    idle = schedule.stages - 1
    busy = schedule.rounds * schedule.microbatches
    assert schedule.bubble == pytest.approx(idle / (busy + idle), abs=1e-15)


DENSE = dataclasses.replace(MODEL, num_layers=4, moe=MoEConfig())
# A dense layer before the experts, which runs outside of the stages, and four or eight sparse ones.
BATCH_SCOPE = dataclasses.replace(MOE, balance_scope="batch", dispatch="dense")
SPARSE = dataclasses.replace(MODEL, num_layers=5, moe=BATCH_SCOPE)
DEEP = dataclasses.replace(SPARSE, num_layers=9)
FLAT = dataclasses.replace(
    SPARSE, num_layers=4, moe=dataclasses.replace(SPARSE.moe, first_dense_layers=0)
)


def with_moe(model: ModelConfig, **fields: Any) -> ModelConfig:
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **fields))


CASES: dict[str, tuple[ModelConfig, dict[str, int], int, dict[str, Any]]] = {
    "sparse, GPipe, expert and tensor": (
        with_moe(FLAT, dispatch="capacity", exchange="all_to_all"),
        {"pipeline": 2, "expert": 2, "tensor": 2},
        1,
        {},
    ),
    "dense, circular, fsdp and tensor, remat": (
        DENSE,
        {"pipeline": 2, "fsdp": 2, "tensor": 2},
        2,
        {"remat": "full"},
    ),
    "dense, GPipe, 4 stages, data": (DENSE, {"pipeline": 4, "data": 2}, 1, {}),
    "dense, GPipe, 2 stages, context, unrolled": (
        DENSE,
        {"pipeline": 2, "context": 2, "tensor": 2},
        1,
        {"scan_layers": False, "remat": "full"},
    ),
    "sparse, circular, 2 stages, fsdp and expert": (
        with_moe(SPARSE, dispatch="dropless"),
        {"pipeline": 2, "fsdp": 2, "expert": 2},
        2,
        {},
    ),
    "sparse, circular, 4 stages, expert, remat": (
        with_moe(DEEP, dispatch="capacity", exchange="all_to_all"),
        {"pipeline": 4, "expert": 2},
        2,
        {"remat": "full"},
    ),
    "sparse, GPipe, 4 stages, jitter": (
        with_moe(SPARSE, jitter=0.1),
        {"pipeline": 4, "fsdp": 2},
        1,
        {},
    ),
}
PLAIN_CASE = "sparse, GPipe, expert and tensor"  # the others are slow


def run_of(
    model: ModelConfig,
    mesh: dict[str, int],
    rounds: int = 1,
    microbatches: int = 4,
    *,
    gather_once: bool = False,
) -> RunConfig:
    """Returns the config of a run on a mesh, with as many microbatches as the reference has."""
    reference = run_config(REFERENCE)
    train = dataclasses.replace(
        reference.train,
        accumulation=microbatches,
        pipeline_rounds=rounds,
        gather_once=gather_once,
    )
    sizes = MeshConfig(**({"data": 1} | mesh))
    return dataclasses.replace(reference, model=model, mesh=sizes, train=train)


@functools.cache
def drawn(model: ModelConfig) -> tuple[Any, Any]:
    """Returns the declarations of a model's variables, and variables with biases that matter."""
    init = lambda key: (
        make_task(run_of(model, {}))
        .model(model)
        .init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})
    )
    declared = jax.eval_shape(init, jax.random.key(0))
    values = jax.jit(lambda key: unbox(init(key)))(jax.random.key(0))
    biases = jax.tree.map(
        lambda x: 0.05 * jax.random.normal(jax.random.key(1), x.shape),
        values.get("router_state", {}),
    )
    return (
        {"params": declared["params"], "router_state": declared.get("router_state", {})},
        jax.device_get({"params": values["params"], "router_state": biases}),
    )


def plain_model(model: ModelConfig) -> ModelConfig:
    """Returns the same model, computed in the simplest way."""
    model = dataclasses.replace(model, remat="none", scan_layers=True)
    if not model.moe.num_experts:
        return model
    return with_moe(model, dispatch="dense", exchange="all_gather")


@functools.cache
def expected_step(model: ModelConfig) -> dict[str, Any]:
    """Returns what one device computes of the same microbatches, one after the other."""
    return step_from(run_of(model, {}), *drawn(plain_model(model)))


def assert_equals_one_device(
    model: ModelConfig,
    mesh: dict[str, int],
    rounds: int,
    fields: dict[str, Any],
    *,
    gather_once: bool = False,
) -> None:
    plain = plain_model(model)
    model = dataclasses.replace(model, **fields)
    actual = step_from(run_of(model, mesh, rounds, gather_once=gather_once), *drawn(plain))
    for name, difference in differences(actual, expected_step(plain)).items():
        assert difference < 2e-5, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == PLAIN_CASE else pytest.mark.slow) for case in CASES],
)
def test_a_pipeline_computes_what_one_device_does(case: str) -> None:
    """Compares the loss, every gradient, the router's statistics and the updated biases.

    The rows pack several documents and end in padding. The balance loss is that of the batch, which
    is the microbatch, so that each microbatch has to have the same rows on one device.
    """
    assert_equals_one_device(*CASES[case])


REPLICAS = {"data": 2, "pipeline": 2, "fsdp": 2}


@pytest.mark.parametrize("gather_once", [pytest.param(False, marks=pytest.mark.slow), True])
def test_replicas_of_a_pipeline_compute_what_one_device_does(gather_once: bool) -> None:
    """Each stage adds up its gradients over the replicas once, whatever the ticks."""
    assert_equals_one_device(DENSE, REPLICAS, 2, {"remat": "full"}, gather_once=gather_once)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "gather_once"),
    [(REPLICAS, False), (REPLICAS, True), ({"pipeline": 2, "fsdp": 2, "expert": 2}, True)],
    ids=str,
)
def test_replicas_of_a_sparse_pipeline_compute_what_one_device_does(mesh, gather_once) -> None:
    """The balance loss is that of a microbatch on all replicas."""
    model = with_moe(SPARSE, dispatch="dropless")
    assert_equals_one_device(model, mesh, 1, {}, gather_once=gather_once)


@pytest.mark.slow
def test_an_evaluation_has_the_sums_of_one_device() -> None:
    """The batch of the balance loss is a microbatch here, so its scope is a row in this test."""
    model = with_moe(SPARSE, balance_scope="row")
    declared, values = drawn(plain_model(model))
    sums = []
    for config in (run_of(model, {}), run_of(model, {"pipeline": 2}, rounds=2)):
        mesh = make_mesh(config, jax.devices()[: int(np.prod(config.mesh.sizes))])
        placed = jax.device_put(values, shardings(declared, mesh))
        with jax.set_mesh(mesh):
            batch = global_batch(batch_rows(), mesh, ROWS, DIMS)
            sums.append(jax.jit(make_eval_step(config, make_task(config)))(placed, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *sums)


@pytest.mark.slow
def test_checkpoints_move_between_a_pipeline_and_none_bit_for_bit(tmp_path: Any) -> None:
    """The parameters have the same names and shapes, and the same layer in each place."""
    configs = {
        "none": run_of(SPARSE, {}),
        "pipeline": run_of(SPARSE, {"pipeline": 2, "fsdp": 2}, rounds=2),
    }
    programs = {
        name: make_program(config, jax.devices()[: int(np.prod(config.mesh.sizes))])
        for name, config in configs.items()
    }
    states = {name: program.init_state() for name, program in programs.items()}
    for name, other in (("none", "pipeline"), ("pipeline", "none")):
        workdir = tmp_path / name
        workdir.mkdir()
        identity.write_config(workdir, configs[name])
        with checkpoint.open_checkpoints(workdir, configs[name]) as checkpoints:
            checkpoint.save(checkpoints, configs[name], "0" * 64, states[name])
        with checkpoint.open_checkpoints(workdir, configs[other]) as checkpoints:
            restored = checkpoint.restore(checkpoints, programs[other].abstract_state)
        jax.tree.map(np.testing.assert_array_equal, restored, states[name])
        gate = restored.params["layers_1"]["block_0"]["moe"]["gate"]
        assert gate.sharding == states[other].params["layers_1"]["block_0"]["moe"]["gate"].sharding
    assert gate.shape[0] == 4 and gate.sharding.shard_shape(gate.shape)[0] == 4
    staged = states["pipeline"].params["layers_1"]["block_0"]["moe"]["gate"]
    assert staged.sharding.shard_shape(staged.shape)[0] == 2


@pytest.mark.slow
def test_a_bfloat16_pipeline_rounds_as_one_device_does() -> None:
    """It is as far from float32 as one device is. Rounding also changes what routers choose."""
    model = dataclasses.replace(SPARSE, compute_dtype="bfloat16", remat="full")
    declared, values = drawn(SPARSE)
    exact = step_from(run_of(SPARSE, {}), declared, values)
    alone = step_from(run_of(model, {}), declared, values)
    staged = step_from(run_of(model, {"pipeline": 2, "fsdp": 2}, rounds=2), declared, values)
    for name, value in exact.items():
        limit = 2 * np.linalg.norm(alone[name] - value) + 1e-6
        error = np.linalg.norm(staged[name] - value)
        assert error <= limit, f"{name} differs by {error:.1e}, more than {limit:.1e}"


@pytest.mark.slow
def test_an_encoder_goes_through_a_pipeline() -> None:
    model = dataclasses.replace(DENSE, vocab_size=258)  # with a token for the mask
    runs = run_of(model, {}), run_of(model, {"pipeline": 2}, rounds=2)
    expected, actual = (
        step_from(dataclasses.replace(run, task="masked_tokens"), *drawn(model)) for run in runs
    )
    assert max(differences(actual, expected).values()) < 2e-5


def test_a_model_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^mesh.pipeline=2 needs .*: set mesh.pipeline to 1$"):
        on_schedule(EncoderDecoder(DENSE, DENSE), Schedule(2, 1, 2))


def stored_shapes(jaxpr: Any, ticks: int) -> set[tuple[int, ...]]:
    """Returns the shapes of what loops of so many ticks store for each tick."""
    shapes = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == ticks:
            stored = eqn.outvars[eqn.params["num_carry"] :]
            shapes |= {x.aval.shape[1:] for x in stored}
        for inner in jaxprs_in_params(eqn.params):
            shapes |= stored_shapes(inner, ticks)
    return shapes


def shapes_of_ticks(model: ModelConfig, rounds: int) -> set[tuple[int, ...]]:
    """Returns the shapes of what the ticks of two stages store, with 4 microbatches."""
    config = run_of(model, {"pipeline": 2}, rounds)
    task = make_task(config)
    declared, _ = drawn(plain_model(model))
    params, router_state = unbox(declared["params"]), unbox(declared["router_state"])
    step = make_train_step(config, task.model(model), KEEP_GRADIENT, task, make_schedule(config))
    init = lambda params, biases: new_state(params, KEEP_GRADIENT.init(params), biases)
    state = jax.eval_shape(init, params, router_state)
    with jax.set_mesh(make_mesh(config, jax.devices()[:2])):
        jaxpr = jax.make_jaxpr(step)(state, batch_rows())
    return stored_shapes(jaxpr.jaxpr, Schedule(2, rounds, 4).ticks)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_tick_stores_activations_alone(remat: str) -> None:
    """Parameters of a tick's piece are cut out again in the backward pass.

    With remat "full" a tick stores the input of each layer, and what it knows of the tokens.
    """
    model = dataclasses.replace(DENSE, num_layers=8, remat=remat)
    shapes, rows, layers = shapes_of_ticks(model, rounds=2), ROWS // 4, 2
    params = unbox(drawn(plain_model(model))[0]["params"])
    weights = {(layers, *leaf.shape[1:]) for leaf in jax.tree.leaves(params["layers_0"])}
    assert not shapes & weights
    large = {shape for shape in shapes if np.prod(shape) >= rows * LENGTH * model.model_dim}
    assert (layers, rows, LENGTH, model.model_dim) in large
    assert len(large) == 1 or remat == "none"


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_ticks_store_gate_and_up_of_the_experts_rows_without_remat(remat: str) -> None:
    model = dataclasses.replace(with_moe(FLAT, dispatch="dropless"), remat=remat)
    widths = {shape[-1] for shape in shapes_of_ticks(model, rounds=1) if shape}
    assert (2 * model.moe.expert_dim in widths) == (remat == "none")


def test_the_gradient_of_the_embedding_gathers_no_activations() -> None:
    """Each device adds up its own tokens first. The partitioner would gather those of all."""
    vocabulary, dim, shape = 256, 64, (8, 16)
    config = run_of(DENSE, {"pipeline": 2, "fsdp": 2, "tensor": 2})
    ids = jax.random.randint(jax.random.key(0), shape, -1, vocabulary + 1)  # some are no row's
    factors = jax.random.normal(jax.random.key(1), (*shape, dim))
    table = jax.random.normal(jax.random.key(2), (vocabulary, dim))

    def gradient(table: jax.Array, ids: jax.Array, factors: jax.Array) -> jax.Array:
        wrong = (ids < 0) | (ids >= vocabulary)
        found = lambda table: constrain(look_up("float32", table, constrain(ids, "BT")), "BTD")
        return jax.grad(
            lambda table: jnp.sum(jnp.where(wrong[..., None], 0, found(table)) * factors)
        )(table)

    staged = jax.shard_map(
        lambda *arrays: jax.lax.pmean(gradient(*arrays), "pipeline"),
        in_specs=(PartitionSpec(),) * 3,
        out_specs=PartitionSpec(),
        axis_names={"pipeline"},
        check_vma=False,
    )
    mesh = make_mesh(config)
    arrays = [
        jax.device_put(x, NamedSharding(mesh, spec(dims, x.shape, mesh)))
        for x, dims in ((table, "VD"), (ids, "BT"), (factors, "BTD"))
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(staged).lower(*arrays).compile()
        actual = compiled(*arrays)
    np.testing.assert_allclose(actual, gradient(table, ids, factors), rtol=1e-5, atol=1e-5)
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert not [shape for shape in gathered if shape.split(",")[:2] == ["8", "16"]]
