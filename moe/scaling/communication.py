"""Counts the least that the devices of a mesh must send each other in a training step.

For each microbatch that is: weights that fsdp splits are gathered in the compute dtype twice, in
the forward and in the backward pass (recomputation shares the gather of the backward pass), and
their gradients are scattered once, in float32. What `data` and `context` copy is added up once a
step. Rows of experts are exchanged four times, and tensor parallelism adds up the outputs of
attention and feed-forward parts, and the gradients of their inputs. Full remat repeats one of the
exchanges and two of the gathers that such sums end with. docs/planning.md explains the figures.

Sums of single numbers, of losses and of router statistics are left out, and so are the tokens'
order in a ring and the ids that experts are told: they are small.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

from moe.config import MeshConfig, RunConfig
from moe.config.layout import count_batch_parts
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
    microbatches = config.train.accumulation
    for array in parameters(config):
        axes = array.axes("D", sizes)
        if not axes:
            continue
        of_vocabulary = array.name in ("embedding", "unembedding")
        gathers_once = of_vocabulary and not config.model.tied_embeddings
        gathers = VOCABULARY_GATHERS if gathers_once else MATMUL_GATHERS
        gathers *= microbatches * array.repeats
        scatters = microbatches * array.repeats
        whole = array.elements(sizes, whole=axes)
        gathered = _sent(_gather_dtype(array, config) * whole, axes, sizes)
        summed = _sent(FLOAT32 * whole, axes, sizes)
        yield Collective("all-gather", axes, f"{array.name}: weights", gathers * gathered, gathers)
        yield Collective(
            "reduce-scatter", axes, f"{array.name}: gradients", scatters * summed, scatters
        )


def _replicas(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields the sums of gradients over axes that hold copies of a parameter, once a step."""
    axes = tuple(axis for axis in ("data", "context") if sizes[axis] > 1)
    for array in parameters(config) if axes else ():
        size = FLOAT32 * array.repeats * array.elements(sizes)
        sent = 2 * _sent(size, axes, sizes)
        yield Collective("all-reduce", axes, f"{array.name}: gradients", sent, array.repeats)


def _exchange(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields what brings tokens to their experts and back."""
    moe, axes = config.model.moe, ("expert",)
    layers = config.train.accumulation * len(config.model.sparse_layers)
    if not layers or sizes["expert"] == 1:
        return
    row = ITEM[config.model.compute_dtype] * config.model.model_dim
    tokens = local_tokens(config, sizes)
    repeated = config.model.remat == "full"
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
    al. 2022, section 4.2.2). Full remat gathers the inputs of both parts again. Where the tensor
    axis cannot split the tokens, the sums are whole, and full remat repeats that of attention.
    """
    axes = ("tensor",)
    if sizes["tensor"] == 1:
        return
    stream = ITEM[config.model.compute_dtype] * local_tokens(config, sizes) * config.model.model_dim
    sent, layers = _sent(stream, axes, sizes), config.model.num_layers
    is_full, steps = config.model.remat == "full", config.train.accumulation
    # Beside the layers, there are the rows of embeddings and the last hidden states.
    if stream_parts(config, sizes) == 1:
        sums = steps * ((5 if is_full else 4) * layers + 2)
        yield Collective("all-reduce", axes, "activations", 2 * sums * sent, sums)
        return
    scatters, gathers = steps * (4 * layers + 2), steps * ((6 if is_full else 4) * layers + 2)
    yield Collective("reduce-scatter", axes, "activations", scatters * sent, scatters)
    yield Collective("all-gather", axes, "activations", gathers * sent, gathers)


def _context(config: RunConfig, sizes: Mapping[str, int]) -> Iterator[Collective]:
    """Yields what attention sends over the context axis.

    In a ring (Liu et al. 2023) keys and values visit all other devices, in the backward pass once
    more beside their float32 gradients. Ulysses (Jacobs et al. 2023, section 3) exchanges queries,
    keys, values and outputs, and in the backward pass their gradients.
    """
    model, axes = config.model, ("context",)
    if sizes["context"] == 1:
        return
    layers, tokens = config.train.accumulation * model.num_layers, local_tokens(config, sizes)
    item, tensor = ITEM[model.compute_dtype], sizes["tensor"]
    forwards = 2 if model.remat == "full" else 1
    keys = 2 * tokens * max(1, model.num_kv_heads // tensor) * model.head_dim
    if model.attention.context_parallelism == "ring":
        hops = (sizes["context"] - 1) * layers
        sent = hops * keys * ((forwards + 1) * item + FLOAT32)
        yield Collective("collective-permute", axes, "keys, values", sent, (forwards + 2) * hops)
        return
    queries = 2 * tokens * (model.num_heads // tensor) * model.head_dim
    exchanges = (forwards + 1) * layers
    sent = exchanges * _sent(item * (queries + keys), axes, sizes)
    yield Collective("all-to-all", axes, "attention heads", sent, 4 * exchanges)
