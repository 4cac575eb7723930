"""Computes a number for the contents of an array that is the same on every mesh and host."""

from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> list[int]:
    """Returns a checksum below 2**32 for each leaf, computed on the devices that hold it.

    The checksum is the sum, modulo 2**32, of a hash of the bits and the index of each element. A
    sum of integers is the same in any order, so the layout does not matter. A changed bit or two
    exchanged elements change the checksum. A TPU needs no memory for it, and a CPU one word for
    each element.
    """
    # The leaves are taken one at a time, because the virtual devices of a CPU can wait for each
    # other forever if two programs sum over them at once.
    return [int(checksum(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns the checksum of one array, a uint32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    # An element of 8 bytes becomes two words along a new last dimension, because 64-bit arithmetic
    # may be switched off.
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    position = jnp.full(bits.shape, 0x9E3779B9, jnp.uint32)
    for dimension in range(bits.ndim):
        position = _mix(position ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension))
    # At each position the hash is a bijection of the bits, so a single changed element always
    # changes the sum.
    return jnp.sum(_mix(position ^ bits), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Mixes the bits of each word, so that every bit of the result depends on every bit of x.

    Both an xor with the word's own high bits and a multiplication by an odd factor can be undone,
    so different words stay different.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
