"""Sums gradients and statistics over replicas once a step.

The devices of some mesh axes hold copies of the parameters: those of `data`, of `context`, and with
`train.gather_once` those of `fsdp` for the time of a step. The partitioner adds up the gradients of
copies for each layer and microbatch. Here these axes are Manual (jax.shard_map), so a device adds
up its own microbatches first, and what it sends does not grow with their number:

    parameters -> (gathered over fsdp) -> each device's microbatches, one after the other
                                             |  gradients are added up on the device
    gradients  <- (scattered over fsdp) <- summed over the replicas

In a pipeline each stage does this for its own layers, with its own microbatches, after its ticks.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from moe.config import AXES, RunConfig, split_axes
from moe.config.layout import gathers_once
from moe.parallel.collectives.weights import lay_out_whole, sum_gradient, sum_over
from moe.parallel.mesh import per_shard
from moe.parameters import Declared, is_declared

_ROWS = ("data", "fsdp")  # the axes that may be Manual here and split rows


def replica_axes(config: RunConfig) -> tuple[str, ...]:
    """Returns the axes of the set mesh over whose replicas a step sums once.

    Where one microbatch is a step, the partitioner already adds up once, while it computes. Experts
    see whole rows, so in sparse models `context` is left to it as well.
    """
    sizes = dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)
    if config.train.accumulation == 1:
        return ()
    axes = ["data"]
    if not config.model.moe.num_experts and config.task != "span_corruption":
        axes.append("context")
    if gathers_once(config, sizes):
        axes.append("fsdp")
    return tuple(axis for axis in axes if sizes[axis] > 1)


def on_replicas(
    function: Callable[..., tuple[Any, Any]],
    axes: tuple[str, ...],
    dims: Mapping[str, str],
    declared: Any,
    dtype: jax.typing.DTypeLike,
) -> Callable[..., tuple[Any, Any]]:
    """Makes a function of whole arrays from one that each replica calls with its own rows.

    `function` takes variables, a batch and counts. It returns the gradient of the parameters, which
    are `declared`, and sums; both are added up. `dims` are the dimensions of the batch's fields.
    `dtype` is that of activations.
    """

    def on_replica(*arguments: Any) -> tuple[Any, Any]:
        gradient, sums = function(*arguments)
        add_up = functools.partial(_add_up, axes=axes)
        gradient = jax.tree.map(add_up, declared, gradient, is_leaf=is_declared)
        return gradient, jax.tree.map(lambda x: jax.lax.psum(x, axes), sums)

    spec = lambda dims: PartitionSpec(*split_axes(dims, axes))

    def run(variables: Any, batch: Mapping[str, jax.Array], counts: Any) -> tuple[Any, Any]:
        if "fsdp" in axes:
            variables = _gather_weights(variables, declared, dtype)
        gradient_specs = jax.tree.map(lambda leaf: spec(leaf.dims), declared, is_leaf=is_declared)
        mapped = jax.shard_map(
            on_replica,
            in_specs=(
                PartitionSpec(),
                {name: spec(dims.get(name, "B")) for name in batch},
                PartitionSpec(),
            ),
            out_specs=(gradient_specs, PartitionSpec()),
            axis_names=set(axes),
            check_vma=False,
        )
        return mapped(variables, batch, counts)

    return run


def _gather_weights(variables: Any, declared: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Rounds weights to the dtype that they are multiplied in, and gathers them over fsdp.

    The result has the parameter's dtype again, which a gradient with respect to it then has too.
    Norms and routers compute in float32, and are left to `jax.shard_map`.
    """

    def gather(leaf: Declared, w: jax.Array) -> jax.Array:
        if "D" not in leaf.dims or leaf.kind in ("norm", "router"):
            return w
        return lay_out_whole(w, dtype, leaf.dims).astype(w.dtype)

    params = jax.tree.map(gather, declared, variables["params"], is_leaf=is_declared)
    return variables | {"params": params}


def _add_up(leaf: Declared, gradient: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sums a parameter's gradient over replicas, and scatters it over fsdp if that splits it."""
    width_axes = ("fsdp",) if "fsdp" in axes and "D" in leaf.dims else ()
    run = lambda gradient: (sum_gradient(gradient, leaf.dims.find("D"), width_axes, axes),)
    # Each device adds up its own part. The partitioner would join the parts of the Auto axes before
    # a scatter.
    return per_shard(run, (leaf.dims,), (leaf.dims,), gradient)[0]


def sum_over_replicas(x: jax.Array) -> jax.Array:
    """Sums over replicas, where their axes are Manual, what each has computed of its own rows."""
    return sum_over(x, _ROWS)
