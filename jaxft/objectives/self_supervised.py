"""Self-supervision: the family's own language modelling on texts without labels, beside the task or before it.

Before it is Gururangan et al. 2020 (arXiv:2004.10964), "don't stop pretraining"; beside it Chronopoulou et al. 2019 (arXiv:1902.10547).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.data.examples import special_ids
from jaxft.data.masking import WORDS, Policy, Replacement, hidden_groups, hidden_slots, replaced
from jaxft.data.unlabelled import NUMBERS, UNLABELLED
from jaxft.errors import UserError
from jaxft.models import heads
from jaxft.models.attention import PADDING
from jaxft.objectives.base import Batch, LanguageHead, Logged, Objective, Step, check_token
from jaxft.objectives.restoration import restored
from jaxft.objectives.unlabelled import CLASSES, WithUnlabelled, dropout
from jaxft.tasks.head import Sums

_OF_THE_TOKENIZER = -1
_MASKED, _RANDOM = 0.8, 0.1  # shares of the hidden tokens that become the mask token, and random ones, as in Devlin et al. 2018


@dataclasses.dataclass(frozen=True)
class SelfSupervised(WithUnlabelled):
    """The loss of telling hidden tokens in an encoder, the next ones in a causal model, of rows without labels.

    The head of words is the family's own, from the model's files; where they have none, it is drawn and trains.

    >>> SelfSupervised(stage=0.5).rate
    0.15
    """

    stage: float = 0.0  # share of the steps, the first ones, that have this loss alone, the others the task's alone; 0: both in all steps
    rate: float = 0.15  # share of an encoder's tokens that is hidden
    mask_token_id: int = _OF_THE_TOKENIZER  # of an encoder: what hidden tokens become; -1: the tokenizer's mask token
    special_token_ids: tuple[int, ...] = ()  # tokens that are never hidden; empty: the tokenizer's special ones
    head_chunk: int = 1024  # tokens whose logits exist at one time

    tasks: ClassVar[tuple[str, ...]] = (*CLASSES, heads.CAUSAL_LM)
    elsewhere: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.stage < 1.0:
            raise UserError(f"objective.stage is a share from 0 up to, not including, 1, not {self.stage}.")
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"objective.rate is a share between 0 and 1, not {self.rate}.")
        if self.head_chunk < 1:
            raise UserError(f"objective.head_chunk is a number of tokens, 1 or more, not {self.head_chunk}.")

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for a task that this isn't for, and for a stage of no step, or of all."""
        super().check(experiment)
        steps = experiment.train.steps
        if self.stage and steps and round(self.stage * steps) in (0, steps):
            raise UserError(
                f"objective.stage={self.stage} of {steps} steps is {round(self.stage * steps)} of them: the run would learn from "
                f"{'labels' if round(self.stage * steps) == 0 else 'texts'} alone. Give another share, or more steps (config.train.steps)."
            )

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> Objective:
        """Returns the objective with the tokenizer's special tokens; raises `UserError` for an encoder's that has no mask token."""
        if heads.is_causal(model):
            return dataclasses.replace(self, mask_token_id=_OF_THE_TOKENIZER)  # it hides nothing
        check_token("mask_token_id", self.mask_token_id, model)
        given = tokenizer.mask_token_id if self.mask_token_id == _OF_THE_TOKENIZER else self.mask_token_id
        if given is None:
            raise UserError("The tokenizer has no mask token. Set it in its files, or give a token's number: objective.mask_token_id.")
        special = self.special_token_ids or tuple(sorted(special_ids(tokenizer)))
        return dataclasses.replace(self, mask_token_id=int(given), special_token_ids=special)

    def leaves(self, model: nn.Module, language_head: LanguageHead) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the head of words where the model hasn't one: that of its files stays as it is, a new one trains."""
        if heads.is_language_model(model):
            return {}, {}
        own, drawn = language_head(model)
        return own, jax.tree.map(lambda _: drawn, own)

    def shared(self, batch: Batch, state: Any, number: jax.Array, steps: int) -> Any:
        """Returns the quotient of the labelled weights and the number of tokens that are told, () float32."""
        others = batch[UNLABELLED]
        hides = self.mask_token_id != _OF_THE_TOKENIZER
        told = self._counts(others).astype(jnp.float32) if hides else _follows(others["segment_ids"])
        return jnp.sum(batch["weights"]) / jnp.maximum(jnp.sum(told), 1.0)

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the task's sums and this loss, both or in turn."""
        labelled = {name: values for name, values in batch.items() if name != UNLABELLED}
        sums = step.supervised(trainable, labelled)
        early = step.number < round(self.stage * step.steps)
        if not self.stage:
            loss, logged = self.added(step, trainable, batch[UNLABELLED], state)
        else:
            shapes = jax.eval_shape(lambda: self.added(step, trainable, batch[UNLABELLED], state))
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            loss, logged = jax.lax.cond(early, lambda: self.added(step, trainable, batch[UNLABELLED], state), lambda: nothing)
        own = sums.loss * (1 - early.astype(jnp.float32)) if self.stage else sums.loss
        return dataclasses.replace(sums, loss=own + self.weight * step.shared * loss), logged

    def added(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[jax.Array, Logged]:
        """Returns the loss, summed over the tokens that are told, and how many are told right."""
        batch = {name: values for name, values in batch.items() if name != NUMBERS}
        seen, targets, weights = self._next(batch) if heads.is_causal(step.model) else self._hidden(step, batch)
        params = step.params(trainable)
        read = step.task.hidden(step.model, params, seen, dropout(step, 0))
        found = restored(step.model, params, read, targets.reshape(-1), weights.reshape(-1), self.head_chunk)
        assert found.correct is not None
        return found.loss, {"unlabelled_loss": (found.nll, found.weight), "words_accuracy": (found.correct, found.weight)}

    def _next(self, batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
        """What a causal model reads, the token after each, and which tokens one of the same example follows."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return {**batch, "scored": places}, jnp.roll(tokens, -1, axis=1), _follows(segments)

    def _hidden(self, step: Step, batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
        """What an encoder reads, and of a row's slots the tokens that were hidden, and which slots hold one."""
        drawing, replacing = (jax.random.fold_in(step.rngs["objective"], number) for number in range(2))
        tokens = batch["tokens"]
        words = {**batch, WORDS: self._free(batch).astype(jnp.int32) * jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)}
        groups = hidden_groups(drawing, words, self._counts(batch), Policy())
        places, real = hidden_slots(groups, int(self.rate * tokens.shape[1]) + 1)
        vocabulary = step.model.config.vocab_size
        shown = replaced(replacing, tokens, groups, Replacement(self.mask_token_id, vocabulary, _MASKED, _RANDOM))
        seen = {**batch, "tokens": shown, "scored": places}
        return seen, jnp.take_along_axis(tokens, places, axis=1), real.astype(jnp.float32)

    def _free(self, batch: Batch) -> jax.Array:
        """Which tokens may be hidden, (..., length) bool."""
        special = jnp.asarray(self.special_token_ids, batch["tokens"].dtype)
        return (batch["segment_ids"] > PADDING) & ~jnp.isin(batch["tokens"], special)

    def _counts(self, batch: Batch) -> jax.Array:
        """How many tokens of each row are hidden, (...,) int32: where there are some, one at least."""
        free = jnp.sum(self._free(batch), axis=-1, dtype=jnp.int32)
        return jnp.clip(jnp.round(self.rate * free.astype(jnp.float32)).astype(jnp.int32), jnp.minimum(free, 1), free)


def _follows(segments: jax.Array) -> jax.Array:
    """1 where a token of the same example follows, (..., length) float32."""
    after = jnp.roll(segments, -1, axis=-1).at[..., -1].set(PADDING)
    return ((segments == after) & (segments != PADDING)).astype(jnp.float32)
