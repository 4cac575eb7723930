"""One step on 8 devices against one, accumulation, golden metrics, and updates that are skipped."""

import dataclasses
import functools
import itertools

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
from moe.parallel.mesh import global_batch
from moe.parameters import Declared, declarations, unbox
from moe.tasks import make_task
from moe.tasks.language_modelling import DIMS
from moe.training.optimizer import choose_decay, make_optimizer, make_schedule
from moe.training.train_step import (
    LargeCount,
    make_program,
    make_train_step,
    new_state,
    row_keys,
)

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=256,
        num_layers=2,
        model_dim=32,
        feed_forward_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        compute_dtype="float32",
    ),
    data=DataConfig(sequence_length=16),
    optimizer=OptimizerConfig(warmup_fraction=0.1),
    train=TrainConfig(batch_size=16, steps=10),
)


def batch_rows(seed=0, batch=16, length=16):
    """Packed rows with documents of random length, and some padding: what the loader gives."""
    rng = np.random.default_rng(seed)
    starts = rng.random((batch, length)) < 0.2
    segments = 1 + np.cumsum(starts, axis=1)
    index = np.arange(length)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    real = index < rng.integers(length // 2, length + 1, (batch, 1))
    return {
        "tokens": rng.integers(0, 256, (batch, length)).astype(np.int32),
        "targets": rng.integers(0, 256, (batch, length)).astype(np.int32),
        "loss_mask": real & (rng.random((batch, length)) < 0.9),
        "segment_ids": np.where(real, segments, 0).astype(np.int32),
        "positions": positions.astype(np.int32),
    }


@functools.cache
def program_on(devices, config=CONFIG):
    """Makes a program for the first devices. Tests that ask for the same one compile it once."""
    return make_program(config, jax.devices()[:devices])


def run(config, steps=2, devices=8, rows=None):
    """The state and the last metrics after `steps` steps."""
    program = program_on(devices, config)
    state = program.init_state()
    with jax.set_mesh(program.mesh):
        for step in range(steps):
            batch = global_batch(
                rows or batch_rows(step), program.mesh, config.train.batch_size, DIMS
            )
            state, metrics = program.train_step(state, batch)
    return state, {name: float(value) for name, value in metrics.items() if name != "router"}


@pytest.fixture(scope="module")
def one_device():
    return run(CONFIG, devices=1)


def assert_same(run_a, run_b):
    (state_a, metrics_a), (state_b, metrics_b) = run_a, run_b
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5, err_msg=name)
    # Adam divides by the gradient's size, so after two steps a parameter may differ by more than
    # its gradient did.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state_a.params, state_b.params
    )


LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor, key/value heads copied": {"data": 2, "tensor": 4},
    "data, fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, expert and context": {"data": 1, "fsdp": 2, "expert": 2, "context": 2},
}


# tests/test_invariance.py has the other axes, and tests/parallel/test_sequence.py copies key/value
# heads.
PLAIN_LAYOUT = "data, fsdp and tensor"


@pytest.mark.parametrize(
    "layout",
    [x if x == PLAIN_LAYOUT else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS],
)
def test_eight_devices_equal_one(one_device, layout):
    assert_same(one_device, run(dataclasses.replace(CONFIG, mesh=MeshConfig(**LAYOUTS[layout]))))


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_accumulation_equals_one_batch(one_device, mesh):
    """Also with microbatches of unequal numbers of targets: the sum is divided once, by the number
    in the whole batch.
    """
    train = dataclasses.replace(CONFIG.train, accumulation=4, loss_chunk=5)
    config = dataclasses.replace(CONFIG, train=train, mesh=MeshConfig(**mesh))
    assert_same(one_device, run(config, devices=int(np.prod(config.mesh.sizes))))


def test_golden_first_step():
    """The metrics of the first step, pinned: any change to model, initialisation, loss or optimizer
    has to own up to it here.
    """
    _, metrics = run(CONFIG, steps=1, devices=1)
    assert metrics["loss"] == pytest.approx(GOLDEN["loss"], rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(GOLDEN["gradient_norm"], rel=1e-4)
    assert metrics["targets"] == GOLDEN["targets"]
    assert metrics["learning_rate"] == 0.0


GOLDEN = {"loss": 6.061288, "gradient_norm": 2.002362, "targets": 194}


def test_parameters_and_moments_are_split_alike_and_never_whole():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    program = program_on(8, config)
    state = program.init_state()
    for moment in ("mu", "nu"):
        moments = optax.tree.get(state.opt_state, moment)
        jax.tree.map(
            lambda a, b: np.testing.assert_equal(a.sharding == b.sharding, True),
            moments,
            state.params,
        )
    gate = state.params["layers_0"]["block_0"]["feed_forward"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 8, 24)
    hlo = jax.jit(program.init_state).lower().compile().as_text()
    assert "f32[2,32,48]" not in hlo  # the whole gate; a device makes its eighth


def test_the_step_keeps_the_states_shardings():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    program = program_on(8, config)
    state, _ = run(config, steps=1)
    jax.tree.map(
        lambda new, old: np.testing.assert_equal(new.sharding == old.sharding, True),
        state,
        program.abstract_state,
    )


def test_initial_values_do_not_depend_on_the_layout():
    whole = program_on(1).init_state()
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    split = program_on(8, config).init_state()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, split
    )


