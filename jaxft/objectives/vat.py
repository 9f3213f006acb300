"""Virtual adversarial training: what the model says shouldn't change where the embeddings move the way that changes it most.

Miyato et al. 2017, arXiv:1704.03976, on the embeddings of text as in Miyato et al. 2016, arXiv:1605.07725.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.objectives.base import Batch, Logged, Step
from jaxft.objectives.perturbation import features, norms, on_tokens, scaled
from jaxft.objectives.unlabelled import WithUnlabelled, agreement, cross_entropies, divergence, dropout, outputs


@dataclasses.dataclass(frozen=True)
class VAT(WithUnlabelled):
    """The divergence of an unlabelled row's distribution from the one with its embeddings moved by `epsilon`, the worst way.

    The way is found by power iteration: the gradient of the divergence at a small random change, `iterations` times.

    >>> VAT(epsilon=2.0).iterations
    1
    """

    epsilon: float = 1.0  # Euclidean length of the change of an example's embeddings
    xi: float = 0.1  # length of the change at which the gradient is taken
    iterations: int = 1  # of the power iteration
    entropy: float = 0.0  # weight, beside, of the entropy of what the model says of unlabelled rows

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "xi"):
            if getattr(self, name) <= 0.0:
                raise UserError(f"objective.{name} is a length above 0, not {getattr(self, name)}.")
        if self.iterations < 1:
            raise UserError(f"objective.iterations is 1 or more, not {self.iterations}.")
        if self.entropy < 0.0:
            raise UserError(f"objective.entropy is 0 or more, not {self.entropy}.")

    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the divergences, the entropies added, and how often the likeliest class stays."""
        weights, rngs = batch["weights"].reshape(-1), dropout(step, 0)  # all passes drop the same: only the change tells them apart
        fixed = jax.lax.stop_gradient(step.params(trainable))
        clean = outputs(step, step.params(trainable), batch, rngs)
        teacher = jax.lax.stop_gradient(jax.nn.softmax(clean))

        def apart(change: jax.Array) -> jax.Array:
            return jnp.sum(weights * divergence(teacher, outputs(step, fixed, batch, rngs, embedding_offset=change)))

        change = jax.lax.stop_gradient(self.epsilon * worst_way(apart, self._start(step, batch), batch, self.xi, self.iterations))
        moved = outputs(step, step.params(trainable), batch, rngs, embedding_offset=change)
        loss = jnp.sum(weights * divergence(teacher, moved))
        if self.entropy:
            loss = loss + self.entropy * jnp.sum(weights * cross_entropies(jax.nn.softmax(clean), clean))
        return loss, {"agreement": agreement(clean, moved, weights)}

    def _start(self, step: Step, batch: Batch) -> jax.Array:
        return jax.random.normal(step.rngs["objective"], (*batch["tokens"].shape, features(step.model)))


def worst_way(apart: Any, start: jax.Array, batch: Batch, xi: float, iterations: int) -> jax.Array:
    """Returns the change of embeddings, (batch, length, features), of length 1 in each example, that moves `apart` most.

    Args:
      apart: of a change, () float32, zero without one; its gradient is taken.
      start: random, as the result.
      batch: of it segment_ids.
      xi: length at which the gradient is taken.
      iterations: how often.
    """
    segments = batch["segment_ids"]
    way = on_tokens(start, batch)
    way = scaled(way, norms(way, segments))
    for _ in range(iterations):
        way = on_tokens(jax.grad(apart)(xi * way), batch)
        way = scaled(way, norms(way, segments))
    return way
