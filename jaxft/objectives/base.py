"""What an objective is: the loss of a step around the task's own, with arrays of its own that a step changes."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.data.examples import Examples
from jaxft.errors import UserError
from jaxft.methods.partition import combine
from jaxft.tasks.head import Sums

OWN = "objective"  # the parameters' branch of an objective's own leaves: in checkpoints, in no export
Batch = Mapping[str, Any]
Logged = dict[str, tuple[jax.Array, jax.Array]]  # name -> (numerator, denominator), float32: added up over a step, divided once


@dataclasses.dataclass(frozen=True)
class Step:
    """What the loss of one micro-batch is made with, beside the trainable leaves and the batch."""

    task: Any
    model: nn.Module
    frozen: Any  # leaves, None where they train
    rngs: Mapping[str, jax.Array]  # dropout, mask, objective; noise where NEFTune is on: this micro-batch's own; run: all steps'
    options: Mapping[str, Any]  # of `task.sums`: neftune_alpha, r_drop
    number: jax.Array  # () int32, optimizer steps done before this one
    steps: int  # of the whole run
    shared: Any = None  # of `Objective.shared`, the same in all micro-batches of a step

    def params(self, trainable: Any) -> Any:
        """Returns the whole model's parameters with these trainable leaves: the step's own, or a teacher's."""
        return combine(trainable, self.frozen)

    def supervised(self, trainable: Any, batch: Batch, **options: Any) -> Sums:
        """Returns the task's own sums over a batch; `options` are more of `task.sums`, as embedding_offset (batch, length, features)."""
        found: Sums = self.task.sums(self.model, self.params(trainable), batch, self.rngs, **self.options, **options)
        return found


# (the model) -> what it lacks of its family's language model, parameters or their shapes; and whether they are drawn, not the files' own
LanguageHead = Callable[[nn.Module], tuple[dict[str, Any], bool]]


