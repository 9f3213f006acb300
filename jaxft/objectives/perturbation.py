"""Small changes of the tokens' embeddings, each example's with a size of its own: what adversarial objectives move."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.attention import PADDING
from jaxft.objectives.base import Batch

_SMALLEST = 1e-12  # a gradient that is zero stays zero


def features(model: Any) -> int:
    """Returns the features of a token's embedding."""
    return int(getattr(model.config, "embedding_size", model.config.hidden_size))


def on_tokens(change: jax.Array, batch: Batch) -> jax.Array:
    """Returns a change of embeddings (batch, length, features), zero at padding."""
    return change * (batch["segment_ids"] != PADDING).astype(change.dtype)[:, :, None]


def of_examples(reduce: Any, values: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns for each token what `reduce`, as jax.ops.segment_sum, makes of the values of its example's tokens, (batch, length).

    The tokens of a prefix that examples share are an example of their own.
    """

    def row(values: jax.Array, segments: jax.Array) -> jax.Array:
        index = segments + 1  # a shared prefix is -1
        found: jax.Array = reduce(values, index, num_segments=len(segments) + 2)
        return found[index]

    return jax.vmap(row)(values, segments)


def norms(change: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the Euclidean norm of each token's example, (batch, length, 1)."""
    return jnp.sqrt(of_examples(jax.ops.segment_sum, jnp.sum(jnp.square(change), axis=-1), segments))[:, :, None]


def largest(change: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the largest absolute value of each token's example, (batch, length, 1)."""
    return of_examples(jax.ops.segment_max, jnp.max(jnp.abs(change), axis=-1), segments)[:, :, None]


def scaled(change: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns the change divided by the sizes of its examples, zero where these are."""
    return jnp.where(sizes > _SMALLEST, change / jnp.maximum(sizes, _SMALLEST), 0.0)


def within(change: jax.Array, sizes: jax.Array, radius: float) -> jax.Array:
    """Returns the change drawn back into a ball of this radius, by the sizes of its examples."""
    return change * jnp.minimum(1.0, radius / jnp.maximum(sizes, _SMALLEST))
