"""What objectives that learn from their own labels share: which labels they take, what is told of them, and when none is taken at all."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.data.examples import special_ids
from jaxft.errors import UserError
from jaxft.objectives.base import Batch, Logged, Objective, Step, check_token
from jaxft.objectives.unlabelled import WithUnlabelled, agreement, dropout, outputs
from jaxft.objectives.views import RANDOM, View, strong

USED = "unlabelled_used"  # the share of the unlabelled slots whose label is taken
_EARLY = 0.1  # share of a run's steps after which it is told that no label was taken
_EARLIEST = 10  # steps before that, at least


@dataclasses.dataclass(frozen=True)
class Sure(WithUnlabelled):
    """A loss on what the model itself says of rows without labels, where it is sure enough."""

    threshold: float = 0.95  # probability of the likeliest class from which a row's own label is taken

    meanwhile: ClassVar[str] = "it learns from labelled rows alone so far"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold < 1.0:
            raise UserError(
                f"objective.threshold is a probability from 0 up to, not including, 1, not {self.threshold}: no model is surer than that."
            )

    def init(self, task: Any, model: nn.Module, trainable: Any) -> Any:
        """Returns how many slots were used so far."""
        return {"used": jnp.float32(0)}

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the count with this step's."""
        return {**state, "used": state["used"] + logged[USED][0]}

    def warning(self, state: Any, number: int, steps: int) -> str:
        """Returns that the model was never sure enough so far, once, early in the run."""
        if number != min(max(round(_EARLY * steps), _EARLIEST), steps) or self.was_sure(state):
            return ""
        return self.unsure(number)

    def unsure(self, number: int) -> str:
        """Returns that the model was never sure enough in so many steps."""
        return (
            f"in {number} steps the model was never as sure of an unlabelled row as config.objective.threshold={self.threshold}: "
            f"{self.meanwhile}. Lower the threshold, or give it more steps on labels."
        )

    def was_sure(self, state: Any) -> bool:
        """Returns whether any slot passed the threshold so far."""
        return bool(state["used"] > 0)


@dataclasses.dataclass(frozen=True)
class PseudoLabels(Sure):
    """A loss on the model's own labels for rows without any, where it is sure enough of them; no gradient flows through these labels."""

    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the loss on the labels that are taken, over all slots, and the figures."""
        weights = batch["weights"].reshape(-1)
        teacher = self.teacher(step, jax.lax.stop_gradient(step.params(trainable)), batch)
        student, kept = self.student(step, trainable, batch)
        losses, taken = self.losses(jax.lax.stop_gradient(teacher), student, batch, state)
        used = taken * weights * kept
        logged = figures(step.model, teacher, used, batch) | {"agreement": agreement(teacher, student, weights * kept)}
        return jnp.sum(used * losses), logged | self.noted(teacher, used, batch, state)

    def noted(self, teacher: jax.Array, used: jax.Array, batch: Batch, state: Any) -> Logged:
        """Returns what `update` has to know of the labels beside the figures, as arrays.

        Args:
          teacher: (slots, classes).
          used: (slots,) float32, what each label counts.
          batch: of the rows without labels.
          state: of `init`.
        """
        return {}

    def teacher(self, step: Step, params: Any, batch: Batch) -> jax.Array:
        """Returns the outputs that labels are made of, (slots, classes): of the weak view, which dropout alone makes."""
        return outputs(step, params, batch, dropout(step, 0))

    @abc.abstractmethod
    def student(self, step: Step, trainable: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs that learn, (slots, classes), and which slots still have their token, (slots,) float32."""

    @abc.abstractmethod
    def losses(self, teacher: jax.Array, student: jax.Array, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the loss of each slot, and what it counts, 0 where its label isn't taken: (slots,) float32 each.

        Args:
          teacher: (slots, classes), without gradient.
          student: (slots, classes).
          batch: of the rows without labels.
          state: of `init`.
        """


@dataclasses.dataclass(frozen=True)
class Views(PseudoLabels):
    """Labels of a weak view, dropout's alone, for a strong view of the same rows: tokens masked, deleted and swapped, and dropout."""

    masked: float = 0.1  # share of the strong view's tokens that become the mask token; random ones where the model has none
    deleted: float = 0.1  # share of them that is taken out; the loss leaves out the tags of such words
    swapped: float = 0.1  # share of them that changes place with a neighbour, its tag with it
    mask_token_id: int = RANDOM  # -1: the tokenizer's mask token
    special_token_ids: tuple[int, ...] = ()  # tokens that stay; empty: the tokenizer's special ones

    def __post_init__(self) -> None:
        super().__post_init__()
        View(self.masked, self.deleted, self.swapped)  # refuses what is no share

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> Objective:
        """Returns the objective with the tokenizer's special tokens; raises `UserError` for a mask token that the model hasn't."""
        super().fitted(task, model, tokenizer)
        check_token("mask_token_id", self.mask_token_id, model)
        given = tokenizer.mask_token_id if self.mask_token_id == RANDOM else self.mask_token_id
        special = self.special_token_ids or tuple(sorted(special_ids(tokenizer) - {_word_unknown(tokenizer)}))
        return dataclasses.replace(self, mask_token_id=RANDOM if given is None else int(given), special_token_ids=special)

    def student(self, step: Step, trainable: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs for the strong view."""
        config: Any = step.model.config
        alone = step.task.model_task == "sequence_classification"
        view = View(self.masked, self.deleted, self.swapped, self.mask_token_id, self.special_token_ids, config.vocab_size, alone)
        seen, kept = strong(step.rngs["objective"], batch, view)
        return outputs(step, step.params(trainable), seen, dropout(step, 1)), kept.reshape(-1)


def _word_unknown(tokenizer: Any) -> int | None:
    """The token in the place of words that the tokenizer lacks: text as others are, unless it has another part too, as GPT-2's."""
    others = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "sep", "cls"))
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def figures(model: Any, teacher: jax.Array, used: jax.Array, batch: Batch) -> Logged:
    """Returns what is told of labels: the share that is taken, of all slots and by class; and how many of those taken are right.

    Args:
      model: of it the names of the classes.
      teacher: (slots, classes), whose likeliest class is the label.
      used: (slots,) float32, what each counts in the loss.
      batch: weights, (batch, slots), and targets: the hidden labels, or UNKNOWN.
    """
    weights, targets = batch["weights"].reshape(-1), batch["targets"].reshape(-1)
    labels = jnp.argmax(teacher, axis=-1).astype(targets.dtype)
    taken = ((used > 0) & (weights > 0)).astype(jnp.float32)
    known = taken * (targets >= 0).astype(jnp.float32)
    right = (labels == targets).astype(jnp.float32)
    slots = jnp.sum((weights > 0).astype(jnp.float32))
    logged = {USED: (jnp.sum(taken), slots), "pseudo_accuracy": (jnp.sum(known * right), jnp.sum(known))}
    for number, name in enumerate(model.config.labels):
        own = (labels == number).astype(jnp.float32)
        logged[f"{USED}/{name}"] = (jnp.sum(taken * own), slots)
        logged[f"pseudo_accuracy/{name}"] = (jnp.sum(known * own * right), jnp.sum(known * own))
    return logged


def confident(probabilities: jax.Array, threshold: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest class, (slots,) int32, and whether it is at least as likely as the threshold, (slots,) float32."""
    labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    return labels, (jnp.max(probabilities, axis=-1) >= threshold).astype(jnp.float32)
