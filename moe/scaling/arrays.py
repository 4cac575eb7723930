"""Lists the parameters of a run's model, and says how a mesh splits them, from the config alone.

The arrays are listed here as the model declares them, and split as `moe.config.layout.RULES` say. A
test compares both with the real state.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moe.config import ModelConfig, RunConfig, split_axes

_UNEVEN = "BTK"  # dimensions that stay whole where their size cannot be split


class Array(NamedTuple):
    """Names one parameter, and its dimensions by the letters of the legend with their sizes."""

    name: str
    dims: str
    shape: tuple[int, ...]
    repeats: int = 1  # the number of layers that have it
    is_pipelined: bool = False  # whether its layers are the stages of a pipeline

    def layers(self, sizes: Mapping[str, int]) -> int:
        """Returns how many of the layers that have it are on one device."""
        return self.repeats // sizes["pipeline"] if self.is_pipelined else self.repeats

    def elements(self, sizes: Mapping[str, int], whole: tuple[str, ...] = ()) -> int:
        """Returns how many elements of one layer's array a device holds: as many as each other one.

        The axes in `whole` count as if they split nothing, as after a gather over them.
        """
        elements = math.prod(self.shape)
        splits = split_axes(self.dims, sizes)
        for dim, size, axes in zip(self.dims, self.shape, splits, strict=True):
            parts = math.prod(sizes[axis] for axis in axes)
            if size % parts == 0 or dim not in _UNEVEN:
                elements //= math.prod(sizes[axis] for axis in axes if axis not in whole)
        return elements

    def axes(self, dim: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the axes with several devices that split a dimension of the array."""
        splits = dict(zip(self.dims, split_axes(self.dims, sizes), strict=True))
        return tuple(axis for axis in splits.get(dim, ()) if sizes[axis] > 1)


def parameters(config: RunConfig) -> tuple[Array, ...]:
    """Returns the parameters of the model that a run trains, which its task chooses."""
    return _parameters(config.model, config.task == "span_corruption")


@functools.cache  # a search through layouts asks for them a thousand times
def _parameters(model: ModelConfig, has_encoder: bool) -> tuple[Array, ...]:
    """Returns the parameters of a model, or of the decoder and encoder of its kind."""
    d, v = model.model_dim, model.vocab_size
    arrays = [Array("embedding", "VD", (v, d))]
    if not model.tied_embeddings:
        arrays.append(Array("unembedding", "DV", (d, v)))
    arrays += _stack(model)
    if has_encoder:  # its stack, and what the decoder reads it with
        cross = [*_mixing(model), ("D", (d,))]
        arrays += [*_stack(model), *_repeat(model.num_layers, "cross-attention", cross)]
    return tuple(arrays)


def _stack(config: ModelConfig) -> Iterator[Array]:
    """Yields the parameters of a stack."""
    d, width = config.model_dim, config.feed_forward_dim
    yield Array("norms", "D", (d,))  # the final norm
    for number, (kinds, repeats) in enumerate(config.layer_groups):
        arrays = [
            *_repeat(len(kinds) * repeats, "attention", list(_mixing(config))),
            *_repeat(len(kinds) * repeats, "norms", [("D", (d,)), ("D", (d,))]),
        ]
        num_dense, num_sparse = (repeats * kinds.count(kind) for kind in ("dense", "moe"))
        arrays += _repeat(num_dense, "feed-forward", list(_feed_forward(d, width)))
        arrays += _sparse(config, num_sparse) if num_sparse else []
        is_pipelined = number == config.pipelined_group
        yield from (array._replace(is_pipelined=is_pipelined) for array in arrays)


def _repeat(repeats: int, name: str, arrays: list[tuple[str, tuple[int, ...]]]) -> Iterator[Array]:
    """Yields arrays that several layers have."""
    yield from (Array(name, dims, shape, repeats) for dims, shape in arrays if repeats)


def _mixing(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the four weights of an attention part, and its norms."""
    d, h = config.model_dim, config.head_dim
    yield "DNH", (d, config.num_heads, h)
    yield "DKH", (d, config.num_kv_heads, h)
    yield "DKH", (d, config.num_kv_heads, h)
    yield "NHD", (config.num_heads, h, d)
    if config.qk_norm:
        yield "H", (h,)
        yield "H", (h,)


def _feed_forward(d: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the weights of a dense feed-forward part, or of shared experts."""
    yield "DF", (d, f)
    yield "DF", (d, f)
    yield "FD", (f, d)


def _sparse(config: ModelConfig, layers: int) -> Iterator[Array]:
    """Yields the weights of the layers' routers and experts."""
    moe, d = config.moe, config.model_dim
    e, f = moe.num_experts, moe.expert_dim
    if moe.router != "hash":
        yield Array("router", "DE", (d, e), layers)
    experts = [("EDF", (e, d, f)), ("EDF", (e, d, f)), ("EFD", (e, f, d))]
    yield from _repeat(layers, "experts", experts)
    if moe.num_shared_experts:
        shared = _feed_forward(d, moe.num_shared_experts * f)
        yield from _repeat(layers, "shared experts", list(shared))
