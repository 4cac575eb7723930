"""Sums gradients and statistics over replicas once a step.

The devices of some mesh axes hold copies of the parameters: those of `data`, of `context`, and with
`train.gather_once` those of `fsdp` and `expert` for the time of a step. The partitioner adds up the
gradients of copies for each layer and microbatch. Here these axes are Manual (jax.shard_map), so a
device adds up its own microbatches first, and what it sends does not grow with their number:

    parameters -> (gathered) -> each device's microbatches, one after the other
                                   |  gradients are added up on the device
    gradients  <- (scattered) <- summed over the replicas

Devices along `expert` have no copies of experts' weights, but each its own experts, to which the
others send rows as ever. The sum over `expert` leaves these weights out.

In a pipeline each stage does this for its own layers, with its own microbatches, after its ticks.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from moe.config import AXES, RULES, RunConfig, split_axes
from moe.config.layout import gathers_once
from moe.parallel.collectives.weights import lay_out_whole, sum_gradient, sum_over
from moe.parallel.mesh import per_shard
from moe.parameters import Declared, is_declared

_on_declared = functools.partial(jax.tree.map, is_leaf=is_declared)
_ROWS = ("data", "fsdp", "expert")  # the axes that may be Manual here and split rows


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
        axes += ["fsdp", "expert"]
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
        gradient = _on_declared(functools.partial(_add_up, axes), declared, gradient)
        return gradient, jax.tree.map(lambda x: jax.lax.psum(x, axes), sums)

    whole, spec = PartitionSpec(), lambda dims: PartitionSpec(*split_axes(dims, axes))
    weight_specs = _on_declared(functools.partial(_split_experts, axes), declared)

    def run(variables: Any, batch: Mapping[str, jax.Array], counts: Any) -> tuple[Any, Any]:
        if not set(axes).isdisjoint(RULES["D"]):
            variables = _gather_weights(variables, declared, dtype)
        mapped = jax.shard_map(
            on_replica,
            in_specs=(
                dict.fromkeys(variables, whole) | {"params": weight_specs},
                {name: spec(dims.get(name, "B")) for name in batch},
                whole,
            ),
            out_specs=(_on_declared(lambda leaf: spec(leaf.dims), declared), whole),
            axis_names=set(axes),
            check_vma=False,
        )
        return mapped(variables, batch, counts)

    return run


def _gather_weights(variables: Any, declared: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Rounds weights to the dtype that they are multiplied in, and gathers their width D.

    The result has the parameter's dtype again, which a gradient with respect to it then has too.
    Norms and routers compute in float32, and are left to `jax.shard_map`.
    """

    def gather(leaf: Declared, w: jax.Array) -> jax.Array:
        if "D" not in leaf.dims or leaf.kind in ("norm", "router"):
            return w
        return lay_out_whole(w, dtype, leaf.dims).astype(w.dtype)

    return variables | {"params": _on_declared(gather, declared, variables["params"])}


def _split_experts(axes: tuple[str, ...], leaf: Declared) -> PartitionSpec:
    """Returns the spec of a gathered weight: only its experts are still split, if it has some."""
    entries = zip(leaf.dims, split_axes(leaf.dims, axes), strict=True)
    return PartitionSpec(*(split if dim == "E" else () for dim, split in entries))


def _add_up(axes: tuple[str, ...], leaf: Declared, gradient: jax.Array) -> jax.Array:
    """Sums a parameter's gradient over replicas, and scatters its width over what splits it."""
    split = dict(zip(leaf.dims, split_axes(leaf.dims, axes), strict=True))
    width, width_axes, expert_axes = leaf.dims.find("D"), split.get("D", ()), split.get("E", ())
    copied = tuple(axis for axis in axes if axis not in expert_axes)
    run = lambda gradient: (sum_gradient(gradient, width, width_axes, copied),)
    # Each device adds up its own part. The partitioner would join the parts of the Auto axes before
    # a scatter.
    dims = leaf.dims.replace("E", "e") if expert_axes else leaf.dims
    return per_shard(run, (dims,), (dims,), gradient)[0]


def sum_over_replicas(x: jax.Array) -> jax.Array:
    """Sums over replicas, where their axes are Manual, what each has computed of its own rows."""
    return sum_over(x, _ROWS)
