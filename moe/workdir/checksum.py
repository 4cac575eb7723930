"""A number for the contents of each array of a tree, the same on every mesh and any number of
hosts.
"""

from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> list[int]:
    """Returns a checksum below 2**32 for each leaf, computed where its shards lie; one bit or two
    exchanged elements change it.

    It is the sum, modulo 2**32, of a hash of each element's bits and of its index in each
    dimension. Addition of integers gives the same sum in any order, so the layout does not matter.
    A TPU needs no memory for it, and a CPU one word for each of a leaf's elements.
    """
    # One at a time: the virtual devices of a CPU wait for each other for ever where two programs
    # add up over them at once.
    return [int(checksum(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns an array's checksum, a uint32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    # Elements of 8 bytes become pairs of words, along a new last dimension; 64-bit arithmetic may
    # be switched off.
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.full(bits.shape, 0x9E3779B9, jnp.uint32)
    for dimension in range(bits.ndim):
        position = _mix(position ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension))
    # For one position the hash is a bijection of the bits, so that a single changed element always
    # changes the sum.
    return jnp.sum(_mix(position ^ bits), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Spreads each bit of a word over all of them, without losing any: xors with its own high bits
    and odd factors.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
