"""Defines the state of a run, and the pure functions that advance and evaluate it."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import losses
from moe.config import ConfigError, RunConfig, Schedule
from moe.model.attention import choose_implementation, without_kernels
from moe.model.routing import update_bias
from moe.model.stack import group_name
from moe.parallel import pipeline
from moe.parallel.collectives import replicas
from moe.parallel.mesh import make_mesh, shardings
from moe.parameters import declarations, unbox
from moe.tasks import Task, choose_task
from moe.tasks.task import Batch
from moe.training.optimizer import Decay, choose_decay, make_optimizer, make_schedule, tree_where

Metrics = dict[str, Any]  # scalars by name, and under "router" a dict of arrays [L, ...]


class LargeCount(NamedTuple):
    """Counts up to 2**64 - 1 in two words of 32 bits, the largest that JAX has by default.

    The words are uint32 scalars, or arrays of several counts.
    """

    low: jax.Array
    high: jax.Array

    def __int__(self) -> int:
        return (int(self.high) << 32) + int(self.low)

    def plus(self, number: int | jax.Array) -> "LargeCount":
        """Adds a number below 2**32 to the count, or each number of a uint32 array."""
        low = self.low + jnp.asarray(number, jnp.uint32)
        carry = low < self.low  # unsigned integers wrap around, so the sum has become smaller
        return LargeCount(low, self.high + carry.astype(jnp.uint32))


class TrainState(struct.PyTreeNode):
    """Holds everything that a run needs to go on as if it had never stopped."""

    step: jax.Array  # steps taken, including those whose update was skipped
    examples: LargeCount  # rows consumed: the whole state of the data stream
    # Updates skipped so far, because the loss or the gradient was not finite.
    skipped: jax.Array
    skipped_in_row: jax.Array  # updates skipped since the last one that was made
    params: Any
    opt_state: Any
    # Biases that follow the experts' load instead of a gradient. Empty where no router has them.
    router_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables that the model is applied with."""
        return {"params": self.params, "router_state": self.router_state}


def new_state(params: Any, opt_state: Any, router_state: Any) -> TrainState:
    """Returns the state of a run that has taken no step."""
    zero, zero_word = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.uint32)
    return TrainState(
        step=zero,
        examples=LargeCount(zero_word, zero_word),
        skipped=zero,
        skipped_in_row=zero,
        params=params,
        opt_state=opt_state,
        router_state=router_state,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds the functions and the state of a run on its mesh, for `fit` or for another loop."""

    mesh: Mesh
    task: Task
    model: nn.Module
    # The implementation that computes causal attention on this mesh. The attention of an encoder,
    # which is not causal, is chosen while its program is traced, and may be another one.
    attention: str
    abstract_state: TrainState  # shapes, dtypes and shardings
    init_state: Callable[[], TrainState]
    # (state, batch) -> (state, metrics). The state is donated: its arrays are gone afterwards. What
    # `train_step.func` compiles also takes `train_step.args`, the numbers of the schedule, first.
    train_step: functools.partial[tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, Batch], losses.Sums]  # (variables, batch) -> sums


def make_program(
    config: RunConfig,
    devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # a class
    *,
    task: Task | None = None,
    refused: Mapping[str, Collection[str]] | None = None,
) -> Program:
    """Makes model, optimizer, state and steps of a run on `devices` (by default, on all of them).

    `task` is the caller's own, where `config.task` is "custom". Kernels are not chosen that are
    `refused` for "attention" or "experts". Each function is compiled when it is first called.
    """
    task = choose_task(config, task)
    mesh = make_mesh(config, devices)
    config = without_kernels(config, mesh, refused or {})
    implementation = choose_implementation(config.model, mesh, config.data.sequence_length)
    assert implementation is not None  # the devices of a mesh say which chip they are
    model = task.model(config.model)
    draw = functools.partial(_draw_variables, task, model)
    declared = jax.eval_shape(draw, jax.random.key(config.seed))
    optimizer = make_optimizer(config.optimizer, make_schedule(config), declared["params"])
    abstract = _abstract_state(optimizer, declared, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def init_state() -> TrainState:
        """Makes the state before the first step, every array in its shards."""
        make_state = lambda key: unbox(_first_state(optimizer, draw(key)))
        jitted = jax.jit(make_state, out_shardings=state_shardings)
        return jitted(jax.random.key(config.seed))

    return Program(
        mesh=mesh,
        task=task,
        model=model,
        attention=implementation.name,
        abstract_state=abstract,
        init_state=init_state,
        train_step=_jit_train_step(config, model, task, declared["params"], state_shardings),
        eval_step=_jit_eval_step(config, task, mesh),
    )


def _jit_train_step(
    config: RunConfig, model: nn.Module, task: Task, declared: Any, state_shardings: Any
) -> functools.partial[tuple[TrainState, Metrics]]:
    """Returns the jitted step of a run, to which the numbers of its schedule are given."""

    def train_step(decay: Decay, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        schedule = make_schedule(config, decay)
        optimizer = make_optimizer(config.optimizer, schedule, declared)
        return make_train_step(config, model, optimizer, task, schedule)(state, batch)

    jitted = jax.jit(train_step, donate_argnums=1, out_shardings=(state_shardings, None))
    return functools.partial(jitted, choose_decay(config))


def _jit_eval_step(
    config: RunConfig, task: Task, mesh: Mesh
) -> Callable[[Any, Batch], losses.Sums]:
    """Returns the jitted evaluation step, whose sums every process holds whole, to read them."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(make_eval_step(config, task), out_shardings=whole)


def _draw_variables(task: Task, model: nn.Module, key: jax.Array) -> Any:
    """Draws the variables of a new model, whose parameters are Declared."""
    return dict(model.init(key, jax.tree.map(jnp.asarray, dict(task.init_batch))))


def _first_state(optimizer: optax.GradientTransformation, variables: Any) -> TrainState:
    """Returns the state before the first step, from Declared variables.

    The optimizer copies the structure of declared parameters, so its moments are split as the
    parameters are.
    """
    params = variables["params"]
    return new_state(params, optimizer.init(params), variables.get("router_state", {}))


def _abstract_state(
    optimizer: optax.GradientTransformation, variables: Any, mesh: Mesh
) -> TrainState:
    """Returns the first state's shapes, dtypes and shardings, from those of its variables.

    Nothing is allocated, and the model is not traced again.
    """
    declared = jax.eval_shape(functools.partial(_first_state, optimizer), variables)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        unbox(declared),
        shardings(declared, mesh),
    )