class Objective(abc.ABC):
    """An objective: a frozen dataclass of its settings, `config.objective.*`, with pure functions; neither a step nor a task knows which.

    In the order of a run: `check`, `fitted`, `leaves`, `for_training`, `with_answer_end`, `init`; in each step `shared`, `sums`
    (differentiated in the trainable leaves), `update`; after each evaluation `evaluated`. All shapes are static, and nothing is compiled
    twice: what changes over the steps is an array of the state, or follows from `Step.number`.

    Its arrays are `State.objective`: in checkpoints, given up to each step for new ones, and as they were where a step isn't finite.
    """

    observes: ClassVar[bool] = False  # whether `observe` has something to see
    unlabelled: ClassVar[bool] = False  # whether it learns from rows without labels, batch["unlabelled"], and can't do without

    @property
    def answer_room(self) -> int:
        """Tokens left free behind each row without labels, for the task's answer to it."""
        return 0

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for what this objective can't be joined with: a task, a method, settings; before anything is loaded."""
        return None

    def fitted(self, task: Any, model: nn.Module, tokenizer: Any) -> "Objective":
        """Returns the objective with what it needs of model and tokenizer; raises `UserError` where the family hasn't that."""
        return self

    def leaves(self, model: nn.Module, language_head: LanguageHead) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns parameters of its own, and which of them train, of one structure; in a step they are `params["objective"]`.

        They train beside the method's: with the same optimizer, counted, in checkpoints. The model that is measured and exported hasn't
        them.

        Args:
          model: of the task.
          language_head: reads the head of words where it is called.
        """
        return {}, {}

    def for_training(self, task: Any, model: nn.Module, tokenizer: Any, examples: Examples) -> Examples:
        """Returns the training set with what this objective needs beside each token (`Examples.per_token`); `sums` takes it out again."""
        return examples

    def with_answer_end(self, tokenizer: Any, token: int | None) -> "Objective":
        """Returns the objective, told the special token that most training answers end with; None where they end with text."""
        return self

    def plain(self, batch: Batch) -> Batch:
        """Returns a batch as the task alone takes it, without what `for_training` put beside each token."""
        return batch

    def init(self, task: Any, model: nn.Module, trainable: Any) -> Any:
        """Returns the arrays before the first step, a pytree on buffers of its own (a step gives `trainable` up), or None.

        Args:
          task: whose loss it is around.
          model: of it the configuration.
          trainable: float32 leaves, None where a leaf is frozen.
        """
        return None

    def with_slots(self, state: Any, slots: int) -> Any:
        """Returns `init`'s arrays with what remembers something of each slot of the rows without labels, of which there are so many."""
        return state

    def places(self, state: Any, trainable: Any, everywhere: Any) -> Any:
        """Returns the shardings of `init`'s arrays: on every device, where it doesn't say otherwise.

        Args:
          state: the arrays, or their shapes.
          trainable: the shardings of the trainable leaves.
          everywhere: the sharding of what each device has.
        """
        return jax.tree.map(lambda _: everywhere, state)

    def shared(self, batch: Batch, state: Any, number: jax.Array, steps: int) -> Any:
        """Returns what all micro-batches of a step share, made once before them: the denominators of its own losses.

        A step divides its gradient once, by `Sums.weight` of the task. A loss with another denominator is scaled by the quotient of both,
        which therefore follow from the whole batch, never from a micro-batch: so 1 x 32 rows give the gradient of 4 x 8.

        Args:
          batch: of the step, leaves (accumulation, batch, ...).
          state: of `init`.
          number: optimizer steps done.
          steps: of the whole run.
        """
        return None

    @abc.abstractmethod
    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the loss of a micro-batch as sums with the task's weight, and what is logged beside.

        Args:
          step: the rest of what it is made with.
          trainable: the leaves that the gradient is taken in.
          batch: leaves (batch, ...); other rows than the labelled ones stand under a name of their own, as a batch.
          state: of `init`; no gradient flows to it.
        """

    def update(self, state: Any, trainable: Any, logged: Logged, number: jax.Array) -> Any:
        """Returns the arrays after a step, inside it.

        Args:
          state: before it.
          trainable: the leaves after the optimizer's update.
          logged: of `sums`, added up over the step.
          number: optimizer steps done, this one among them.
        """
        return state

    def observe(self, step: Step, trainable: Any, batch: Batch, state: Any) -> dict[str, jax.Array]:
        """Returns what is to see of a few training rows, now and then through a run: arrays by name, of the same shapes each time.

        Arguments are those of `sums`; of random numbers there are those of `objective`.
        """
        return {}

    def pictures(self, looks: Sequence[tuple[int, Mapping[str, np.ndarray]]], batch: Batch, tokenizer: Any) -> dict[str, bytes]:
        """Returns PNGs by their files' names.

        Args:
          looks: the step of each, and what `observe` gave then.
          batch: the rows.
          tokenizer: of their tokens.
        """
        return {}

    def warning(self, state: Any, number: int, steps: int) -> str:
        """Returns what a user should know after so many steps of the run, outside of a step; mostly nothing."""
        return ""

    def evaluated(self, state: Any, metrics: Mapping[str, float]) -> Any:
        """Returns the arrays after an evaluation on validation, outside of a step; of the same shapes and types."""
        return state


def check_token(field: str, number: int, model: Any) -> None:
    """Raises `UserError` for a token's number that the model hasn't; -1 stands for one of the tokenizer's."""
    if not -1 <= number < model.config.vocab_size:
        raise UserError(f"objective.{field} is {number}; the model has {model.config.vocab_size} tokens, from 0.")


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """The task's own loss alone: what a run without an objective has."""

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the task's sums."""
        return step.supervised(trainable, batch), {}


def divided(logged: Logged) -> dict[str, jax.Array]:
    """Returns each figure, 0 where nothing was counted; what is no number but an array is for `Objective.update` alone.

    >>> float(divided({"hidden": (jnp.float32(3), jnp.float32(12))})["hidden"])
    0.25
    """
    return {name: above / jnp.maximum(below, 1e-9) for name, (above, below) in logged.items() if not above.ndim}


def objective_of(experiment: Any) -> Objective:
    """Returns the objective of an experiment, which may have none of its own."""
    found: Objective = experiment.objective or Supervised()
    return found
