"""FlexMatch: FixMatch with a threshold for each class, lower where the model has learned less of it.

Zhang et al. 2021, arXiv:2110.08263.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.objectives.base import Batch, Logged
from jaxft.objectives.pseudo_labels import Views, confident
from jaxft.objectives.unlabelled import cross_entropies

_SURE = "sure"  # what a step tells `update`: of each slot, how often it was sure of which class; no metric


@dataclasses.dataclass(frozen=True)
class FlexMatch(Views):
    """FixMatch with the threshold M(b) * `threshold` for a class: b is how many unlabelled slots were surely of it when last seen, as a
    share of the most frequent class, or of the slots not sure yet where these are more; M(b) = b / (2 - b).

    >>> FlexMatch().threshold
    0.95
    """

    meanwhile: ClassVar[str] = "the threshold of each class is still 0, so it learns whatever it says itself"

    def init(self, task: Any, model: Any, trainable: Any) -> Any:
        """Returns the counts, and no slot's class yet."""
        return {**super().init(task, model, trainable), "classes": jnp.full((0,), -1, jnp.int32)}

    def with_slots(self, state: Any, slots: int) -> Any:
        """Returns the arrays with the class of each slot, (slots,) int32: the one it was last surely of, or -1."""
        return {**state, "classes": jnp.full((slots,), -1, jnp.int32)}

    def losses(self, teacher: jax.Array, student: jax.Array, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the cross-entropies, and which labels are taken."""
        probabilities = jax.nn.softmax(teacher)
        thresholds = self.threshold * shares(state["classes"], teacher.shape[-1])
        labels, _ = confident(probabilities, 0.0)
        labels, taken = confident(probabilities, thresholds[labels])
        return cross_entropies(labels, student), taken

    def noted(self, teacher: jax.Array, used: jax.Array, batch: Batch, state: Any) -> Logged:
        """Returns how often each slot was surely of which class, by the threshold itself, (slots of all rows, classes) float32."""
        labels, sure = confident(jax.nn.softmax(teacher), self.threshold)
        sure *= batch["weights"].reshape(-1)
        votes = jnp.zeros((len(state["classes"]), teacher.shape[-1])).at[batch["numbers"].reshape(-1), labels].add(sure, mode="drop")
        return {_SURE: (votes, jnp.float32(1))}

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the arrays with the classes of the slots that this step was sure of."""
        votes = logged[_SURE][0]
        classes = jnp.where(jnp.max(votes, axis=-1) > 0, jnp.argmax(votes, axis=-1).astype(jnp.int32), state["classes"])
        return {**super().update(state, trainable, logged, number), "classes": classes}

    def was_sure(self, state: Any) -> bool:
        """Returns whether any slot has a class."""
        return bool((state["classes"] >= 0).any())


def shares(classes: jax.Array, count: int) -> jax.Array:
    """Returns M(b) of each class, (count,) float32, from 0 to 1, by the classes (slots,) that slots were last surely of, or -1."""
    sizes = jnp.sum((classes[:, None] == jnp.arange(count)).astype(jnp.float32), axis=0)
    unsure = jnp.sum((classes < 0).astype(jnp.float32))
    learned = sizes / jnp.maximum(jnp.maximum(jnp.max(sizes), unsure), 1.0)
    return learned / (2 - learned)
