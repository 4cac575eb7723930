"""Runs a group of layers as the stages of a pipeline, over the mesh axis `pipeline`.

The data passes through these functions. A step's M microbatches are dealt out to the P stages:
microbatch m belongs to stage m mod P.

    on_stages                  makes the axis `pipeline` Manual (jax.shard_map): each stage holds
      |                        its layers of the pipelined group, and copies of all other parameters
      | own_rows               takes the rows of this stage's own M/P microbatches
      | embedding, dense layers before the experts: on own rows, as in data parallelism
      | run_layers             sends all microbatches through all stages, tick by tick
      |   belt                 brings a stage's own microbatches to stage 0, and takes them home
      |   ring                 hands the residual stream on to the next stage
      | dense layers after the experts, final norm, unembedding, loss: on own rows
      | on_stages adds up the stages' sums, and the gradients of the copied parameters

The belt moves from each stage to the one before it, one stage a tick. In a group's first round,
stage 0 takes the microbatch that arrives on the belt. In its place it puts a finished one, of the
group before, which the ring brings from the last stage. The belt takes this on to its owner, the
stage that the other one came from. So a stage never holds more than its own microbatches, one on
the ring and one on the belt.

Gradients come from JAX's autodiff of the loop over ticks. Parameters [L, ...] are stored in the
model's order, whatever the schedule. A schedule of several rounds exchanges them once in a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.config import RunConfig, Schedule
from moe.parallel.mesh import per_shard
from moe.parallel.remat import make_stage_policy

AXIS = "pipeline"

# (variables, the numbers of the layers, hidden states [B, T, D], what layers know of the tokens)
# -> (hidden states, sums over the tokens [number of layers, ...])
Layers = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class TickCarry(NamedTuple):
    """Holds what a stage carries from one tick to the next."""

    ring_BTD: Any  # the residual stream of the microbatch that the stage works on next
    belt_BTD: Any  # a microbatch on its way to stage 0, or from there to its owner
    own_MBTD: Any  # the stage's own microbatches: those not sent yet, and the finished ones
    stats: Any  # the sums of this stage's layers, [rounds, layers of a piece, ...]


def choose_schedule(config: RunConfig) -> Schedule | None:
    """Returns the schedule of a step on the mesh that is set, or None if it has no pipeline."""
    stages = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
    if stages == 1:
        return None
    return Schedule(stages, config.train.pipeline_rounds, config.train.accumulation)


def on_stages(
    function: Callable[..., Any], schedule: Schedule, group: str, results: Sequence[Any]
) -> Callable[..., Any]:
    """Makes a function of whole arrays from one that each stage runs on its part of them.

    Arrays below a key `group` of the arguments' trees are stacked over layers [L, ...], and a stage
    gets the layers of its pieces, in order. All other arguments are the same on all stages.
    `results` has a tree for each result. Where this has arrays below `group`, so has the result,
    and they are put together. All other results are added up over the stages.
    """

    def on_layers(change: Callable[..., Any], tree: Any, other: Any = lambda x: x) -> Any:
        """Applies `change` to the arrays that are stacked over layers, and `other` to the rest."""
        key = jax.tree_util.DictKey(group)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: change(x) if key in path else other(x), tree
        )

    cut = functools.partial(_cut, rounds=schedule.rounds, stages=schedule.stages)
    cut_on_stage = functools.partial(_cut, rounds=schedule.rounds, stages=1)
    specs = functools.partial(
        on_layers, lambda _: PartitionSpec(None, AXIS), other=lambda _: PartitionSpec()
    )

    def on_stage(*arguments: Any) -> Any:
        results = function(*on_layers(_join, arguments))
        return on_layers(cut_on_stage, results, other=lambda x: jax.lax.psum(x, AXIS))

    def run(*arguments: Any) -> Any:
        mapped = jax.shard_map(
            on_stage,
            in_specs=specs(arguments),
            out_specs=tuple(PartitionSpec() if tree is None else specs(tree) for tree in results),
            axis_names={AXIS},
            check_vma=False,
        )
        return on_layers(_join, mapped(*on_layers(cut, arguments)))

    return run


def _cut(x: jax.Array, *, rounds: int, stages: int) -> jax.Array:
    """Cuts layers [L, ...] into pieces [rounds, stages, layers of a piece, ...]."""
    return x.reshape(rounds, stages, -1, *x.shape[1:])


def _join(x: jax.Array) -> jax.Array:
    """Puts pieces [rounds, stages, layers of a piece, ...] together again, [L, ...]."""
    return x.reshape(-1, *x.shape[3:])


def own_rows(batch: Any, schedule: Schedule) -> Any:
    """Returns the rows of a batch that are in this stage's own microbatches.

    Microbatch m has the rows m, m + M, and so on. So every device takes rows that it already has.
    """
    stage, sizes = jax.lax.axis_index(AXIS), {"g": schedule.groups, "p": schedule.stages}

    def select(x: jax.Array) -> jax.Array:
        split = einops.rearrange(x, "(b g p) ... -> p b g ...", **sizes)
        own = jax.lax.dynamic_index_in_dim(split, stage, keepdims=False)
        return own.reshape(-1, *x.shape[1:])

    return jax.tree.map(select, batch)


def run_layers(
    layers: Layers, variables: Any, x_BTD: jax.Array, tokens: Any, schedule: Schedule, remat: str
) -> tuple[jax.Array, Any]:
    """Sends all stages' microbatches through all stages.

    `variables` are those of this stage's layers, in the order of rounds. `x_BTD` and `tokens`
    belong to the stage's own microbatches. Returns the hidden states of these, and sums over all
    microbatches [L, ...], which are zero for the layers of other stages.
    """
    stage = jax.lax.axis_index(AXIS)
    split = functools.partial(einops.rearrange, pattern="(b g) ... -> g b ...", g=schedule.groups)
    all_tokens = jax.tree.map(lambda x: _gather(split(x)), tokens)
    work = _make_work(layers, schedule, remat)
    own_MBTD = split(x_BTD)
    zeros_BTD = jnp.zeros_like(own_MBTD[0])
    sums = jax.eval_shape(work, variables, all_tokens, zeros_BTD, jnp.int32(0), stage)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros((schedule.rounds, *x.shape), x.dtype), sums)

    def tick(carry: TickCarry, number: jax.Array) -> tuple[TickCarry, None]:
        carry = _exchange(_reload(carry, number, schedule), number, stage, schedule)
        x_BTD, sums = work(variables, all_tokens, carry.ring_BTD, number, stage)
        turn = schedule.turn(number, stage)
        stats = jax.tree.map(
            lambda total, x: total.at[turn.round].add(jnp.where(turn.is_busy, x, 0)),
            carry.stats,
            sums,
        )
        return _move(carry._replace(ring_BTD=x_BTD, stats=stats), schedule), None

    numbers = jnp.arange(schedule.ticks, dtype=jnp.int32)
    carry, _ = jax.lax.scan(tick, TickCarry(zeros_BTD, zeros_BTD, own_MBTD, zeros), numbers)
    # The last microbatch is finished, but still has to go home.
    carry = _move(_exchange(carry, jnp.int32(schedule.ticks), stage, schedule), schedule)
    own_MBTD = carry.own_MBTD.at[schedule.groups - 1].set(carry.belt_BTD)
    stats = jax.tree.map(lambda x: _place_pieces(x, stage, schedule), carry.stats)
    return einops.rearrange(own_MBTD, "g b ... -> (b g) ..."), stats


def _make_work(layers: Layers, schedule: Schedule, remat: str) -> Callable[..., Any]:
    """Makes the function that applies a stage's piece of layers to a microbatch."""

    def work(
        variables: Any, tokens: Any, x_BTD: jax.Array, number: jax.Array, stage: jax.Array
    ) -> tuple[jax.Array, Any]:
        turn = schedule.turn(number, stage)
        size = jax.tree.leaves(variables)[0].shape[0] // schedule.rounds
        first = turn.round * size
        piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), variables)
        for index in (turn.member, turn.group % schedule.groups):
            tokens = jax.tree.map(
                functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False), tokens
            )
        layer_numbers = (turn.round * schedule.stages + stage) * size + jnp.arange(size)
        return layers(piece, layer_numbers.astype(jnp.int32), x_BTD, tokens)

    return jax.checkpoint(work, policy=make_stage_policy(remat), prevent_cse=False)


