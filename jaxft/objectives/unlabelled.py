"""What the objectives on rows without labels share: a loss of such rows beside the task's own, and what is told of it."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxft.data.unlabelled import UNLABELLED
from jaxft.errors import UserError
from jaxft.models.heads import MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from jaxft.objectives.base import Batch, Logged, Objective, Step
from jaxft.tasks.head import Sums

_OTHER_PASSES = 16  # further than the passes that a task makes of its own
CLASSES = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)  # tasks whose outputs are a distribution over classes


@dataclasses.dataclass(frozen=True)
class WithUnlabelled(Objective):
    """The task's loss on labelled rows, plus `weight` times the mean of another loss over the slots of rows without labels."""

    weight: float = 1.0  # of the loss on rows without labels

    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = CLASSES  # the tasks it is for
    elsewhere: ClassVar[str] = "Of the objectives on unlabelled rows, SelfSupervised and PseudoAnswers are for answers."

    def __post_init__(self) -> None:
        if self.weight < 0.0:
            raise UserError(f"objective.weight is 0 or more, not {self.weight}.")

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for a task that this isn't for."""
        check_task(self, experiment.task, self.tasks, self.elsewhere)

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> Objective:
        """Returns the objective; raises `UserError` for labels that are no classes."""
        check_classes(self, model)
        return self

    def shared(self, batch: Batch, state: Any, number: jax.Array, steps: int) -> Any:
        """Returns the quotient of the labelled weights and the number of unlabelled slots, () float32."""
        return jnp.sum(batch["weights"]) / jnp.maximum(jnp.sum(batch[UNLABELLED]["weights"]), 1.0)

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the task's sums on labelled rows, the loss on the others added."""
        labelled = {name: values for name, values in batch.items() if name != UNLABELLED}
        sums = step.supervised(trainable, labelled)
        loss, logged = self.added(step, trainable, batch[UNLABELLED], state)
        logged = {"unlabelled_loss": (loss, jnp.sum(batch[UNLABELLED]["weights"]))} | logged
        scale = jnp.float32(self.weight) * self.ramp(step) * step.shared
        return dataclasses.replace(sums, loss=sums.loss + scale * loss), logged

    def ramp(self, step: Step) -> jax.Array:
        """Returns what the weight is multiplied with at this step, () float32."""
        return jnp.float32(1.0)

    @abc.abstractmethod
    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the loss on rows without labels, summed over their slots, and what is logged of it.

        Args:
          step: as `sums`.
          trainable: as `sums`.
          batch: of the rows without labels; the targets are for figures alone.
          state: as `sums`.
        """


def check_task(objective: Objective, task: Any, tasks: tuple[str, ...], elsewhere: str = "") -> None:
    """Raises `UserError` for a task that isn't among those that an objective is for."""
    if task.model_task not in tasks:
        name = type(objective).__name__
        raise UserError(f"The objective {name} is for {', '.join(tasks)}, not for the task {type(task).__name__}. {elsewhere}".rstrip())


def check_classes(objective: Objective, model: Any) -> None:
    """Raises `UserError` for a sequence classification whose outputs are no distribution over classes."""
    if model.task == SEQUENCE_CLASSIFICATION and (kind := model.config.problem_type) in (MULTI_LABEL, REGRESSION):
        raise UserError(f"The objective {type(objective).__name__} is for one class a text; these labels are of {kind}. Leave it out.")


def outputs(step: Step, params: Any, batch: Batch, rngs: Mapping[str, jax.Array], **options: Any) -> jax.Array:
    """Returns the head's outputs in the batch's slots, (batch * slots, classes) float32.

    Args:
      step: of it the task and the model.
      params: of the whole model.
      batch: (batch, length) and (batch, slots) arrays.
      rngs: the key `dropout`, or none for no dropout.
      **options: of `model.features`: embedding_offset.
    """
    given = {name: values for name, values in batch.items() if name != "numbers"}
    own = {name: jax.random.fold_in(key, 0) for name, key in rngs.items()}
    hidden = step.task.hidden(step.model, params, given, own, **options)
    head = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    made: Any = step.model.apply({"params": params}, hidden, method="logits", rngs=head)
    return made.astype(jnp.float32)


def dropout(step: Step, number: int) -> dict[str, jax.Array]:
    """Returns the key of a pass's dropout, another one than the labelled rows have, and none where these have none.

    Passes of one number drop the same.
    """
    return {name: jax.random.fold_in(key, _OTHER_PASSES + number) for name, key in step.rngs.items() if name == "dropout"}


def divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Returns the Kullback-Leibler divergence of each slot, (slots,) float32, of probabilities (slots, classes) from logits."""
    logs = jnp.where(teacher > 0, jnp.log(jnp.maximum(teacher, 1e-30)), 0.0)
    return jnp.sum(teacher * (logs - jax.nn.log_softmax(student)), axis=-1)


def cross_entropies(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each slot, (slots,) float32, for classes (slots,) or probabilities (slots, classes)."""
    likelihoods = jax.nn.log_softmax(logits)
    if targets.ndim == 1:
        return -jnp.take_along_axis(likelihoods, targets[:, None], axis=-1)[:, 0]
    return -jnp.sum(targets * likelihoods, axis=-1)


def agreement(one: jax.Array, other: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns in how many slots two outputs have the same likeliest class, and of how many, () float32 each."""
    same = (jnp.argmax(one, axis=-1) == jnp.argmax(other, axis=-1)).astype(jnp.float32)
    return jnp.sum(same * weights), jnp.sum(weights)
