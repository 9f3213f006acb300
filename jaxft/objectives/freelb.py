"""FreeLB: labelled rows learned with their embeddings moved, step by step, the way that raises the loss.

Zhu et al. 2019, arXiv:1909.11764. Each ascent step's backward pass gives the gradient of the weights too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.models.attention import PADDING
from jaxft.objectives.base import Batch, Logged, Objective, Step
from jaxft.objectives.perturbation import features, norms, of_examples, on_tokens, scaled, within
from jaxft.tasks.head import Sums


@dataclasses.dataclass(frozen=True)
class FreeLB(Objective):
    """The mean of the task's loss over `ascents` changes of the embeddings: the start, then each a step of `rate` up from the one before.

    >>> FreeLB(ascents=2).rate
    0.1
    """

    ascents: int = 3  # changes of the embeddings that a step averages over
    rate: float = 0.1  # Euclidean length of a step of the change of an example's embeddings
    start: float = 0.0  # most that the random change at the beginning is long: each number uniform in +-start / sqrt(numbers); 0: none
    epsilon: float = 0.0  # length of a change at most; 0: any

    def __post_init__(self) -> None:
        if self.ascents < 1:
            raise UserError(f"objective.ascents is 1 or more, not {self.ascents}.")
        for name in ("rate", "start", "epsilon"):
            if getattr(self, name) < 0.0:
                raise UserError(f"objective.{name} is a length, 0 or more, not {getattr(self, name)}.")
        if not self.start and (self.ascents == 1 or not self.rate):
            raise UserError(
                "FreeLB has no effect: where objective.start is 0 its first pass is of the embeddings as they are, and no other one is "
                "moved. Give objective.ascents of 2 or more and a rate, or a start."
            )

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for R-Drop, whose two passes would be moved by one change."""
        if experiment.train.r_drop:
            raise UserError("The objective FreeLB and train.r_drop both make several passes of a batch. Leave one of them out.")

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the mean of the task's sums; their gradient is the mean of the changes' gradients."""
        fixed = jax.lax.stop_gradient(trainable)

        def loss(trainable: Any, change: jax.Array) -> tuple[jax.Array, Sums]:
            found = step.supervised(trainable, batch, embedding_offset=change)
            return found.loss, found

        def ascend(carry: Any, _: None) -> tuple[Any, jax.Array]:
            change, total = carry
            (gradient, uphill), found = jax.grad(loss, argnums=(0, 1), has_aux=True)(fixed, change)
            return (self.moved(change, uphill, batch), jax.tree.map(jnp.add, total, (gradient, found))), norms(change, batch["segment_ids"])

        shapes = jax.eval_shape(lambda: jax.grad(loss, has_aux=True)(fixed, self._start(step, batch)))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (_, total), lengths = jax.lax.scan(ascend, (self._start(step, batch), zero), length=self.ascents)
        gradient, sums = jax.tree.map(lambda leaf: leaf / self.ascents, total)
        size = jnp.sum(lengths[-1, :, :, 0] * self._firsts(batch))
        logged = {"perturbation": (size, jnp.sum(self._firsts(batch)))}
        return dataclasses.replace(sums, loss=with_gradient(sums.loss, gradient, trainable)), logged

    def moved(self, change: jax.Array, uphill: jax.Array, batch: Batch) -> jax.Array:
        """Returns the change after a step up its gradient."""
        segments, uphill = batch["segment_ids"], on_tokens(uphill, batch)
        change = change + self.rate * scaled(uphill, norms(uphill, segments))
        return within(change, norms(change, segments), self.epsilon) if self.epsilon else change

    def _start(self, step: Step, batch: Batch) -> jax.Array:
        """Uniform in +-start / sqrt(tokens of the example * features), as in the paper's code."""
        shape = (*batch["tokens"].shape, features(step.model))
        if not self.start:
            return jnp.zeros(shape)
        lengths = of_examples(jax.ops.segment_sum, jnp.ones(shape[:2]), batch["segment_ids"])[:, :, None]
        drawn = jax.random.uniform(step.rngs["objective"], shape, minval=-1.0, maxval=1.0)
        return on_tokens(self.start * drawn / jnp.sqrt(lengths * shape[2]), batch)

    @staticmethod
    def _firsts(batch: Batch) -> jax.Array:
        """1 at the first token of each example, (batch, length) float32."""
        segments = batch["segment_ids"]
        new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return (new & (segments != PADDING)).astype(jnp.float32)


def with_gradient(value: jax.Array, gradient: Any, at: Any) -> jax.Array:
    """Returns `value`, () float32, with this gradient in the leaves `at`."""
    products = jax.tree.map(lambda own, leaf: jnp.sum(own * (leaf - jax.lax.stop_gradient(leaf))), gradient, at)
    return jax.lax.stop_gradient(value) + sum(jax.tree.leaves(products), jnp.float32(0))
