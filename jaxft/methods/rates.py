"""Learning rates of their own for some leaves, and leaves that train from a later step on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.methods.partition import combine, of_base, partition
from jaxft.models.segments import Leaf, leaves, map_leaves


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

    A leaf that hasn't started is no part of the gradient's norm, and its moments stay zero. The steps that an optimizer counts, as Adam
    does to correct its moments, are then those of the leaf, as in torch; those of the rate's schedule are the run's.
    """

    def of_layers(leaf: Leaf, tree: Any) -> jax.Array:
        return over_layers(leaf, [start(name, tree) for name in leaf.names], jnp.int32)

    def started(step: jax.Array, tree: Any) -> Any:
        def keep(leaf: Leaf) -> jax.Array:
            return jnp.where(of_layers(leaf, tree) <= step, leaf.value, jnp.zeros_like(leaf.value))

        base, others = partition(tree, of_base(tree))
        return combine(map_leaves(keep, base), others)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step, held = state
        begun = started(step, updates)

        form: Any = jax.tree.structure(updates)

        def is_like(tree: Any) -> bool:
            return bool(form == jax.tree.structure(tree))

        def taken(first: int, tree: Any, other: Any) -> Any:
            """Returns `tree`, updates or an optimizer's moments, with those of `other` for the leaves that start at step `first`."""
            if not is_like(tree):
                return tree

            def choose(leaf: Leaf) -> jax.Array:
                if leaf.layers is not None and leaf.value.shape[:1] != (len(leaf.layers),):
                    return leaf.value  # what Adafactor has for a leaf that it doesn't factor
                return jnp.where(of_layers(leaf, updates) == first, found[leaf.path], leaf.value)

            found = {leaf.path: leaf.value for leaf in leaves(other)}
            base, others = partition(tree, of_base(updates))
            return combine(map_leaves(choose, base), others)

        base, _ = partition(updates, of_base(updates))
        result = inner.update(begun, held, params)
        for first in sorted({start(name, updates) for leaf in leaves(base) for name in leaf.names} - {0}):
            take = functools.partial(taken, first)
            made = inner.update(begun, _counted_from(first, held), params)
            result = jax.tree.map(take, result, made, is_leaf=is_like)
        return started(step, result[0]), (step + 1, result[1])

    return optax.GradientTransformation(init, update)


def _counted_from(first: int, states: Any) -> Any:
    """Returns an optimizer's state as if it had begun at step `first`; a schedule's count stays."""

    def is_counted(state: Any) -> bool:
        return "count" in getattr(state, "_fields", ()) and len(state) > 1

    def shift(state: Any) -> Any:
        return state._replace(count=jnp.maximum(state.count - first, 0)) if is_counted(state) else state

    return jax.tree.map(shift, states, is_leaf=is_counted)
