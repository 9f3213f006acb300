"""DoRA: a kernel's direction by low-rank difference, its columns' lengths by themselves (Liu et al. 2024, arXiv:2402.09353)."""

import jax
import jax.numpy as jnp

from jaxft.models.node import Kernel, dense


def column_norms(base: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the length of each column of base + scale * lora_a @ lora_b, (..., out) float32."""
    changed = dense(base) + scale[..., None, None] * jnp.matmul(lora_a, lora_b, precision="highest")
    return jnp.linalg.norm(changed, axis=-2)


def factor(magnitude: jax.Array, base: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns what each column is multiplied with, (..., out) float32; the norm is a constant to the gradient (section 4.3)."""
    base, lora_a, lora_b = jax.lax.stop_gradient((base, lora_a, lora_b))
    return magnitude / column_norms(base, lora_a, lora_b, scale)
