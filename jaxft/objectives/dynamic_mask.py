"""Dynamic masking: a part of the input is hidden anew at every step; the model does its task with what is left, and restores the rest."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.data.encode import TOKEN_TYPES
from jaxft.data.examples import Examples, noted
from jaxft.data.masking import WORDS, Replacement, hidden_slots, is_hidden, replaced, word_starts
from jaxft.data.tags import PLAIN, kind_of, scheme_of
from jaxft.data.word_numbers import word_numbers
from jaxft.errors import UserError, unknown
from jaxft.models import heads
from jaxft.models.attention import SHARED
from jaxft.models.layers import RECEIVED, received
from jaxft.objectives import policies
from jaxft.objectives.base import Batch, LanguageHead, Logged, Objective, Step, check_token
from jaxft.objectives.policies import COSINE, LINEAR, LOSS, SALIENCE, SCHEDULES, TAGS, VALIDATION, Knowledge
from jaxft.objectives.restoration import reads, restored
from jaxft.tasks.head import Sums, head_sums

_OF_THE_TOKENIZER = -1
GRADIENT, ATTENTION = "gradient", "attention"
_SLOTS_MULTIPLE = 8
_BY_DRAWS = (TAGS, LOSS)  # policies that draw each word by itself: a row may have more than its rate
_ROOM = 2  # times their rate, of what is restored of those
_TINY = 1e-20  # salience of a token that has none: where none has, all are alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """A batch as the model sees it."""

    tokens: jax.Array  # (batch, length) int32
    groups: jax.Array  # (batch, length) int32, of `jaxft.data.masking.hidden_groups`
    words: jax.Array  # (batch, length) int32, 0 where nothing may be hidden
    classes: jax.Array | None  # (batch, length) int32, of each token's word, -1 where it has none; None without tags
    rate: jax.Array  # () float32, of this step


@dataclasses.dataclass(frozen=True)
class DynamicMask(Objective):
    """Task loss on a masked input, the loss of restoring what was hidden, and how far the outputs of masked and whole input are apart.

    The mask is drawn in each step by a policy, at a rate that follows a schedule. For token classification, sequence classification and
    SFT, with any method. Restoration is the masked language modelling of Devlin et al. 2018 (arXiv:1810.04805) beside the task, by the
    family's own head of words; a causal model tells a hidden token from those before it, as in Chen et al. 2024 (arXiv:2403.02178).

    >>> DynamicMask(policy="mix", mix=(("words", 0.5), ("tags", 0.5))).rate
    0.15
    """

    policy: str = "words"  # what is hidden: tokens, words, spans, tags, salience, loss, or a mix
    mix: tuple[tuple[str, float], ...] = ()  # mix: policies with their shares of the rows
    rate: float = 0.15  # share of the tokens that is hidden, at first
    final_rate: float = -1.0  # the same at the end of the schedule; -1: rate
    schedule: str = "constant"  # of the rate: constant, linear, cosine, validation (further at each evaluation that is no better)
    validation_move: float = 0.25  # validation: how far the rate goes on its way then
    entity_rate: float = 0.3  # tags: rate of words in entities, that of others is rate; it follows the schedule in proportion
    static: bool = False  # draw a row's mask alike whenever the row comes, in place of anew in each step: to compare with
    salience: str = "gradient"  # salience: gradient (gradient x input of the task's loss) or attention (that a token gets, by all)
    span_p: float = 0.2  # spans: of the geometric distribution of their lengths in words
    span_max: int = 10  # spans: longest one
    masked: float = 0.8  # share of the hidden words that become the mask token; of a model without one they become random tokens
    random: float = 0.1  # share of the hidden words that become random tokens; the rest stays as it is
    mask_token_id: int = _OF_THE_TOKENIZER  # what hidden tokens become, as a reserved token; -1: the tokenizer's mask token
    restoration: float = 0.1  # weight of the restoration loss; 0: hidden words aren't restored
    consistency: float = 0.0  # weight of the divergence between the outputs of the masked and the whole input
    head_chunk: int = 1024  # hidden tokens whose logits exist at one time

    observes: ClassVar[bool] = True

    # ------------------------------------------------------------ settings

    def __post_init__(self) -> None:
        policies.check_policy(self.policy, self.mix)
        if self.schedule not in SCHEDULES:
            raise unknown("objective.schedule", self.schedule, SCHEDULES)
        if self.salience not in (GRADIENT, ATTENTION):
            raise unknown("objective.salience", self.salience, (GRADIENT, ATTENTION))
        for name in ("rate", "entity_rate", "validation_move"):
            if not 0.0 < (value := getattr(self, name)) <= 1.0:
                raise UserError(f"objective.{name} is a share above 0 and up to 1, not {value}.")
        if self.final_rate != -1.0 and not 0.0 <= self.final_rate <= 1.0:
            raise UserError(f"objective.final_rate is a share from 0 to 1, or -1 for that of objective.rate, not {self.final_rate}.")
        if (self.final_rate != -1.0) != (self.schedule in (LINEAR, COSINE, VALIDATION)):
            raise UserError("objective.final_rate is where objective.schedule=linear, cosine or validation ends: give both, or neither.")
        if min(self.masked, self.random) < 0.0 or self.masked + self.random > 1.0:
            raise UserError(f"objective.masked and .random are shares with a sum of 1 or less, not {self.masked} and {self.random}.")
        for name in ("restoration", "consistency"):
            if getattr(self, name) < 0.0:
                raise UserError(f"objective.{name} is a weight of 0 or more, not {getattr(self, name)}.")
        if self.mask_token_id < _OF_THE_TOKENIZER:
            raise UserError(f"objective.mask_token_id is a token's number, or -1 for the tokenizer's mask token, not {self.mask_token_id}.")
        if self.head_chunk < 1:
            raise UserError(f"objective.head_chunk is a number of tokens, 1 or more, not {self.head_chunk}.")
        if not 0.0 < self.span_p < 1.0:
            raise UserError(f"objective.span_p is a probability between 0 and 1, not {self.span_p}.")
        if self.span_max < 1:
            raise UserError(f"objective.span_max is a number of words, 1 or more, not {self.span_max}.")

    @property
    def _used(self) -> set[str]:
        return policies.parts(self.policy, self.mix)

    def check(self, experiment: Any) -> None:
        """Raises `UserError` for a task that has no words to hide, or hides them itself, and for what does the same in another way."""
        task, train = type(experiment.task).__name__, experiment.train
        if task not in ("SFT", "SequenceClassification", "TokenClassification"):
            raise UserError(
                f"DynamicMask is for token classification, sequence classification and SFT, not for {task}. Leave config.objective out."
            )
        if TAGS in self._used and task != "TokenClassification":
            raise UserError(f"objective.policy=tags hides words by their tags, which the rows of {task} have not. Choose another.")
        if train.r_drop:
            raise UserError("train.r_drop compares two passes, and so does objective.consistency: leave train.r_drop out.")
        if self.schedule != VALIDATION:
            return
        if not train.eval_every:
            raise UserError("objective.schedule=validation follows the evaluations during training: set train.eval_every too.")
        if 0 < train.steps <= train.eval_every:
            raise UserError(
                "objective.schedule=validation follows the evaluations during training, and there is none before the end: train.eval_every "
                f"is {train.eval_every}, train.steps {train.steps}. Lower train.eval_every."
            )
        if not (experiment.data.validation or experiment.data.split[1] or experiment.data.folds):
            raise UserError(
                "objective.schedule=validation needs a validation set: config.data.validation, or a share of config.data.split."
            )

    def fitted(self, task: Any, model: Any, tokenizer: Any) -> "DynamicMask":
        """Returns the objective with the tokenizer's mask token; raises `UserError` for an encoder's that has none, and plain tags."""
        if TAGS in self._used and scheme_of(model.config.labels, task.scheme) == PLAIN:
            raise UserError("objective.policy=tags parts entities from other words, and these tags mark none. Choose another policy.")
        check_token("mask_token_id", self.mask_token_id, model)
        if self.mask_token_id != _OF_THE_TOKENIZER or not self.masked:
            return self
        if tokenizer.mask_token_id is not None:
            return dataclasses.replace(self, mask_token_id=int(tokenizer.mask_token_id))
        if not heads.is_causal(model):
            raise UserError("The tokenizer has no mask token. Set it in its files, or give a token's number: objective.mask_token_id.")
        return dataclasses.replace(self, masked=0.0, random=self.masked + self.random)

    def leaves(self, model: nn.Module, language_head: LanguageHead) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the head of words where the model hasn't one: that of its files stays as it is, a new one trains."""
        if not self.restoration or heads.is_language_model(model):
            return {}, {}
        own, drawn = language_head(model)
        return own, jax.tree.map(lambda _: drawn, own)

    def for_training(self, task: Any, model: nn.Module, tokenizer: Any, examples: Examples) -> Examples:
        """Returns the training set with the number of each token's word."""
        words = word_numbers(examples, tokenizer)
        if not words.any():
            raise UserError("DynamicMask may hide no token of the training rows: all are special ones, or a chat template's.")
        return noted(examples, {WORDS: words})

    def plain(self, batch: Batch) -> Batch:
        """Returns a batch without the numbers of words."""
        return _plain(batch)

    # ------------------------------------------------------------ state

    def init(self, task: Any, model: nn.Module, trainable: Any) -> Any:
        """Returns what the schedule by validation remembers, else None."""
        return {"moved": jnp.float32(0), "best": jnp.float32(jnp.inf)} if self.schedule == VALIDATION else None

    def evaluated(self, state: Any, metrics: Mapping[str, float]) -> Any:
        """Returns the schedule's state after an evaluation."""
        moved, best = policies.validated(state["moved"], state["best"], metrics["loss"], self.validation_move)
        return {"moved": moved, "best": best}

    def _rate(self, state: Any, number: jax.Array, steps: int) -> jax.Array:
        """The rate of a step, () float32."""
        last = self.rate if self.final_rate == -1.0 else self.final_rate
        done = policies.progress(self.schedule, number, steps, state["moved"] if self.schedule == VALIDATION else jnp.float32(0))
        return self.rate + done * (last - self.rate)

    def _entity_rate(self, rate: jax.Array) -> jax.Array:
        return jnp.minimum(rate * (self.entity_rate / self.rate), 1.0)

    # ------------------------------------------------------------ a step

    def shared(self, batch: Batch, state: Any, number: jax.Array, steps: int) -> dict[str, jax.Array]:
        """Returns the task's weight in a step over the tokens that the policy is to hide in it, one at least: the restoration's scale."""
        rate = self._rate(state, number, steps)
        may = (batch[WORDS] > 0) & (batch["segment_ids"] > 0)
        asked = rate * jnp.sum(may).astype(jnp.float32)
        return {"scale": jnp.sum(batch["weights"]) / jnp.maximum(asked, 1.0)}

    def mask(self, step: Step, trainable: Any, batch: Batch, state: Any) -> Masked:
        """Returns a micro-batch as the model sees it; no gradient flows through the draw.

        Args:
          step: as of `sums`.
          trainable: the same.
          batch: the same.
          state: the same.
        """
        words = jnp.where(batch["segment_ids"] > 0, batch[WORDS], 0)  # a prefix that examples share is hidden for none of them
        seen = {**batch, WORDS: words}
        rate, drawn = self._rate(state, step.number, step.steps), step.rngs["run" if self.static else "objective"]
        params = jax.lax.stop_gradient(step.params(trainable))
        classes = _classes(seen) if step.model.task == heads.TOKEN_CLASSIFICATION else None
        known = Knowledge(
            rate,
            self._entity_rate(rate),
            None if classes is None else _entities(step)[classes],
            _SALIENCE[self.salience](step, params, batch) if SALIENCE in self._used else None,
            _certainty(step, params, seen) if LOSS in self._used else None,
        )
        policy = policies.make_policy(self.policy, self.mix, self.span_p, self.span_max)
        groups = policy(jax.random.fold_in(drawn, 0), seen, known)
        replacement = Replacement(self.mask_token_id, step.model.config.vocab_size, self.masked, self.random)
        tokens = replaced(jax.random.fold_in(drawn, 1), batch["tokens"], groups, replacement)
        return Masked(tokens, groups, words, classes, rate)

    def sums(self, step: Step, trainable: Any, batch: Batch, state: Any) -> tuple[Sums, Logged]:
        """Returns the task's sums on the masked input, with restoration and consistency in the loss, and what was hidden and restored."""
        found = self.mask(step, trainable, batch, state)
        whole = _plain(batch)
        logged: Logged = {"mask_rate": (found.rate, jnp.float32(1))} | _shares(step, found)
        read, restoring = self._slots(step, found, batch) if self.restoration else (None, None)
        hidden, of_words = _features(step, trainable, {**whole, "tokens": found.tokens}, read)
        sums, apart = self._task(step, trainable, hidden, whole)
        if self.consistency:
            logged["consistency"] = (apart, sums.weight)
        if restoring is not None:
            told = restored(step.model, step.params(trainable), of_words, *restoring, self.head_chunk)
            assert told.correct is not None
            sums = dataclasses.replace(sums, loss=sums.loss + self.restoration * step.shared["scale"] * told.loss)
            logged |= {"restoration_loss": (told.nll, told.weight), "restoration_accuracy": (told.correct, told.weight)}
        return sums, logged

    def observe(self, step: Step, trainable: Any, batch: Batch, state: Any) -> dict[str, jax.Array]:
        """Returns which tokens are hidden, and which are of entities, (rows, length) bool each."""
        found = self.mask(step, trainable, batch, state)
        entities = jnp.zeros(found.words.shape, bool) if found.classes is None else _entities(step)[found.classes]
        return {"hidden": is_hidden(found.groups), "entities": entities}

    def pictures(self, looks: Sequence[tuple[int, Mapping[str, np.ndarray]]], batch: Batch, tokenizer: Any) -> dict[str, bytes]:
        """Returns the masks of a part of each row's first example: around its first entity, or from its first word on."""
        from jaxft.objectives import mask_pictures  # matplotlib: half a second that a mistyped flag needn't wait for

        sentences, hidden = [], np.stack([found["hidden"] for _, found in looks])
        for row, (tokens, segments, words) in enumerate(zip(batch["tokens"], batch["segment_ids"], batch[WORDS], strict=True)):
            may = np.flatnonzero((segments == 1) & (words > 0))
            if not len(may):
                continue
            entities = looks[0][1]["entities"][row] & (segments == 1)
            first = max(int(entities.argmax()) - mask_pictures.WIDEST // 3, may[0]) if entities.any() else may[0]
            part = slice(first, min(may[-1] + 1, first + mask_pictures.WIDEST))
            hidden[:, row, : part.stop - part.start] = hidden[:, row, part]
            texts = [tokenizer.decode([token]).strip() for token in tokens[part].tolist()]
            sentences.append((row, texts, entities[part].tolist()))
        return {"masks.png": mask_pictures.picture([step for step, _ in looks], hidden, sentences)} if sentences else {}

    def _slots(self, step: Step, found: Masked, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Where hidden tokens are told from, (batch, slots), and the tokens and their weights, (batch * slots,) each."""
        places, real = hidden_slots(found.groups, self.slots(batch["tokens"].shape[1]))
        read, can = reads(step.model, batch["segment_ids"], places)
        targets = jnp.take_along_axis(batch["tokens"], places, axis=1)
        return read, (targets.reshape(-1), (real & can).astype(jnp.float32).reshape(-1))

    def slots(self, length: int) -> int:
        """Returns how many hidden tokens of a row are restored at most: all, but for policies that draw each word by itself twice as many
        as they hide in the mean.

        >>> DynamicMask(rate=0.1).slots(128), DynamicMask(rate=0.1, policy="tags", entity_rate=0.2).slots(128)
        (16, 56)
        """
        most = max(self.rate, self.final_rate)
        if TAGS in self._used:
            most = max(most, self.entity_rate * most / self.rate)
        room = _ROOM if self._used & set(_BY_DRAWS) else 1
        count = min(int(np.ceil(room * most * length)), length)
        return min(-(-count // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE, length)

    def _task(self, step: Step, trainable: Any, hidden: jax.Array, whole: Batch) -> tuple[Sums, jax.Array]:
        """The task's sums, consistency in the loss, and the divergences' sum."""
        task, model, params = step.task, step.model, step.params(trainable)
        passes = [hidden]
        if self.consistency:
            rngs = {name: jax.random.fold_in(key, 2) for name, key in step.rngs.items()}
            passes.append(jax.lax.stop_gradient(task.hidden(model, params, whole, rngs, **step.options)))

        def loss(logits: Any, targets: jax.Array, weights: jax.Array) -> tuple[Sums, jax.Array]:
            outputs = [task.outputs(model, one, whole) for one in logits]
            found = task.loss(model, outputs[0], targets, weights)
            if not self.consistency:
                return found, jnp.float32(0)
            apart = jnp.sum(task.divergence(model, outputs[0], jax.lax.stop_gradient(outputs[1])) * weights)
            return dataclasses.replace(found, loss=found.loss + self.consistency * apart), apart

        targets, weights = whole["targets"].reshape(-1, *whole["targets"].shape[2:]), whole["weights"].reshape(-1)
        return head_sums(model, params, passes, targets, weights, loss, task.chunk, step.rngs)


def _plain(batch: Batch) -> Batch:
    return {name: values for name, values in batch.items() if name != WORDS}


def _features(step: Step, trainable: Any, batch: Batch, read: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """What the task's head reads, (batch * slots, features), and what the head of words reads at `read`: of one pass."""
    scored = batch["scored"]
    both = scored if read is None else jnp.concatenate([scored, read], axis=1)
    found = step.task.hidden(step.model, step.params(trainable), {**batch, "scored": both}, step.rngs, **step.options)
    found = found.reshape(*both.shape, -1)
    first, second = jnp.split(found, [scored.shape[1]], axis=1)
    return first.reshape(-1, found.shape[-1]), second.reshape(-1, found.shape[-1])


# ---------------------------------------------------------------- what policies know


def _at_words(batch: Batch, places: jax.Array, values: jax.Array, missing: float) -> jax.Array:
    """The value of each token's word, (batch, length): that of the slot at its first token; `missing` where there is none."""

    def row(segments: jax.Array, words: jax.Array, places: jax.Array, values: jax.Array, real: jax.Array) -> jax.Array:
        length = len(segments)
        at = jnp.full(length, missing, values.dtype).at[jnp.where(real, places, length)].set(values, mode="drop")
        return jnp.where(words > 0, at[word_starts(segments, words)], jnp.asarray(missing, values.dtype))

    return jax.vmap(row)(batch["segment_ids"], batch[WORDS], places, values, batch["weights"] > 0)


def _classes(batch: Batch) -> jax.Array:
    """The class of each token's word, (batch, length) int32; -1 where it has none: special tokens, words that another window scores."""
    return _at_words(batch, batch["scored"], batch["targets"], -1)


def _kinds(step: Step) -> list[str | None]:
    """The type of the entity that each class is of, None where it is of none."""
    labels = step.model.config.labels
    return [kind_of(label, scheme_of(labels, step.task.scheme)) for label in labels]


def _entities(step: Step) -> jax.Array:
    """Which classes are of entities, (classes + 1,) bool: the last one stands for none."""
    return jnp.asarray([kind is not None for kind in _kinds(step)] + [False])


def _by_gradient(step: Step, params: Any, batch: Batch) -> jax.Array:
    """How much the task's loss leans on each token, (batch, length) float32: the size of gradient x input at its embedding, on the whole
    input without dropout (Simonyan et al. 2013, arXiv:1312.6034; Shrikumar et al. 2016, arXiv:1605.01713).
    """
    whole = _plain(batch)
    embedded: Any = step.model.apply({"params": params}, batch["tokens"], method=lambda module, tokens: module.embed(tokens))
    embedded = embedded.astype(jnp.float32)

    def loss(offset: jax.Array) -> jax.Array:
        found: Sums = step.task.sums(step.model, params, whole, {}, embedding_offset=offset)
        return found.loss

    return jnp.abs(jnp.sum(jax.grad(loss)(jnp.zeros_like(embedded)) * embedded, axis=-1)) + _TINY


def _by_attention(step: Step, params: Any, batch: Batch) -> jax.Array:
    """How much attention each token gets, (batch, length) float32: the sum over the tokens that see it, the mean over heads and layers; on
    the whole input without dropout.
    """

    def features(model: Any) -> jax.Array:
        found: jax.Array = model.features(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], **kinds)
        return found

    kinds = {TOKEN_TYPES: batch[TOKEN_TYPES]} if TOKEN_TYPES in batch else {}
    _, collections = step.model.apply({"params": params}, method=features, mutable=[RECEIVED])
    return received(collections, batch["tokens"].shape[1]) + _TINY


_SALIENCE = {GRADIENT: _by_gradient, ATTENTION: _by_attention}


def _certainty(step: Step, params: Any, batch: Batch) -> jax.Array:
    """How likely the model finds what is true at each token's word, (batch, length) float32, on the whole input without dropout: exp(-loss)
    of the word's own slot, else the mean of its example's.
    """
    task, model = step.task, step.model
    whole = _plain(batch)
    hidden, slots = task.hidden(model, params, whole, {}), batch["scored"].shape

    def one(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits: Any = model.apply({"params": params}, given[0][None], method="logits")
        found: Sums = task.loss(model, logits, given[1][None], jnp.ones(1))
        return jnp.exp(-found.nll)

    targets = batch["targets"].reshape(-1, *batch["targets"].shape[2:])
    sure = jax.lax.map(one, (hidden, targets), batch_size=task.chunk or len(hidden)).reshape(slots)
    places = _told(batch) if heads.is_language_model(model) else batch["scored"]
    own = _at_words(batch, places, sure, -1.0)

    def mean(segments: jax.Array, places: jax.Array, sure: jax.Array, real: jax.Array) -> jax.Array:
        known = places < len(segments)
        of, weight = jnp.maximum(segments[jnp.where(known, places, 0)], 0), (real & known).astype(jnp.float32)
        total, count = (jnp.zeros(len(segments) + 1).at[of].add(part) for part in (sure * weight, weight))
        return jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)[jnp.maximum(segments, 0)]

    return jnp.where(own >= 0, own, jax.vmap(mean)(batch["segment_ids"], places, sure, batch["weights"] > 0))


def _told(batch: Batch) -> jax.Array:
    """The place of the token that each slot of a language model tells, (batch, slots) int32: the one behind; `length` where it isn't known.

    Behind the last token of a shared prefix stands the first one of each of the row's examples: that of the slot's own example is where its
    next slot reads, which has the token that this one tells.
    """
    scored, tokens, segments = batch["scored"], batch["tokens"], batch["segment_ids"]
    length = tokens.shape[1]
    behind = jnp.minimum(scored + 1, length - 1)
    ends_prefix = (_at(segments, scored) == SHARED) & (_at(segments, behind) != SHARED)
    after = jnp.roll(scored, -1, axis=1)
    follows = jnp.roll(batch["weights"] > 0, -1, axis=1).at[:, -1].set(False) & (_at(segments, after) != SHARED)
    first = jnp.where(follows & (_at(tokens, after) == batch["targets"]), after, length)
    return jnp.where(ends_prefix, first, scored + 1)


def _at(values: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, places, axis=1)


def _shares(step: Step, found: Masked) -> Logged:
    """The share hidden of what may be, and by the kind of the word's tag: entities by their type, O for the others."""
    hidden, may = is_hidden(found.groups), found.words > 0

    def share(of: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(hidden & of).astype(jnp.float32), jnp.sum(may & of).astype(jnp.float32)

    logged = {"hidden": share(may)}
    if found.classes is None:
        return logged
    names = [kind or label for kind, label in zip(_kinds(step), step.model.config.labels, strict=True)]
    for name in dict.fromkeys(names):
        of = jnp.asarray([other == name for other in names] + [False])
        logged[f"hidden_{name}"] = share(of[found.classes])
    return logged