def _reload(carry: TickCarry, number: jax.Array, schedule: Schedule) -> TickCarry:
    """Puts an own microbatch on the belt when a group begins, and takes a finished one off it."""
    group, tick_of_group = divmod(number, schedule.rounds * schedule.stages)
    loads = (tick_of_group == 0) & (group < schedule.groups)
    # The finished microbatches of a group are on their way back in the first round of the next one.
    stores, finished = (tick_of_group == 0) & (group >= 2), jnp.maximum(group - 2, 0)
    own_MBTD, belt_BTD = carry.own_MBTD, carry.belt_BTD
    read = lambda index: jax.lax.dynamic_index_in_dim(own_MBTD, index, keepdims=False)
    new_BTD = jnp.where(loads, read(jnp.minimum(group, schedule.groups - 1)), belt_BTD)
    stored_BTD = jnp.where(stores, belt_BTD, read(finished))
    own_MBTD = jax.lax.dynamic_update_index_in_dim(own_MBTD, stored_BTD, finished, axis=0)
    return carry._replace(belt_BTD=new_BTD, own_MBTD=own_MBTD)


def _exchange(
    carry: TickCarry, number: jax.Array, stage: jax.Array, schedule: Schedule
) -> TickCarry:
    """Lets stage 0 put a finished microbatch on the belt, in place of one that it takes.

    It does so in the first round of each group.
    """
    takes = (stage == 0) & (number % (schedule.rounds * schedule.stages) < schedule.stages)
    ring_BTD, belt_BTD = carry.ring_BTD, carry.belt_BTD
    return carry._replace(
        ring_BTD=jnp.where(takes, belt_BTD, ring_BTD), belt_BTD=jnp.where(takes, ring_BTD, belt_BTD)
    )


def _move(carry: TickCarry, schedule: Schedule) -> TickCarry:
    """Moves the ring one stage on, and the belt one stage back."""
    send = lambda x, by: jax.lax.ppermute(
        x, AXIS, [(stage, (stage + by) % schedule.stages) for stage in range(schedule.stages)]
    )
    return carry._replace(ring_BTD=send(carry.ring_BTD, 1), belt_BTD=send(carry.belt_BTD, -1))


def _gather(x: jax.Array) -> jax.Array:
    """Returns an array [M, B, ...] of all stages, stacked in a new first dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # keys themselves cannot be gathered
        data = jax.lax.all_gather(jax.random.key_data(x), AXIS)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Each device gathers its own rows. The partitioner would gather those of all devices as well.
    dims = "MBT---"[: x.ndim]
    gather = lambda x: (jax.lax.all_gather(x, AXIS),)
    return per_shard(gather, (dims,), (f"-{dims}",), x)[0]


def _place_pieces(x: jax.Array, stage: jax.Array, schedule: Schedule) -> jax.Array:
    """Places a stage's sums [rounds, layers of a piece, ...] among those of all layers [L, ...]."""
    whole = jnp.zeros((schedule.rounds, schedule.stages, *x.shape[1:]), x.dtype)
    return whole.at[:, stage].set(x).reshape(-1, *x.shape[2:])
