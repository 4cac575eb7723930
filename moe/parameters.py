"""Declares parameters: the one place that says what a leaf of the parameter tree is.

A declaration states shape, dimensions (letters of the legend in docs/design.md), kind and fan-in.
Sharding, weight decay and the summary table read these, so that none of them guesses from names.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

# "linear" multiplies activations; so does "router", whose outputs score experts; "embedding" is
# looked up by token; "unembedding" makes logits; "norm" scales a normalised vector.
Kind = Literal["linear", "router", "embedding", "unembedding", "norm"]


class Declared(struct.PyTreeNode, meta.AxisMetadata):
    """Holds a parameter together with its declaration.

    This is a box, as Flax calls a leaf that wraps an array. Flax unboxes it before a module sees
    the array.
    """

    value: Any
    dims: str = struct.field(pytree_node=False)
    kind: Kind = struct.field(pytree_node=False)
    fan_in: int = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        return self.replace(dims=self.dims[:index] + params["dim"] + self.dims[index:])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        return self.replace(dims=self.dims[:index] + self.dims[index + 1 :])

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Declared":
        """Rebuilds a box from `metadata`, where Flax's bridge to NNX has put the box's fields."""
        return cls(**{name: metadata[name] for name in ("value", "dims", "kind", "fan_in")})


def parameter(
    module: nn.Module,
    name: str,
    dims: str,
    shape: tuple[int, ...],
    *,
    kind: Kind,
    fan_in: int,
    scale: float = 1.0,
) -> jax.Array:
    """Declares a float32 parameter of `module` and returns its value.

    A norm's scale starts at one. Any other parameter starts as a normal draw with the standard
    deviation `scale / sqrt(fan_in)`, truncated at three of these (LeCun et al. 1998). `fan_in` is
    the number of products that one output sums. `shape` has one size for each letter of `dims`.
    """

    def init(key: jax.Array) -> Declared:
        if kind == "norm":
            value = jnp.ones(shape, jnp.float32)
        else:
            standard = jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
            value = scale / math.sqrt(fan_in) * standard
        return Declared(value, dims=dims, kind=kind, fan_in=fan_in)

    # Parameters may also be given as NumPy arrays, as a checkpoint holds them.
    return jnp.asarray(module.param(name, init))


def is_declared(leaf: Any) -> bool:
    """Returns whether a leaf is a declaration. As `is_leaf`, it keeps `jax.tree` out of these."""
    return isinstance(leaf, Declared)


def declarations(model: nn.Module, batch: Any = None) -> Any:
    """Returns the parameter tree of `model` as Declared leaves that hold shapes and dtypes.

    `batch` is an example of what the model takes, in arrays or shapes; without it, `tokens` alone.
    Nothing is allocated.
    """
    if batch is None:
        batch = {"tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def map_declared(function: Callable[[Declared], Any], tree: Any) -> Any:
    """Applies a function to each declaration in a tree, and leaves the other leaves as they are."""
    return jax.tree.map(
        lambda leaf: function(leaf) if is_declared(leaf) else leaf, tree, is_leaf=is_declared
    )


def unbox(tree: Any) -> Any:
    """Returns the tree with plain arrays in place of declarations."""
    return map_declared(Declared.unbox, tree)
