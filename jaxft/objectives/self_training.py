"""Self-training: the model's own labels, where it is sure of them, with all classes alike where that is wanted.

Lee 2013, "Pseudo-label"; Zou et al. 2018, arXiv:1810.07911, for the balance of classes and soft labels (Zou et al. 2019, arXiv:1908.09822).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.objectives.base import Batch, Logged, Step
from jaxft.objectives.pseudo_labels import PseudoLabels, confident
from jaxft.objectives.unlabelled import cross_entropies, dropout, outputs

_TAKEN = "taken"  # what a step tells `update`: the labels taken of each class; no metric
_DECAY = 0.99  # what of the classes' shares stays at a step
_MOST = 10.0  # a label's weight is at most this, and at least its inverse: a class that is hardly ever taken isn't all there is


@dataclasses.dataclass(frozen=True)
class SelfTraining(PseudoLabels):
    """Cross-entropy for what the model says without dropout of the same row.

    >>> SelfTraining(soft=True).threshold
    0.95
    """

    soft: bool = False  # learns the whole distribution, not the likeliest class
    temperature: float = 1.0  # soft: that the logits are divided by; below 1 makes it surer
    balanced: bool = False  # labels count in inverse to how often their class was taken lately

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0.0:
            raise UserError(f"objective.temperature is more than 0, not {self.temperature}.")
        if self.temperature != 1.0 and not self.soft:
            raise UserError("objective.temperature has no effect without objective.soft: the likeliest class is the same. Leave it out.")

    def init(self, task: Any, model: Any, trainable: Any) -> Any:
        """Returns the counts, and the share of each class among the labels taken, all alike."""
        count = len(model.config.labels)
        return {**super().init(task, model, trainable), "shares": jnp.full((count,), 1 / count, jnp.float32)}

    def teacher(self, step: Step, params: Any, batch: Batch) -> jax.Array:
        """Returns the outputs without dropout."""
        return outputs(step, params, batch, {})

    def student(self, step: Step, trainable: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs with dropout."""
        found = outputs(step, step.params(trainable), batch, dropout(step, 1))
        return found, jnp.ones(len(found), jnp.float32)

    def losses(self, teacher: jax.Array, student: jax.Array, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the cross-entropies, and what each label counts."""
        labels, taken = confident(jax.nn.softmax(teacher), self.threshold)
        counts = taken * class_weights(state["shares"])[labels] if self.balanced else taken
        return cross_entropies(jax.nn.softmax(teacher / self.temperature) if self.soft else labels, student), counts

    def noted(self, teacher: jax.Array, used: jax.Array, batch: Batch, state: Any) -> Logged:
        """Returns how many labels were taken of each class, (classes,) float32."""
        labels = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), teacher.shape[-1])
        return {_TAKEN: (jnp.sum(labels * (used > 0).astype(jnp.float32)[:, None], axis=0), jnp.float32(1))}

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the arrays with the shares of the classes among the labels taken in this step."""
        taken = logged[_TAKEN][0]
        total = jnp.sum(taken)
        now = jnp.where(total > 0, taken / jnp.maximum(total, 1.0), state["shares"])
        return {**super().update(state, trainable, logged, number), "shares": _DECAY * state["shares"] + (1 - _DECAY) * now}


def class_weights(shares: jax.Array) -> jax.Array:
    """Returns what a label of each class counts, (classes,) float32: the inverse of its share, 1 on average, within bounds."""
    return jnp.clip(1 / (len(shares) * jnp.maximum(shares, 1e-9)), 1 / _MOST, _MOST)
