"""Pseudo-answers: a causal model learns the answers that it gives itself, where it finds them likely.

Self-training (He et al. 2019, arXiv:1909.13788, for generated texts), in the step: answers are those of the weights of that step.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.unlabelled import NUMBERS, UNLABELLED
from jaxft.errors import UserError
from jaxft.models.heads import CAUSAL_LM
from jaxft.objectives.base import Batch, Logged, Objective, Step
from jaxft.objectives.pseudo_labels import USED, Sure
from jaxft.objectives.unlabelled import dropout

_OF_THE_TOKENIZER = -1


class Answers(NamedTuple):
    """Greedy answers to a batch's prompts, which stand in rows, several one after the other. E prompts a row at most, of A tokens each."""

    tokens: jax.Array  # (batch, length) int32: the rows with the answers in them
    answers: jax.Array  # (batch, E, A) int32
    counted: jax.Array  # (batch, E, A) float32: tokens up to the end, it included
    likelihood: jax.Array  # (batch, E) float32: geometric mean of the tokens' probabilities
    ended: jax.Array  # (batch, E) bool


@dataclasses.dataclass(frozen=True)
class PseudoAnswers(Sure):
    """Negative log-likelihood of the model's own greedy answers to unlabelled prompts, the mean over each answer's tokens and over prompts.

    An answer is used where it ends within `answer_tokens` and the geometric mean of its tokens' probabilities, without dropout, is at
    least `threshold`. Each step passes the prompts `answer_tokens` times forward to answer them.

    >>> PseudoAnswers(answer_tokens=8).threshold
    0.9
    """

    threshold: float = 0.9  # mean probability of a token, the geometric one, from which an answer is used
    answer_tokens: int = 16  # of an answer, its end included, at most
    end_token_id: int = _OF_THE_TOKENIZER  # ends an answer; -1: the tokenizer's eos_token

    tasks: ClassVar[tuple[str, ...]] = (CAUSAL_LM,)
    elsewhere: ClassVar[str] = "For classes there are SelfTraining, FixMatch, FlexMatch, UDA, MeanTeacher and VAT."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_tokens < 1:
            raise UserError(f"objective.answer_tokens is 1 or more, not {self.answer_tokens}.")

    @property
    def answer_room(self) -> int:
        """Tokens left free behind each prompt."""
        return self.answer_tokens

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> Objective:
        """Returns the objective with the tokenizer's end of text; raises `UserError` where it has none."""
        if self.end_token_id != _OF_THE_TOKENIZER:
            return self
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token. Give the number of the one that ends answers: objective.end_token_id.")
        return dataclasses.replace(self, end_token_id=int(tokenizer.eos_token_id))

    def shared(self, batch: Batch, state: Any, number: jax.Array, steps: int) -> Any:
        """Returns the quotient of the labelled weights and the number of prompts."""
        return jnp.sum(batch["weights"]) * self.answer_tokens / jnp.maximum(jnp.sum(batch[UNLABELLED]["weights"]), 1.0)

    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the mean losses of the answers that are used, summed over prompts, and the figures."""
        batch = {name: values for name, values in batch.items() if name != NUMBERS}
        found = answered(step, jax.lax.stop_gradient(step.params(trainable)), batch, self.answer_tokens, self.end_token_id)
        real = self._by_answer(batch["weights"])[:, :, 0]
        used = real * (found.ended & (found.likelihood >= self.threshold)).astype(jnp.float32)
        shares = used[:, :, None] * found.counted / jnp.maximum(jnp.sum(found.counted, axis=-1, keepdims=True), 1.0)
        learned = {
            **batch,
            "tokens": found.tokens,
            "targets": self._by_slot(found.answers, batch),
            "weights": self._by_slot(shares, batch),
        }
        sums = step.task.sums(step.model, step.params(trainable), learned, dropout(step, 1))
        return sums.loss, self._figures(found, used, real, batch) | {"agreement": (sums.correct, sums.weight)}

    def _figures(self, found: Answers, used: jax.Array, real: jax.Array, batch: Batch) -> Logged:
        """The share of answers that is used, and how many of these are the hidden ones, token by token."""
        hidden = self._by_answer(batch["targets"])
        known = used * (hidden[:, :, 0] >= 0).astype(jnp.float32)
        same = jnp.where(found.counted > 0, found.answers == hidden, hidden < 0).all(axis=-1).astype(jnp.float32)
        return {USED: (jnp.sum(used), jnp.sum(real)), "pseudo_accuracy": (jnp.sum(known * same), jnp.sum(known))}

    def _by_answer(self, slots: jax.Array) -> jax.Array:
        """(batch, slots) as (batch, E, A): a row's slots are those of one prompt after the other, then fill."""
        return by_answer(slots, self.answer_tokens)

    @staticmethod
    def _by_slot(answers: jax.Array, batch: Batch) -> jax.Array:
        """(batch, E, A) as (batch, slots), with zeros for fill."""
        flat = answers.reshape(len(answers), -1)
        return jnp.pad(flat, ((0, 0), (0, batch["scored"].shape[1] - flat.shape[1])))


def by_answer(slots: jax.Array, tokens: int) -> jax.Array:
    """Returns (batch, slots) as (batch, E, tokens), E the answers that fit."""
    count = slots.shape[1] // tokens
    return slots[:, : count * tokens].reshape(len(slots), count, tokens)


def answered(step: Step, params: Any, batch: Batch, count: int, end: int) -> Answers:
    """Returns the likeliest next tokens after each prompt, one after the other, without dropout.

    Args:
      step: of it the task and the model.
      params: of the whole model.
      batch: rows in which `count` tokens are free behind each prompt, and `scored` the places that each of them is read at.
      count: A.
      end: the token that ends an answer.
    """
    places, real = by_answer(batch["scored"], count), by_answer(batch["weights"], count)[:, :, 0] > 0
    rows = jnp.arange(len(places))[:, None]
    length = batch["tokens"].shape[1]

    def write(carry: Any, read: jax.Array) -> tuple[Any, Any]:
        tokens, ended = carry
        hidden = step.task.hidden(step.model, params, {**batch, "tokens": tokens, "scored": read}, {})
        made: Any = step.model.apply({"params": params}, hidden, method="logits")
        likelihoods = jax.nn.log_softmax(made.astype(jnp.float32)).reshape(*read.shape, -1)
        new = jnp.argmax(likelihoods, axis=-1).astype(tokens.dtype)
        counted = real & ~ended
        tokens = tokens.at[rows, jnp.where(counted, read + 1, length)].set(new, mode="drop")
        return (tokens, ended | (new == end)), (new, counted.astype(jnp.float32), jnp.max(likelihoods, axis=-1))

    start = (batch["tokens"], jnp.zeros(real.shape, bool))
    (tokens, ended), found = jax.lax.scan(write, start, places.transpose(2, 0, 1))
    answers, counted, likelihoods = (values.transpose(1, 2, 0) for values in found)
    mean = jnp.sum(counted * likelihoods, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1.0)
    return Answers(tokens, answers, counted, jnp.exp(mean), ended & real)
