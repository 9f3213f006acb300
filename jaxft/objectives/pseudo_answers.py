"""Pseudo-answers: a causal model learns the answers that it gives itself, where it finds them likely.

Self-training (He et al. 2019, arXiv:1909.13788, for generated texts), in the step: answers are those of the weights of that step.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.unlabelled import NUMBERS, UNLABELLED
from jaxft.errors import UserError
from jaxft.models.attention import PADDING
from jaxft.models.heads import CAUSAL_LM
from jaxft.models.node import prepared
from jaxft.objectives.base import Batch, Logged, Objective, Step, check_token
from jaxft.objectives.pseudo_labels import USED, Sure
from jaxft.objectives.unlabelled import dropout
from jaxft.tasks.head import gather

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
    least `threshold`.

    >>> PseudoAnswers(answer_tokens=8).threshold
    0.9
    """

    threshold: float = 0.9  # mean probability of a token, the geometric one, from which an answer is used
    answer_tokens: int = 16  # of an answer, its end included, at most
    end_token_id: int = _OF_THE_TOKENIZER  # ends an answer; -1: what ends those trained on, or the tokenizer's eos_token

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
        """Returns the objective; raises `UserError` for an end of answers that the model lacks."""
        check_token("end_token_id", self.end_token_id, model)
        return self

    def with_answer_end(self, tokenizer: Any, token: int | None) -> Objective:
        """Returns the objective with what ends the answers trained on, or a text; raises `UserError` where neither is known."""
        if self.end_token_id != _OF_THE_TOKENIZER:
            return self
        if (end := tokenizer.eos_token_id if token is None else token) is None:
            raise UserError("The tokenizer has no end-of-text token. Give the number of the one that ends answers: objective.end_token_id.")
        return dataclasses.replace(self, end_token_id=int(end))

    def unsure(self, number: int) -> str:
        """Returns that no answer was used so far."""
        return (
            f"in {number} steps no answer of the model's was used: none ended within config.objective.answer_tokens={self.answer_tokens} "
            f"and was as likely as config.objective.threshold={self.threshold}: {self.meanwhile}. Raise the one where answers are longer, "
            "lower the other, or give it more steps on labels."
        )

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
        told = {"agreement": (sums.correct, sums.weight), "unlabelled_loss": (sums.loss, jnp.sum(real))}
        return sums.loss, self._figures(found, used, real, batch) | told

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
    """Returns the likeliest next tokens after each prompt, one after the other, without dropout: a pass over the prompts, then as many
    over one token of each, keys and values kept.

    Args:
      step: of it the model.
      params: of the whole model.
      batch: rows in which `count` tokens are free behind each prompt, and `scored` the places that each of them is read at.
      count: A.
      end: the token that ends an answer.
    """
    model, variables = step.model, {"params": prepared(params)}
    places, real = by_answer(batch["scored"], count), by_answer(batch["weights"], count)[:, :, 0] > 0
    answers, (size, length) = places.shape[1], batch["tokens"].shape
    rows = jnp.arange(size)[:, None]
    last = places[:, :, 0]  # of each prompt
    written = jnp.where(real[:, :, None], places + 1, length).reshape(size, -1)  # length: nowhere
    segments = batch["segment_ids"].at[rows, written].set(PADDING, mode="drop")
    own, position = (jnp.take_along_axis(batch[name], last, axis=1) for name in ("segment_ids", "positions"))
    cache: Any = model.apply(variables, size, length + count * answers, method="new_cache")
    before = jnp.sum(cache.segments != PADDING, axis=1, keepdims=True, dtype=jnp.int32)  # virtual tokens of a prefix or a prompt

    def forward(tokens: jax.Array, segments: jax.Array, positions: jax.Array, cache: Any, read: jax.Array) -> tuple[jax.Array, Any]:
        out: Any = model.apply(variables, tokens, segment_ids=segments, positions=positions + before, cache=cache)
        made: Any = model.apply(variables, gather(out.hidden_states[-1], read), method="logits")
        return jax.nn.log_softmax(made.astype(jnp.float32)).reshape(size, answers, -1), out.cache

    def write(carry: Any, number: jax.Array) -> tuple[Any, Any]:
        likelihoods, cache, tokens, ended = carry
        new = jnp.argmax(likelihoods, axis=-1).astype(tokens.dtype)
        counted = real & ~ended
        tokens = tokens.at[rows, jnp.where(counted, last + 1 + number, length)].set(new, mode="drop")
        found = (new, counted.astype(jnp.float32), jnp.max(likelihoods, axis=-1))
        every = jnp.broadcast_to(jnp.arange(answers), last.shape)
        after, cache = forward(new, jnp.where(real, own, PADDING), position + 1 + number, cache, every)
        return (after, cache, tokens, ended | (new == end)), found

    start = forward(batch["tokens"], segments, batch["positions"], cache, last)
    carry = (*start, batch["tokens"], jnp.zeros(real.shape, bool))
    (_, _, tokens, ended), made = jax.lax.scan(write, carry, jnp.arange(count, dtype=jnp.int32))
    written_tokens, counted, likelihoods = (values.transpose(1, 2, 0) for values in made)
    mean = jnp.sum(counted * likelihoods, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1.0)
    return Answers(tokens, written_tokens, counted, jnp.exp(mean), ended & real)
