"""Mixout: weights that are drawn back to where training began (Lee et al. 2020, arXiv:1909.11299)."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.dropout import kept


def mixed(trainable: Any, start: Any, rate: float, key: jax.Array) -> Any:
    """Returns the weights with a share `rate` of them as they were before training, the others scaled so that the mean is theirs.

    With u a weight's start, w the weight, and k its draw, 1 for a share 1 - rate: u + k (w - u) / (1 - rate), which is the paper's
    ((1 - k) u + k w - rate u) / (1 - rate). Where u is zero, this is dropout of weights (DropConnect).

    Args:
      trainable: float32 leaves.
      start: the same leaves before the first step.
      rate: from 0 up to, not including, 1.
      key: of the draws; each leaf has its own.
    """
    leaves, form = jax.tree.flatten(trainable)

    def one(number: int, weight: jax.Array, before: jax.Array) -> jax.Array:
        keep = kept(jax.random.fold_in(key, number), 1.0 - rate, weight.shape)
        return before + jnp.where(keep, (weight - before) / (1.0 - rate), 0.0)

    return jax.tree.unflatten(form, list(map(one, range(len(leaves)), leaves, jax.tree.leaves(start))))
