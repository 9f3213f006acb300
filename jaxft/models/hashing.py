"""Hashes of 32 bits on devices: elementwise, so that they fuse with what uses them."""

import jax
import jax.numpy as jnp

STRIDE = 2654435769  # 2^32 over the golden ratio, odd: its multiples visit every number of 32 bits


def mixed(x: jax.Array) -> jax.Array:
    """Returns a bijection of uint32 in which each bit of the result hangs on all of x (Wellons 2018, "Prospecting for hash functions").

    0 stays 0.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def places(shape: tuple[int, ...]) -> jax.Array:
    """Returns the number of each element in an array of this shape, uint32: modulo 2^32."""
    found = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        found = found * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return found
