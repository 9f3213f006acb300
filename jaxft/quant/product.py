"""The product with a frozen kernel that is stored in few bits: dense for as long as one product takes, in both passes."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxft.models.mesh import gathered

Weight = Callable[[Any, Any], jax.Array]  # (kernel, dtype) -> W, (out, in)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: Any, weight: Weight) -> jax.Array:
    """Returns x (tokens, in) times W.T, (tokens, out) in x's type, with W = weight(kernel, x.dtype), (out, in).

    Only x has a gradient: the kernel is frozen, and what derives from it is a symbolic zero. The backward pass keeps the kernel as it is
    stored and makes W anew; the rule that JAX would derive keeps W of every layer from the forward to the backward pass.
    """
    return x @ weight(gathered(kernel), x.dtype).mT


def _forward(x: jax.Array, kernel: Any, weight: Weight) -> tuple[jax.Array, Any]:
    return product(x, kernel, weight), kernel


def _backward(weight: Weight, kernel: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient @ weight(gathered(kernel), gradient.dtype), None


product.defvjp(_forward, _backward)
