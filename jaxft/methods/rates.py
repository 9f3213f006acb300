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


def train_from(inner: optax.GradientTransformation, start: Callable[[str, Any], int]) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` for leaves of the base that stay as they are before step `start(name, tree)`: no gradient nor decay reaches them.

    A leaf that hasn't started is no part of the gradient's norm, and its moments stay zero. `inner` is given `late`, how many of the run's
    steps each leaf lets pass, with which Adam corrects its moments by the leaf's own steps, as torch does (`jaxft.train.optimizer`); other
    optimizers take no such argument. The schedule of the rate is the run's.
    """
    inner = optax.with_extra_args_support(inner)

    def of_layers(leaf: Leaf, tree: Any) -> jax.Array:
        return over_layers(leaf, [start(name, tree) for name in leaf.names], jnp.int32)

    def started(step: jax.Array, updates: Any, tree: Any) -> Any:
        """Returns a tree of the leaves of `updates` with zeros for those that haven't started."""

        def keep(leaf: Leaf) -> jax.Array:
            if leaf.layers is not None and leaf.value.shape[:1] != (len(leaf.layers),):
                return leaf.value  # what Adafactor has in the place of a moment
            return jnp.where(of_layers(leaf, updates) <= step, leaf.value, jnp.zeros_like(leaf.value))

        base, others = partition(tree, of_base(updates))
        return combine(map_leaves(keep, base), others)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, late: Any = None, **given: Any) -> tuple[Any, Any]:
        step, held = state
        base, others = partition(updates, of_base(updates))
        own = combine(map_leaves(lambda leaf: of_layers(leaf, updates), base), jax.tree.map(lambda _: jnp.int32(0), others))
        late = own if late is None else jax.tree.map(jnp.add, own, late)
        result = inner.update(started(step, updates, updates), held, params, late=late, **given)
        form: Any = jax.tree.structure(updates)

        def is_like(tree: Any) -> bool:
            return bool(form == jax.tree.structure(tree))

        moved, held = jax.tree.map(lambda tree: started(step, updates, tree) if is_like(tree) else tree, result, is_leaf=is_like)
        return moved, (step + 1, held)

    return optax.GradientTransformationExtraArgs(init, update)
