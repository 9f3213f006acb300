"""SMART: what the model says of labelled rows is smooth around their embeddings, and changes little from step to step.

Jiang et al. 2019, arXiv:1911.03437.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.objectives.base import Batch, Logged, Objective, Step
from jaxft.objectives.perturbation import features, largest, on_tokens, scaled
from jaxft.objectives.unlabelled import CLASSES, agreement, check_classes, check_task, dropout, outputs
from jaxft.tasks.head import Sums


@dataclasses.dataclass(frozen=True)
class SMART(Objective):
    """The task's loss, and how far its outputs go where the embeddings are moved the worst way, or from those of averaged weights.

    How far is the mean of both Kullback-Leibler divergences.

    >>> SMART(proximal=1.0).ascents
    1
    """

    weight: float = 1.0  # of the smoothness
    epsilon: float = 1e-3  # largest change of a number of an embedding
    start: float = 1e-3  # standard deviation of the change at the beginning
    rate: float = 1e-3  # of a step of the change, by its largest number
    ascents: int = 1  # steps of the change
    proximal: float = 0.0  # weight of the divergence from the averaged weights; 0: there is no average
    decay: float = 0.99  # proximal: what of the average stays at a step

    def __post_init__(self) -> None:
        for name in ("weight", "epsilon", "start", "rate", "proximal"):
            if getattr(self, name) < 0.0:
                raise UserError(f"objective.{name} is 0 or more, not {getattr(self, name)}.")
        if self.ascents < 1:
            raise UserError(f"objective.ascents is 1 or more, not {self.ascents}.")
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"objective.decay is a share from 0 up to, not including, 1, not {self.decay}.")

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for a task that has no distribution over classes."""
        check_task(self, experiment.task, CLASSES, "FreeLB is for any task.")

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> Objective:
        """Returns the objective; raises `UserError` for labels that are no classes."""
        check_classes(self, model)
        return self

    def init(self, task: Any, model: nn.Module, trainable: Any) -> Any:
        """Returns the average's leaves, those of the start; None where there is none."""
        return jax.tree.map(jnp.copy, trainable) if self.proximal else None

    def places(self, state: Any, trainable: Any, everywhere: Any) -> Any:
        """Returns the places of the trainable leaves."""
        return trainable if self.proximal else None

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the task's sums, both divergences added."""
        sums = step.supervised(trainable, batch)
        weights, rngs = batch["weights"].reshape(-1), dropout(step, 0)  # all passes drop the same: only the change tells them apart
        fixed = jax.lax.stop_gradient(step.params(trainable))
        clean = outputs(step, step.params(trainable), batch, rngs)
        at_rest = jax.lax.stop_gradient(clean)

        def apart(change: jax.Array) -> jax.Array:
            moved = outputs(step, fixed, batch, rngs, embedding_offset=change)
            return jnp.sum(weights * step.task.divergence(step.model, at_rest, moved))

        change = self.start * jax.random.normal(step.rngs["objective"], (*batch["tokens"].shape, features(step.model)))
        change = self.worst(apart, on_tokens(change, batch), batch)
        moved = outputs(step, step.params(trainable), batch, rngs, embedding_offset=jax.lax.stop_gradient(change))
        rough = jnp.sum(weights * step.task.divergence(step.model, clean, moved))
        loss = sums.loss + self.weight * rough
        logged = {"roughness": (rough, jnp.sum(weights)), "agreement": agreement(clean, moved, weights)}
        if self.proximal:
            before = jax.lax.stop_gradient(outputs(step, step.params(state), batch, rngs))
            far = jnp.sum(weights * step.task.divergence(step.model, before, clean))
            loss, logged["proximal"] = loss + self.proximal * far, (far, jnp.sum(weights))
        return dataclasses.replace(sums, loss=loss), logged

    def worst(self, apart: Any, change: jax.Array, batch: Batch) -> jax.Array:
        """Returns the change after its steps up the gradient of `apart`, each drawn back to where no number is above epsilon."""
        for _ in range(self.ascents):
            uphill = on_tokens(jax.grad(apart)(change), batch)
            change = change + self.rate * scaled(uphill, largest(uphill, batch["segment_ids"]))
            change = jnp.clip(change, -self.epsilon, self.epsilon)
        return change

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the average after a step."""
        if not self.proximal:
            return None
        return jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, state, trainable)
