"""DoRA: a kernel's direction by low-rank difference, its columns' lengths by themselves (Liu et al. 2024, arXiv:2402.09353)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.models.node import Around, Kernel, Node, dense, dot, node, take


@node
@dataclasses.dataclass(frozen=True)
class ScaledColumns(Around):
    """base with its columns multiplied: a DoRA whose norms are known.

    Fields, without the layer axis: base (in, out) and factor (out,) float32.
    """

    base: Kernel
    factor: jax.Array

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return self.factor.astype(x.dtype) * dot(x, self.base, rng)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        return self.factor.astype(dtype) * take(ids, self.base, dtype)

    def tied(self) -> Kernel:
        """What the head had without the factor."""
        return self.base.tied() if isinstance(self.base, Node) else self.base

    def dense(self) -> jax.Array:
        return self.factor[..., None, :] * dense(self.base)

    def placement(self, spec: P) -> Any:
        made: Any = ScaledColumns  # a node of specs, not of arrays
        return made(self.base_placement(spec), P((*spec, None, None)[1]))


def column_norms(base: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the length of each column of base + scale * lora_a @ lora_b, (..., out) float32."""
    changed = dense(base) + scale[..., None, None] * jnp.matmul(lora_a, lora_b, precision="highest")
    return jnp.linalg.norm(changed, axis=-2)


def norms_of(kernel: Any) -> jax.Array:
    """Returns the length of each column of a LoRA's kernel as it is without a magnitude, (out,) float32."""
    return column_norms(kernel.base, kernel.lora_a, kernel.lora_b, kernel.scale)


def factor(magnitude: jax.Array, base: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns what each column is multiplied with, (..., out) float32; the norm is a constant to the gradient (section 4.3)."""
    base, lora_a, lora_b = jax.lax.stop_gradient((base, lora_a, lora_b))
    return magnitude / column_norms(base, lora_a, lora_b, scale)