def test_what_is_not_finite_is_skipped_and_counted():
    program = program_on(1)
    state = program.init_state()
    poisoned = state.replace(params=state.params | {"final_norm": {"scale": jnp.full(32, jnp.inf)}})
    kept = jax.tree.map(np.array, poisoned)
    batch = global_batch(batch_rows(), program.mesh, 16, DIMS)
    with jax.set_mesh(program.mesh):
        state, metrics = program.train_step(poisoned, batch)
        assert not np.isfinite(metrics["loss"])
        jax.tree.map(
            np.testing.assert_array_equal,
            (state.params, state.opt_state),
            (kept.params, kept.opt_state),
        )
        assert (int(state.step), int(state.examples)) == (1, 16)
        state, metrics = program.train_step(state, batch)
        assert (int(state.skipped), int(metrics["skipped_in_row"])) == (2, 2)
        healed = state.replace(params=state.params | {"final_norm": {"scale": jnp.ones(32)}})
        state, metrics = program.train_step(healed, batch)
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_row"])) == (2, 0)
    assert metrics["learning_rate"] == 0.0  # the first update that is made is the schedule's first


def assert_skipped(optimizer, *batches):
    """A step leaves the parameters and the optimizer's state as they were, and counts the update;
    returns the metrics of all.
    """
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, num_layers=1, model_dim=8, feed_forward_dim=8),
    )
    model = Transformer(config.model)
    params = jax.jit(lambda key: unbox(model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})))(
        jax.random.key(0)
    )["params"]
    state = new_state(params, optimizer.init(params), {})
    step = jax.jit(
        make_train_step(config, model, optimizer, make_task(config), make_schedule(config))
    )
    found = [step(state, batch) for batch in batches]
    for new, metrics in found:
        jax.tree.map(
            np.testing.assert_array_equal,
            (new.params, new.opt_state),
            (state.params, state.opt_state),
        )
        assert (
            int(new.step),
            int(new.skipped),
            int(metrics["skipped_steps"]),
            int(metrics["skipped_in_row"]),
        ) == (1, 1, 1, 1)
    return [metrics for _, metrics in found]


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.0), (0.0, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize(
    ("rate", "decay", "clip_norm"), [(1e20, 1e-20, 1.0), (2.0, 1.0, 1.0), (5.0, 0.1, 1e38)]
)
def test_parameters_stay_finite_whatever_a_config_may_say(rate, decay, clip_norm, beta1, beta2):
    """Gradients of any size, which vanish now and then: then the second moment may be 0."""
    config = OptimizerConfig(
        learning_rate=rate, weight_decay=decay, clip_norm=clip_norm, beta1=beta1, beta2=beta2
    )
    params = {"w": Declared(jnp.ones(4), "D", "linear", fan_in=4)}
    optimizer = make_optimizer(config, optax.constant_schedule(rate), params)
    values = unbox(params)
    state = optimizer.init(values)
    for step in range(100):
        scale = 10.0 ** (-step % 20) if step % 3 else 0.0
        gradient = {"w": jnp.array([1e-1, 1e-38, 0.0, -1e-2]) * scale}
        updates, state = optimizer.update(gradient, state, values)
        values = optax.apply_updates(values, updates)
    assert np.all(np.isfinite(values["w"]))


def test_a_batch_with_an_id_outside_the_vocabulary_is_skipped():
    batches = [batch_rows() for _ in range(4)]
    row, position = np.argwhere(batches[0]["loss_mask"])[7]
    for batch, (field, wrong) in zip(
        batches, itertools.product(("tokens", "targets"), (-1, 256)), strict=True
    ):
        batch[field][row, position] = wrong
    assert all(np.isnan(metrics["loss"]) for metrics in assert_skipped(optax.sgd(0.1), *batches))


def test_decay_reaches_what_multiplies_activations_alone():
    model = Transformer(CONFIG.model)
    optimizer = make_optimizer(CONFIG.optimizer, optax.constant_schedule(0.5), declarations(model))
    params = program_on(1).init_state().params
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda params: optimizer.update(zeros, optimizer.init(params), params)[0])(
        params
    )
    decayed = {
        jax.tree_util.keystr(path)
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.any(update)
    }
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert every - decayed == {name for name in every if "norm" in name} | {"['embedding']"}
    np.testing.assert_allclose(
        updates["unembedding"], -0.5 * 0.1 * params["unembedding"], rtol=1e-6
    )