def make_train_step(
    config: RunConfig,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the pure function (state, batch) -> (state, metrics) of one step.

    The loss is a mean over the targets of all microbatches together, so accumulation changes only
    how much memory a step needs. An update is skipped and counted if its loss or its gradient is
    not finite; `optimizer` must make finite updates of a finite gradient. `schedule` only
    serves the metrics.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if config.model.moe.jitter:
            batch = batch | {"row_keys": row_keys(config, state.examples)}
        gradient, sums = _accumulate(config, model, task, state.variables, batch)
        metrics = task.metrics(sums)
        norm = optax.tree.norm(gradient)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = _update(config, optimizer, state, gradient, sums, is_finite)
        if state.router_state:
            metrics["router"] |= {"bias_range": _bias_ranges(state.router_state)}
        return new, metrics | {
            "gradient_norm": norm,
            # Skipped updates do not move the schedule on.
            "learning_rate": schedule(state.step - state.skipped),
            "targets": sums["targets"],
            "skipped_steps": new.skipped,
            "skipped_in_row": new.skipped_in_row,
        }

    return train_step


def _update(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Any,
    sums: losses.Sums,
    is_finite: jax.Array,
) -> TrainState:
    """Returns the state after a step, whose update is skipped unless `is_finite`.

    A skipped update is counted, and changes nothing else.
    """
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    router_state = _update_biases(config, state.router_state, sums["router"])
    # Neither moments nor parameters are tested. The moments are means of gradients and of their
    # squares, and the gradient's norm is finite only if the sum of all squares is. What a config
    # may say keeps AdamW's updates finite too (`OptimizerConfig`). A test would read and write all
    # parameters once more, which was a tenth of a sparse step on a GPU.
    return TrainState(
        step=state.step + 1,
        examples=state.examples.plus(config.train.batch_size),
        skipped=state.skipped + (~is_finite).astype(state.skipped.dtype),
        skipped_in_row=jnp.where(is_finite, 0, state.skipped_in_row + 1),
        params=tree_where(is_finite, params, state.params),
        opt_state=tree_where(is_finite, opt_state, state.opt_state),
        router_state=tree_where(is_finite, router_state, state.router_state),
    )


def row_keys(config: RunConfig, examples: LargeCount) -> jax.Array:
    """Makes a random key for each row of a step that begins after `examples` rows.

    The key depends on the seed and on the row's number in the whole run.
    """
    numbers_B = examples.plus(jnp.arange(config.train.batch_size, dtype=jnp.uint32))
    seed_key = jax.random.key(config.seed)

    def row_key(number: LargeCount) -> jax.Array:
        key = jax.random.fold_in(seed_key, number.low)
        # A run rarely has 2**32 rows. Until then, a row's key follows only from its low word.
        return jnp.where(number.high > 0, jax.random.fold_in(key, number.high), key)

    return jax.vmap(row_key)(numbers_B)


def _update_biases(
    config: RunConfig, router_state: Any, router_sums: losses.RouterStats | None
) -> Any:
    """Returns the router's biases, moved by the whole batch's load [L, E].

    Each kind of sparse layer has its own array of biases [repeats, E].
    """
    biases, structure = jax.tree.flatten(router_state)
    if router_sums is None or not biases:
        return router_state
    ends = np.cumsum([len(bias) for bias in biases])
    loads = jnp.split(router_sums.load, ends[:-1])
    rate = config.model.moe.bias_update_rate
    moved = [update_bias(bias, load, rate) for bias, load in zip(biases, loads, strict=True)]
    return jax.tree.unflatten(structure, moved)


def _bias_ranges(router_state: Any) -> jax.Array:
    """Returns the largest bias less the smallest one in each sparse layer, [L]."""
    return jnp.concatenate([jnp.ptp(x, axis=-1) for x in jax.tree.leaves(router_state)])


def make_eval_step(config: RunConfig, task: Task) -> Callable[[Any, Batch], losses.Sums]:
    """Makes the pure function (variables, batch) -> sums and counts.

    The caller adds these up over batches and divides once.
    """
    model = task.model(config.model.without_jitter())

    def eval_step(variables: Any, batch: Batch) -> losses.Sums:
        schedule = pipeline.choose_schedule(config)
        if schedule is None:
            return _sums(model, task, variables, batch)
        staged = on_schedule(model, schedule)

        def stage_sums(variables: Any, batch: Batch) -> tuple[losses.Sums]:
            return (_sums(staged, task, variables, pipeline.own_rows(batch, schedule)),)

        group = group_name(config.model.pipelined_group)
        return pipeline.on_stages(stage_sums, schedule, group, (None,))(variables, batch)[0]

    return eval_step


def _sums(model: nn.Module, task: Task, variables: Any, batch: Batch) -> losses.Sums:
    """Returns the task's sums and counts for a batch, by applying the model to it.

    The model is applied once for both ends, which share a tied table's gradient.
    """

    def ends(model: Any) -> Any:
        return model(batch), model.unembedding()

    output, unembedding = nn.apply(ends, model)(variables)
    return task.loss(output, unembedding, batch)


def _accumulate(
    config: RunConfig, model: nn.Module, task: Task, variables: Any, batch: Batch
) -> tuple[Any, losses.Sums]:
    """Returns the gradient of the whole batch's loss, and its sums, one microbatch at a time."""
    schedule = pipeline.choose_schedule(config)
    if schedule is None:
        run = functools.partial(_accumulate_microbatches, config, model, task)
    else:
        run = functools.partial(_stage_gradient, config, on_schedule(model, schedule), task)
    if axes := replicas.replica_axes(config):
        declared = declarations(model, task.init_batch)
        dtype = config.model.compute_dtype
        run = replicas.on_replicas(run, axes, task.dims, declared, dtype)
    if schedule is not None:
        group = group_name(config.model.pipelined_group)
        run = pipeline.on_stages(run, schedule, group, (variables["params"], None))
    return run(variables, batch, task.counts(batch))


def _accumulate_microbatches(
    config: RunConfig,
    model: nn.Module,
    task: Task,
    variables: Any,
    batch: Batch,
    global_counts: losses.Sums,
) -> tuple[Any, losses.Sums]:
    """Returns the gradient and the sums of all microbatches of a batch, or of a replica's rows."""
    microbatches = config.train.accumulation

    @jax.jit  # traced once, for its shapes and for the loop
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params: Any, microbatch: Batch) -> tuple[jax.Array, losses.Sums]:
        sums = _sums(model, task, variables | {"params": params}, microbatch)
        return losses.objective(sums, global_counts, config.model.moe), sums

    params = variables["params"]
    if microbatches == 1:
        return gradient(params, batch)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    # Microbatch m takes rows m, m+M, ..., so that every device splits its own rows and moves none.
    split = jax.tree.map(
        lambda x: einops.rearrange(x, "(b m) ... -> m b ...", m=microbatches), batch
    )
    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
    )
    total, _ = jax.lax.scan(add, zeros, split)
    return total


def on_schedule(model: nn.Module, schedule: Schedule) -> nn.Module:
    """Returns the same model for the stages of a pipeline.

    Raises ConfigError if the model, of the caller's own task, has no stages.
    """
    if "schedule" not in {field.name for field in dataclasses.fields(model)}:
        raise ConfigError(
            f"mesh.pipeline={schedule.stages} needs a model with a field `schedule`, which "
            f"{type(model).__name__} has not: set mesh.pipeline to 1"
        )
    return model.clone(schedule=schedule)


def _stage_gradient(
    config: RunConfig,
    staged: nn.Module,
    task: Task,
    variables: Any,
    batch: Batch,
    global_counts: losses.Sums,
) -> tuple[Any, losses.Sums]:
    """Returns what `_accumulate_microbatches` does, as a stage of a pipeline computes it.

    Each stage computes its own microbatches' part of the objective. Its gradient reaches all stages
    backwards along the pipeline.
    """
    rows = pipeline.own_rows(batch, staged.schedule)

    def objective(params: Any) -> tuple[jax.Array, losses.Sums]:
        sums = _sums(staged, task, variables | {"params": params}, rows)
        return losses.objective(sums, global_counts, config.model.moe), sums

    return jax.grad(objective, has_aux=True)(variables["params"])
