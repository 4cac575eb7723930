"""Counts the least that the devices of a mesh must send each other in a training step.

For each microbatch that is: weights that fsdp splits are gathered in the compute dtype twice, in
the forward and in the backward pass (recomputation shares the gather of the backward pass), and
their gradients are scattered once, in float32. With `train.gather_once` both happen once a step.
What `data` and `context` copy is added up once a step. Rows of experts are exchanged four times,
and tensor parallelism adds up the outputs of attention and feed-forward parts, and the gradients of
their inputs. Remat repeats one of the exchanges, unless it saves them, and two of the gathers that
such sums end with. docs/planning/counted.md explains the figures.

In a pipeline these happen at every tick, also while a stage waits: stages go through the same
program, and then nobody uses what comes out. Between ticks the ring and the belt send the residual
stream, and its gradient in the backward pass (docs/pipeline.md).

Some collectives are small and left out: sums of single numbers, of losses and of router statistics,
the zig-zag of a ring, and the experts' numbers that go with rows.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from moe.config import MeshConfig, RunConfig, Schedule
from moe.config.layout import count_batch_parts, gathers_once
from moe.scaling.arrays import Array, parameters

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
ITEM = {"float32": 4, "bfloat16": 2}  # bytes of a number
FLOAT32 = 4
# How often a weight is gathered for each microbatch. The table of embeddings and the unembedding
# serve one pass each: the loss takes its gradient in the forward pass. A tied table serves both.
VOCABULARY_GATHERS, MATMUL_GATHERS = 1, 2


@dataclasses.dataclass(frozen=True)
class Collective:
    """Says how much each device sends for one purpose in a step, and over which axes of the mesh.

    What a device keeps for itself is not sent. Over P devices, a gather or a scatter of R bytes in
    all sends (P - 1) / P of R from each device, and an all-reduce twice as much.
    """

    kind: Kind
    axes: tuple[str, ...]  # the axes of the mesh whose devices exchange with each other
    what: str  # what is sent, as a table names it
    bytes: float  # that one device sends in all executions of a step
    count: float  # how often it is executed in a step


def least_collectives(config: RunConfig, mesh: MeshConfig) -> tuple[Collective, ...]:
    """Returns what the devices of a resolved mesh must send in a step, the most bytes first.

    Expert rows are counted for an even load. Rows of `span_corruption` are counted as those of its
    encoder alone.
    """
    sizes = dataclasses.asdict(mesh)
    found: dict[tuple[Kind, tuple[str, ...], str], list[float]] = {}
    for collective in (
        *_weights(config, sizes),
        *_replicas(config, sizes),
        *_exchange(config, sizes),
        *_tensor(config, sizes),
        *_context(config, sizes),
        *_pipeline(config, sizes),
    ):
        key = (collective.kind, collective.axes, collective.what)
        total = found.setdefault(key, [0.0, 0.0])
        total[0] += collective.bytes
        total[1] += collective.count
    merged = (Collective(*key, *total) for key, total in found.items() if total[0])
    return tuple(sorted(merged, key=lambda collective: -collective.bytes))


def local_tokens(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Returns the tokens of a microbatch that one device computes."""
    rows = config.train.batch_size // config.train.accumulation // count_batch_parts(sizes)
    return rows * config.data.sequence_length // sizes["context"]


