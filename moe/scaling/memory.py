"""Counts the bytes of a run's training state on each device, from its config and mesh alone.

Activations are not counted. The parameters are listed here as the model declares them, and split as
`moe.config.layout.RULES` say; a test compares both with the real state.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe.config import MeshConfig, ModelConfig, RunConfig, split_axes

WORD = 4  # bytes of a float32, an int32 and a uint32: nothing else is in a training state
# Two words of the optimizer count its updates: one for Adam and one for the schedule.
OPTIMIZER_WORDS = 2
# The step, the two words of the examples consumed, and two counts of skipped updates.
PROGRESS_WORDS = 5
_UNEVEN = "BTKL"  # dimensions that stay whole where their size cannot be split


class Array(NamedTuple):
    """Names the dimensions of an array by the letters of the legend, with their sizes."""

    dims: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Says how many bytes of each part of a training state one device holds."""

    parameters: int
    optimizer: int
    router_state: int
    progress: int  # the step, the examples consumed and the counts of skipped updates
    gradients: int  # they exist while a step runs

    @property
    def total(self) -> int:
        """Returns the bytes of all parts together."""
        return sum(dataclasses.astuple(self))


def state_bytes(config: RunConfig, mesh: MeshConfig) -> StateBytes:
    """Returns the bytes of a run's training state on each device of a resolved mesh.

    All devices hold equally many. AdamW has two moments for each parameter.
    """
    sizes = dataclasses.asdict(mesh)
    arrays = list(_parameters(config.model))
    stacks = 1
    if config.task == "span_corruption":  # the encoder's stack, and what the decoder reads it with
        arrays += [*_stack(config.model), *_cross_attention(config.model)]
        stacks = 2
    elements = sum(_elements_on_a_device(array, sizes) for array in arrays)
    return StateBytes(
        parameters=WORD * elements,
        optimizer=WORD * (2 * elements + OPTIMIZER_WORDS),
        router_state=WORD * stacks * _router_biases(config.model),
        progress=WORD * PROGRESS_WORDS,
        gradients=WORD * elements,
    )


def _elements_on_a_device(array: Array, sizes: dict[str, int]) -> int:
    """Returns how many elements of an array a device holds: as many as each other one."""
    elements = math.prod(array.shape)
    for dim, size, axes in zip(*array, split_axes(array.dims, sizes), strict=True):
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts == 0 or dim not in _UNEVEN:
            elements //= parts
    return elements


def _parameters(config: ModelConfig) -> Iterator[Array]:
    """Yields the parameters of a decoder, and so of an encoder that makes logits."""
    d, v = config.model_dim, config.vocab_size
    yield Array("VD", (v, d))
    if not config.tied_embeddings:
        yield Array("DV", (d, v))
    yield from _stack(config)


def _stack(config: ModelConfig) -> Iterator[Array]:
    """Yields the parameters of a stack. The layers of a group are stacked."""
    d = config.model_dim
    yield Array("D", (d,))  # the final norm
    feed_forward = {
        "dense": list(_feed_forward(d, config.feed_forward_dim)),
        "moe": list(_sparse(config)),
    }
    for kinds, repeats in config.layer_groups:
        for kind in kinds:
            for dims, shape in (*_attention(config), *feed_forward[kind]):
                yield Array(f"L{dims}", (repeats, *shape))


def _attention(config: ModelConfig) -> Iterator[Array]:
    """Yields the weights of a layer's attention, and the scales of the layer's two norms."""
    yield from _mixing(config)
    yield Array("D", (config.model_dim,))
    yield Array("D", (config.model_dim,))


def _cross_attention(config: ModelConfig) -> Iterator[Array]:
    """Yields the weights of all layers' cross-attention, and the scales of its norms."""
    for dims, shape in (*_mixing(config), Array("D", (config.model_dim,))):
        yield Array(f"L{dims}", (config.num_layers, *shape))


def _mixing(config: ModelConfig) -> Iterator[Array]:
    """Yields the four weights of an attention part."""
    d, h = config.model_dim, config.head_dim
    yield Array("DNH", (d, config.num_heads, h))
    yield Array("DKH", (d, config.num_kv_heads, h))
    yield Array("DKH", (d, config.num_kv_heads, h))
    yield Array("NHD", (config.num_heads, h, d))


def _feed_forward(d: int, f: int) -> Iterator[Array]:
    """Yields the weights of a dense feed-forward part, or of shared experts."""
    yield Array("DF", (d, f))
    yield Array("DF", (d, f))
    yield Array("FD", (f, d))


def _sparse(config: ModelConfig) -> Iterator[Array]:
    """Yields the weights of a layer's router and experts."""
    moe, d = config.moe, config.model_dim
    e, f = moe.num_experts, moe.expert_dim
    if moe.router != "hash":
        yield Array("DE", (d, e))
    yield Array("EDF", (e, d, f))
    yield Array("EDF", (e, d, f))
    yield Array("EFD", (e, f, d))
    if moe.num_shared_experts:
        yield from _feed_forward(d, moe.num_shared_experts * f)


def _router_biases(config: ModelConfig) -> int:
    """Returns the number of the routers' biases. Each device holds all of them."""
    if not config.moe.bias_update_rate:
        return 0
    return len(config.sparse_layers) * config.moe.num_experts
