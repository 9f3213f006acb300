"""Mean Teacher: an average of the weights over the steps teaches the weights on rows without labels.

Tarvainen and Valpola 2017, arXiv:1703.01780.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.objectives.base import Batch, Logged, Step
from jaxft.objectives.pseudo_labels import figures
from jaxft.objectives.unlabelled import WithUnlabelled, agreement, divergence, dropout, outputs

SQUARE, KL = "square", "kl"
DISTANCES = (SQUARE, KL)
_STEEPNESS = 5.0  # of the ramp exp(-5 (1 - t)^2), as in the paper


@dataclasses.dataclass(frozen=True)
class MeanTeacher(WithUnlabelled):
    """The distance of the model's distribution from its teacher's, both with dropout of their own.

    The teacher has an average of the trainable leaves alone; the frozen ones are the model's own.

    >>> MeanTeacher(decay=0.99).distance
    'square'
    """

    weight: float = 10.0  # of the loss on rows without labels, at the end of the ramp
    decay: float = 0.99  # what of the teacher stays at a step; 1 - 1 / (1 + steps done) where that is less
    ramp_up: float = 0.3  # share of the steps in which the weight rises, as exp(-5 (1 - t)^2)
    distance: str = SQUARE  # of two distributions: square, the mean over classes; kl, from the teacher's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in DISTANCES:
            raise unknown("objective.distance", self.distance, DISTANCES)
        for name in ("decay", "ramp_up"):
            if not 0.0 <= (share := getattr(self, name)) < 1.0:
                raise UserError(f"objective.{name} is a share from 0 up to, not including, 1, not {share}.")

    def init(self, task: Any, model: nn.Module, trainable: Any) -> Any:
        """Returns the teacher's leaves, those of the start."""
        return jax.tree.map(jnp.copy, trainable)

    def places(self, state: Any, trainable: Any, everywhere: Any) -> Any:
        """Returns the places of the trainable leaves."""
        return trainable

    def ramp(self, step: Step) -> jax.Array:
        """Returns exp(-5 (1 - t)^2), t the share of the ramp that is done; 1 where there is none."""
        if not self.ramp_up:
            return jnp.float32(1.0)
        length = self.ramp_up * step.steps
        return jnp.exp(-_STEEPNESS * jnp.square(1 - jnp.minimum(step.number.astype(jnp.float32) / length, 1.0)))

    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the distances, and the figures of the teacher's likeliest classes, all of them taken."""
        weights = batch["weights"].reshape(-1)
        teacher = jax.lax.stop_gradient(outputs(step, step.params(state), batch, dropout(step, 0)))
        student = outputs(step, step.params(trainable), batch, dropout(step, 1))
        logged = figures(step.model, teacher, weights, batch) | {"agreement": agreement(teacher, student, weights)}
        return jnp.sum(weights * distances(teacher, student, self.distance)), logged

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the teacher after a step."""
        decay = jnp.minimum(self.decay, 1 - 1 / (1 + number.astype(jnp.float32)))
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state, trainable)


def distances(teacher: jax.Array, student: jax.Array, kind: str) -> jax.Array:
    """Returns the distance of each slot, (slots,) float32, of outputs (slots, classes)."""
    if kind == KL:
        return divergence(jax.nn.softmax(teacher), student)
    return jnp.mean(jnp.square(jax.nn.softmax(teacher) - jax.nn.softmax(student)), axis=-1)