def test_schedule():
    schedule = make_schedule(
        RunConfig(
            optimizer=OptimizerConfig(
                learning_rate=2.0, warmup_fraction=10 / 110, final_learning_rate_fraction=0.1
            ),
            train=TrainConfig(steps=110),
        )
    )
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2}
    assert {step: pytest.approx(float(schedule(step)), abs=1e-6) for step in expected} == expected


def test_a_schedule_with_a_stable_phase():
    """The last 16 of 100 updates decay: after 4 of them, a root of 1/4 of the way is gone."""
    optimizer = OptimizerConfig(
        schedule="wsd", learning_rate=2.0, warmup_steps=10, decay_fraction=0.16
    )
    short, long = (
        RunConfig(optimizer=optimizer, train=TrainConfig(steps=steps)) for steps in (100, 200)
    )
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 50: 2.0, 84: 2.0, 88: 1.1, 100: 0.2, 101: 0.2}
    rates = {step: float(make_schedule(short)(step)) for step in expected}
    assert rates == {step: pytest.approx(value, abs=1e-6) for step, value in expected.items()}
    traced = jax.jit(lambda decay, updates: make_schedule(short, decay)(updates))
    rates = [traced(choose_decay(config), np.arange(101)) for config in (short, long)]
    np.testing.assert_array_equal(rates[0][:85], rates[1][:85])
    np.testing.assert_allclose(rates[0], jax.jit(make_schedule(short))(np.arange(101)), rtol=1e-6)
    assert float(rates[1][100]) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_runs_of_other_steps_have_one_program_with_a_stable_phase(schedule):
    """Programs of other constants may round otherwise, and then a fork would not be exact."""

    def program_text(steps):
        optimizer = OptimizerConfig(schedule=schedule, warmup_steps=2)
        train = dataclasses.replace(CONFIG.train, steps=steps)
        program = make_program(dataclasses.replace(CONFIG, optimizer=optimizer, train=train))
        batch = global_batch(batch_rows(), program.mesh, 16, DIMS)
        step = program.train_step
        with jax.set_mesh(program.mesh):
            return step.func.lower(*step.args, program.abstract_state, batch).as_text()

    assert (program_text(100) == program_text(200)) == (schedule == "wsd")


def test_adamw_by_hand():
    """One parameter, one step: the bias-corrected moments of the first gradient make its sign, and
    decay adds to it.
    """
    optimizer = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.1)
    params = jnp.array([2.0])
    updates, _ = optimizer.update(jnp.array([-3.0]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.1 * (-1.0 + 0.1 * 2.0), rtol=1e-5)


@pytest.mark.slow
def test_evaluation_sums_add_up_and_draw_nothing():
    moe = MoEConfig(
        num_experts=4, expert_dim=8, balance_scope="row", jitter=0.1
    )  # jitter is training's
    program = make_program(
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=moe)),
        jax.devices()[:1],
    )
    variables, rows = program.init_state().variables, batch_rows()
    with jax.set_mesh(program.mesh):
        whole = program.eval_step(variables, global_batch(rows, program.mesh, 16, DIMS))
        parts = [
            program.eval_step(variables, {name: x[half] for name, x in rows.items()})
            for half in (slice(0, 4), slice(4, 16))
        ]
    total = jax.tree.map(lambda *sums: sum(sums), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, total
    )  # some 200 positive terms
    assert losses.metrics(whole)["loss"] == pytest.approx(np.log(256), rel=0.2)


def large_count(number):
    return LargeCount(jnp.uint32(number % 2**32), jnp.uint32(number // 2**32))


@pytest.mark.parametrize("number", [0, 2**31 - 8, 2**32 - 16, 2**32 - 15, 2**32, 3 * 2**40 - 1])
def test_examples_are_counted_beyond_32_bits(number):
    count = jax.jit(lambda count: count.plus(16))(large_count(number))
    assert int(large_count(number)) == number and int(count) == number + 16
    assert [leaf.dtype for leaf in jax.tree.leaves(count)] == [jnp.uint32] * 2


def test_a_step_counts_its_examples_beyond_32_bits():
    program = program_on(1)
    state = program.init_state().replace(examples=large_count(2**32 - 10))
    with jax.set_mesh(program.mesh):
        state, _ = program.train_step(state, global_batch(batch_rows(), program.mesh, 16, DIMS))
    assert int(state.examples) == 2**32 + 6


def test_a_rows_key_is_that_of_its_number_in_the_run():
    def keys(examples):
        return np.asarray(jax.random.key_data(row_keys(CONFIG, large_count(examples))))

    # The numbers of runs from before there were two words.
    numbers = 80 + jnp.arange(16, dtype=jnp.int32)
    folded = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), numbers)
    np.testing.assert_array_equal(keys(80), jax.random.key_data(folded))
    # Whichever step a row falls into, and whether its step began below 2**32 or above.
    crossing, above = keys(2**32 - 6), keys(2**32)
    np.testing.assert_array_equal(crossing[6:], above[:10])
    drawn = np.concatenate([keys(0), keys(2**32 - 16), above, keys(2**33)])
    assert len(np.unique(drawn, axis=0)) == 64