def stream_parts(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Returns into how many parts the tensor axis splits a device's tokens of the stream."""
    tensor = sizes["tensor"]
    return 1 if config.data.sequence_length % (sizes["context"] * tensor) else tensor


class Passes(NamedTuple):
    """Says how often a device applies some of its layers in a step, and to how many tokens."""

    count: float  # in the forward passes; as often in the backward passes
    stored: float  # the passes whose results are stored at once for their backward passes
    tokens: int  # that one pass computes
    layers: int  # that one pass applies
    sparse_layers: int  # those of them that have experts


def layer_passes(config: RunConfig, sizes: Mapping[str, int]) -> list[Passes]:
    """Returns the passes of the pipelined layers, and of all others if there are others.

    Without a pipeline all layers count as one stage, which a microbatch at a time goes through.
    """
    model, stages = config.model, sizes["pipeline"]
    schedule = pipeline_schedule(config, sizes)
    tokens, num_sparse = local_tokens(config, sizes), len(model.sparse_layers)
    if schedule is None:
        return [Passes(config.train.accumulation, 1, tokens, model.num_layers, num_sparse)]
    kinds, repeats = model.layer_groups[model.pipelined_group]
    staged = len(kinds) * repeats
    # A tick applies one of a stage's `rounds` pieces, so so many ticks are one pass of the stage.
    # The backward pass begins after the last tick.
    passes = schedule.ticks / schedule.rounds
    # Without remat a tick's arrays are there once more, until they are among those of all ticks.
    stored = passes + (1 / schedule.rounds if model.remat == "none" else 0)
    found = [Passes(passes, stored, tokens, staged // stages, num_sparse // stages)]
    if model.num_layers > staged:
        found.append(own_passes(config, sizes)._replace(layers=model.num_layers - staged))
    return found


def own_passes(config: RunConfig, sizes: Mapping[str, int]) -> Passes:
    """Returns the passes of what is no part of a pipeline's stages: embedding, loss, some layers.

    Each stage applies it once, to all of its own microbatches together.
    """
    schedule, tokens = pipeline_schedule(config, sizes), local_tokens(config, sizes)
    if schedule is None:
        return Passes(config.train.accumulation, 1, tokens, 0, 0)
    return Passes(1, 1, schedule.groups * tokens, 0, 0)


def pipeline_schedule(config: RunConfig, sizes: Mapping[str, int]) -> Schedule | None:
    """Returns the schedule of a pipeline on a mesh of such axes, or None without a pipeline."""
    if sizes["pipeline"] == 1:
        return None
    return Schedule(sizes["pipeline"], config.train.pipeline_rounds, config.train.accumulation)


def _devices(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _sent(size: float, axes: tuple[str, ...], sizes: Mapping[str, int]) -> float:
    """Returns what a device sends of a whole of so many bytes in a gather or a scatter."""
    return size * (1 - 1 / _devices(axes, sizes))


def _gather_dtype(array: Array, config: RunConfig) -> int:
    """Returns the bytes of a number of a gathered weight. Norms and routers stay float32."""
    small = array.name in ("norms", "router")
    return FLOAT32 if small else ITEM[config.model.compute_dtype]


def _weights(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields the gathers of weights that fsdp splits, and the scatters of their gradients."""
    staged, own = layer_passes(config, sizes)[0], own_passes(config, sizes)
    for array in parameters(config):
        axes = array.axes("D", sizes)
        if not axes:
            continue
        is_vocabulary = array.name in ("embedding", "unembedding")
        serves_once = is_vocabulary and not config.model.tied_embeddings
        passes = staged if array.is_pipelined else own
        scatters = passes.count * array.layers(sizes)
        gathers = (VOCABULARY_GATHERS if serves_once else MATMUL_GATHERS) * scatters
        if gathers_once(config, sizes):
            gathers = scatters = array.layers(sizes)
        whole = array.elements(sizes, whole=axes)
        gathered = _sent(_gather_dtype(array, config) * whole, axes, sizes)
        summed = _sent(FLOAT32 * whole, axes, sizes)
        yield Collective("all-gather", axes, f"{array.name}: weights", gathers * gathered, gathers)
        yield Collective(
            "reduce-scatter", axes, f"{array.name}: gradients", scatters * summed, scatters
        )


def _replicas(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields the sums of gradients over axes that hold copies of a parameter, once a step."""
    for array in parameters(config):
        copied = ("data", "context") if array.is_pipelined else ("data", "pipeline", "context")
        axes = tuple(axis for axis in copied if sizes[axis] > 1)
        if not axes:
            continue
        layers = array.layers(sizes)
        sent = 2 * _sent(FLOAT32 * layers * array.elements(sizes), axes, sizes)
        yield Collective("all-reduce", axes, f"{array.name}: gradients", sent, layers)


def _exchange(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields what brings tokens to their experts and back."""
    moe, axes = config.model.moe, ("expert",)
    passes = layer_passes(config, sizes)[0]  # all sparse layers are in the stages of a pipeline
    layers, tokens = passes.count * passes.sparse_layers, passes.tokens
    if not layers or sizes["expert"] == 1:
        return
    row = ITEM[config.model.compute_dtype] * config.model.model_dim
    repeated = config.model.remat not in ("none", "save_exchange")
    if moe.exchange == "all_gather":
        # Every device sees the tokens of all, and the parts of their sums are scattered back. The
        # gradient of a gather is a scatter, and that of a scatter is a gather.
        sent = _sent(row * tokens * sizes["expert"], axes, sizes)
        gathers, scatters = (2 + repeated) * layers, 2 * layers
        yield Collective("all-gather", axes, "expert rows", gathers * sent, gathers)
        yield Collective("reduce-scatter", axes, "expert rows", scatters * sent, scatters)
        return
    exchanges = (4 + repeated) * layers
    sent = _sent(row * tokens * moe.experts_per_token, axes, sizes)
    yield Collective("all-to-all", axes, "expert rows", exchanges * sent, exchanges)


def _tensor(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields the sums over the tensor axis of activations (Shoeybi et al. 2019, section 3).

    A layer adds up the outputs of its two parts, and in the backward pass the gradients of their
    inputs. Each sum is a scatter, and a gather where all tokens are needed again (Korthikanti et
    al. 2022, section 4.2.2). Remat gathers the inputs of both parts again. Where the tensor axis
    cannot split the tokens, the sums are whole, and remat repeats that of attention.
    """
    axes = ("tensor",)
    if sizes["tensor"] == 1:
        return
    number = ITEM[config.model.compute_dtype] * config.model.model_dim
    recomputes = config.model.remat != "none"
    # How often a layer uses each kind, and how many times the bytes of a scatter that one sends.
    kinds: dict[Kind, tuple[int, int]] = {"all-reduce": (5 if recomputes else 4, 2)}
    if stream_parts(config, sizes) > 1:
        kinds = {"reduce-scatter": (4, 1), "all-gather": (6 if recomputes else 4, 1)}
    for kind, (in_layer, factor) in kinds.items():
        uses = [(passes, in_layer * passes.layers) for passes in layer_passes(config, sizes)]
        # The rows of embeddings and the last hidden states are sums as well.
        for passes, times in (*uses, (own_passes(config, sizes), 2)):
            count = passes.count * times
            sent = factor * _sent(number * passes.tokens, axes, sizes)
            yield Collective(kind, axes, "activations", count * sent, count)


def _context(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields what attention sends over the context axis.

    In a ring (Liu et al. 2023) keys and values visit all other devices, in the backward pass once
    more beside their float32 gradients. Ulysses (Jacobs et al. 2023, section 3) exchanges queries,
    keys, values and outputs, and in the backward pass their gradients. Remat repeats the forward
    pass, unless it saves the outputs. Then Ulysses still repeats what comes before these.
    """
    if sizes["context"] > 1:
        for passes in layer_passes(config, sizes):
            yield _context_of_layers(config, sizes, passes)


def _context_of_layers(config: RunConfig, sizes: Mapping[str, int], passes: Passes) -> Collective:
    """Returns what the attention of some layers sends over the context axis."""
    model, axes = config.model, ("context",)
    layers, tokens = passes.count * passes.layers, passes.tokens
    item, tensor = ITEM[model.compute_dtype], sizes["tensor"]
    forwards = 1 if model.remat in ("none", "save_attention") else 2
    keys = 2 * tokens * max(1, model.num_kv_heads // tensor) * model.head_dim
    if model.attention.context_parallelism == "ring":
        hops = (sizes["context"] - 1) * layers
        sent = hops * keys * ((forwards + 1) * item + FLOAT32)
        return Collective("collective-permute", axes, "keys, values", sent, (forwards + 2) * hops)
    queries = 2 * tokens * (model.num_heads // tensor) * model.head_dim
    exchanges = (forwards + 1) * layers
    sent, count = exchanges * _sent(item * (queries + keys), axes, sizes), 4 * exchanges
    if model.remat == "save_attention":  # queries, keys and values again
        sent += layers * _sent(item * (queries / 2 + keys), axes, sizes)
        count += 3 * layers
    return Collective("all-to-all", axes, "attention heads", sent, count)


def _pipeline(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields what the stages of a pipeline send each other.

    The ring and the belt move after every tick, and once more to bring the last microbatch home.
    The circular schedule exchanges the weights and their gradients once, as a stage's pieces are
    not those that are stored on its devices.
    """
    schedule, axes = pipeline_schedule(config, sizes), ("pipeline",)
    if schedule is None:
        return
    item = ITEM[config.model.compute_dtype]
    moves = 2 * 2 * (schedule.ticks + 1)  # ring and belt, forward and backward
    stream = item * local_tokens(config, sizes) * config.model.model_dim
    yield Collective("collective-permute", axes, "ring and belt", moves * stream, moves)
    for array in parameters(config) if schedule.rounds > 1 else ():
        if array.is_pipelined:
            held = array.layers(sizes) * array.elements(sizes)
            sent = _sent((item + FLOAT32) * held, axes, sizes)
            yield Collective("all-to-all", axes, f"{array.name}: weights, gradients", sent, 2)
