"""Learning rates of their own for some leaves, and leaves that train from a later step on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.methods.partition import combine, of_base, partition
from jaxft.models.segments import Leaf, map_leaves


def over_layers(leaf: Leaf, values: list[Any], dtype: Any = jnp.float32) -> jax.Array:
    """Returns one value for each layer of a stored leaf, shaped to multiply it."""
    if leaf.layers is None:
        return jnp.asarray(values[0], dtype)
    return jnp.asarray(values, dtype).reshape(-1, *[1] * (leaf.value.ndim - 1))


def scaled(updates: Any, factor: Callable[[str], float]) -> Any:
    """Returns each update times `factor` of its leaf's name, layer by layer."""
    return map_leaves(lambda leaf: leaf.value * over_layers(leaf, [factor(name) for name in leaf.names]), updates)


def train_from(inner: optax.GradientTransformation, start: Callable[[str, Any], int]) -> optax.GradientTransformation:
    """Returns `inner` for leaves of the base that stay as they are before step `start(name, tree)`: no gradient nor decay reaches them.

    A leaf that hasn't started is no part of the gradient's norm, and its moments stay zero.
    """

    def started(step: jax.Array, tree: Any) -> Any:
        def keep(leaf: Leaf) -> jax.Array:
            steps = over_layers(leaf, [start(name, tree) for name in leaf.names], jnp.int32)
            return jnp.where(steps <= step, leaf.value, jnp.zeros_like(leaf.value))

        base, others = partition(tree, of_base(tree))
        return combine(map_leaves(keep, base), others)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step, held = state
        updates, held = inner.update(started(step, updates), held, params)
        return started(step, updates), (step + 1, held)

    return optax.GradientTransformation(init, update)
