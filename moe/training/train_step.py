"""The state of a run, and the pure functions that advance and evaluate it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from moe import losses
from moe.config import RunConfig
from moe.model.attention import choose_implementation
from moe.model.routing import update_bias
from moe.model.transformer import Transformer
from moe.parallel.mesh import make_mesh, shardings
from moe.parameters import declarations, unbox
from moe.training.optimizer import all_finite, make_optimizer, make_schedule, tree_where

Batch = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold for a run to go on as if it had never stopped."""

    step: jax.Array  # steps taken, skipped updates included
    examples: jax.Array  # rows consumed: the whole state of the data stream
    skipped: (
        jax.Array
    )  # updates skipped so far, for a loss, a gradient or new parameters that are not finite
    skipped_in_row: jax.Array  # of them, those since the last update
    params: Any
    opt_state: Any
    # biases that follow the experts' load instead of a gradient; empty where no router has them
    router_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "router_state": self.router_state}


@dataclasses.dataclass(frozen=True)
class Program:
    """The pieces of a run on its mesh, jitted: what `fit` loops over, and what benchmarks and other
    loops may call.
    """

    mesh: Mesh
    model: Transformer
    attention: str  # the implementation of attention, as asked for or chosen for the mesh's chip
    abstract_state: TrainState  # shapes, dtypes and shardings
    init_state: Callable[[], TrainState]
    train_step: Callable[
        [TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]
    ]  # the state is donated
    eval_step: Callable[[Any, Batch], losses.Sums]


def make_program(config: RunConfig, devices: list[jax.Device] | None = None) -> Program:
    """Model, optimizer, state and steps of a run on `devices` (all, by default). Nothing is
    compiled before it is called.
    """
    mesh = make_mesh(config, devices)
    implementation = choose_implementation(config.model, mesh, config.data.sequence_length)
    model = Transformer(config.model)
    optimizer = make_optimizer(config.optimizer, make_schedule(config), declarations(model))
    loss_fn = losses.next_token_loss(config.train.loss_chunk)
    abstract = abstract_state(config, model, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Program(
        mesh,
        model,
        implementation.name,
        abstract,
        lambda: init_state(config, model, optimizer, mesh),
        jax.jit(
            make_train_step(config, model, optimizer, loss_fn),
            donate_argnums=0,
            out_shardings=(shardings, None),
        ),
        jax.jit(make_eval_step(model, loss_fn)),
    )


def init_state(
    config: RunConfig, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step, every array created in its shards."""
    init, shardings = _init_and_shardings(config, model, optimizer, mesh)
    return jax.jit(lambda key: unbox(init(key)), out_shardings=shardings)(
        jax.random.key(config.seed)
    )


def abstract_state(
    config: RunConfig, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result; nothing is allocated."""
    init, shardings = _init_and_shardings(config, model, optimizer, mesh)
    shapes = unbox(jax.eval_shape(init, jax.random.key(config.seed)))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _init_and_shardings(
    config: RunConfig, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[[jax.Array], TrainState], Any]:
    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)})
        params = variables["params"]
        # The optimizer copies the structure of declared parameters, so its moments are split as the
        # parameters are.
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            zero,
            zero,
            zero,
            zero,
            params,
            optimizer.init(params),
            variables.get("router_state", {}),
        )

    return init, shardings(jax.eval_shape(init, jax.random.key(config.seed)), mesh)


def make_train_step(
    config: RunConfig,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: losses.LossFn,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function (state, batch) -> (state, metrics) of one step.

    The loss is the sum over all microbatches' unmasked targets over their number, so accumulation
    changes nothing but memory. An update is skipped and counted if its loss, its gradient or the
    parameters that it makes are not finite.
    """
    schedule = make_schedule(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if config.model.moe.jitter:
            batch = batch | {"row_keys": _row_keys(config, state.examples)}
        gradient, sums = _accumulate(config, model, loss_fn, state.variables, batch)
        metrics = losses.metrics(sums)
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The moments need no test of their own: they are means of gradients and of their squares,
        # and the norm is finite only if the sum of all squares is.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & all_finite(params)
        new = TrainState(
            step=state.step + 1,
            examples=state.examples + config.train.batch_size,
            skipped=state.skipped + (~finite).astype(state.skipped.dtype),
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            params=tree_where(finite, params, state.params),
            opt_state=tree_where(finite, opt_state, state.opt_state),
            router_state=tree_where(
                finite,
                _update_biases(config, state.router_state, sums["router"]),
                state.router_state,
            ),
        )
        learning_rate = schedule(state.step - state.skipped)
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "targets": sums["targets"],
        }
        if state.router_state:
            metrics["router"] |= {
                "bias_range": jnp.concatenate(
                    [jnp.ptp(x, axis=-1) for x in jax.tree.leaves(state.router_state)]
                )
            }
        return new, metrics | {"skipped_steps": new.skipped, "skipped_in_row": new.skipped_in_row}

    return train_step


def _row_keys(config: RunConfig, examples: jax.Array) -> jax.Array:
    """A key for each row of the step that begins after `examples` rows, by its number in the whole
    run.
    """
    numbers_B = examples + jnp.arange(config.train.batch_size, dtype=examples.dtype)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(config.seed), numbers_B)


def _update_biases(
    config: RunConfig, router_state: Any, router_sums: losses.RouterStats | None
) -> Any:
    """The router's biases, [repeats, E] for each kind of sparse layer, moved by the whole batch's
    load [L, E].
    """
    biases, structure = jax.tree.flatten(router_state)
    loads = (
        jnp.split(router_sums.load, np.cumsum([len(bias) for bias in biases])[:-1])
        if biases
        else []
    )
    rate = config.model.moe.bias_update_rate
    return jax.tree.unflatten(
        structure, [update_bias(bias, load, rate) for bias, load in zip(biases, loads, strict=True)]
    )


def make_eval_step(
    model: Transformer, loss_fn: losses.LossFn
) -> Callable[[Any, Batch], losses.Sums]:
    """The pure function (variables, batch) -> sums and counts, to be added up over batches and
    divided once.
    """
    model = model.without_jitter()

    def eval_step(variables: Any, batch: Batch) -> losses.Sums:
        return _sums(model, loss_fn, variables, batch)

    return eval_step


def _sums(model: nn.Module, loss_fn: losses.LossFn, variables: Any, batch: Batch) -> losses.Sums:
    output = model.apply(variables, batch)
    return loss_fn(output, lambda hidden: model.apply(variables, hidden, method="unembed"), batch)


def _accumulate(
    config: RunConfig, model: nn.Module, loss_fn: losses.LossFn, variables: Any, batch: Batch
) -> tuple[Any, losses.Sums]:
    """The gradient of the whole batch's loss, and its sums, a microbatch at a time."""
    global_counts, microbatches = losses.counts(batch), config.train.accumulation

    @jax.jit  # traced once, for its shapes and for the loop
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params: Any, microbatch: Batch) -> tuple[jax.Array, losses.Sums]:
        sums = _sums(model, loss_fn, variables | {"params": params}, microbatch)
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
