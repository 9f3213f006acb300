"""Masked language modelling: hidden tokens, told from what is left on both sides."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.examples import Examples, Labelled, Slots
from jaxft.data.masking import WORDS, Policy, Replacement, hidden_groups, hidden_slots, replaced
from jaxft.data.pieces import pieces
from jaxft.data.rows import Rows
from jaxft.data.texts import texts_of
from jaxft.errors import UserError
from jaxft.tasks.base import Batch, Task
from jaxft.tasks.head import Sums, check_head_chunk, cross_entropy, language_scores

MASK = "mask"  # the purpose of the key that hides tokens
_OF_THE_TOKENIZER = -1
_TEXTS = 64  # hidden at one time, for evaluation
_SHORTEST = 16  # tokens: texts up to there are filled to one length, longer ones to the next power of two


@dataclasses.dataclass(frozen=True)
class MaskedLM(Task):
    """Cross-entropy of hidden tokens, drawn anew in every step, on texts alone (Devlin et al. 2018, arXiv:1810.04805).

    Rows have a text: `config.data.text`. One that is longer than `config.data.max_length` becomes several examples. Special tokens are
    never hidden. A hidden word or span is masked, made random or kept as a whole (Joshi et al. 2020, arXiv:1907.10529). What is hidden
    in evaluation is the same every time.

    >>> MaskedLM(whole_words=True).rate
    0.15
    """

    rate: float = 0.15  # share of the tokens that is hidden
    masked: float = 0.8  # share of the hidden ones that become the mask token
    random: float = 0.1  # share of the hidden ones that become random tokens; the rest stays as it is
    whole_words: bool = False  # hides all tokens of a word, or none
    spans: bool = False  # hides neighbouring tokens, or words where whole_words is on
    span_p: float = 0.2  # of the geometric distribution of the spans' lengths
    span_max: int = 10  # longest span, in tokens or words
    evaluation_seed: int = 0  # of what is hidden in evaluation
    mask_token_id: int = _OF_THE_TOKENIZER  # what hidden tokens become; -1: the tokenizer's mask token
    new_head: bool = False  # draws the head where the model's files have none, and trains it with any method
    head_chunk: int = 1024  # hidden tokens whose logits exist at one time

    model_task: ClassVar[str] = "masked_lm"
    data_fields: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"task.rate is a share between 0 and 1, not {self.rate}.")
        if min(self.masked, self.random) < 0.0 or self.masked + self.random > 1.0:
            raise UserError(f"task.masked and task.random are shares with a sum of 1 or less, not {self.masked} and {self.random}.")
        check_head_chunk(self.head_chunk)
        if self.mask_token_id < _OF_THE_TOKENIZER:
            raise UserError(f"task.mask_token_id is a token's number, or -1 for the tokenizer's mask token, not {self.mask_token_id}.")
        self.policy  # noqa: B018  # refuses what it can't be made of

    @property
    def policy(self) -> Policy:
        """What is hidden together."""
        return Policy(self.whole_words, self.spans, self.span_p, self.span_max)

    @property
    def chunk(self) -> int:  # type: ignore[override]  # a setting here
        """Hidden tokens whose logits exist at one time."""
        return self.head_chunk

    def tokenized(self, tokenizer: Any) -> "MaskedLM":
        """Returns the task with the tokenizer's mask token; raises `UserError` where it has none."""
        if self.mask_token_id != _OF_THE_TOKENIZER:
            return self
        if tokenizer.mask_token_id is None:
            raise UserError("The tokenizer has no mask token. Set it in its files, or give a token's number: --config.task.mask_token_id.")
        return dataclasses.replace(self, mask_token_id=int(tokenizer.mask_token_id))

    def model_options(self, rows: Rows, data: DataConfig) -> dict[str, Any]:
        """Returns whether `load_pretrained` may draw the head."""
        return {"new_head": True} if self.new_head else {}

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Labelled:
        """Returns a set's texts as tokens, with as many slots as tokens are hidden: which ones they are is drawn in each step."""
        if self.mask_token_id >= (vocabulary := model.config.vocab_size):
            raise UserError(f"task.mask_token_id is {self.mask_token_id}; the model has {vocabulary} tokens, 0 to {vocabulary - 1}.")
        found = pieces(texts_of(rows, data), tokenizer, data.max_length, [rows.place(i) for i in range(len(rows))])
        tokens, words = np.concatenate([one.tokens for one in found]), np.concatenate([one.words for one in found])
        reads = [np.flatnonzero(one.words)[: self._count(one.words)] for one in found]
        offsets = np.cumsum([0, *(len(one.tokens) for one in found)], dtype=np.int64)
        slots = np.cumsum([0, *map(len, reads)], dtype=np.int64)
        if not slots[-1]:
            raise UserError(f"{rows.name}: the tokenizer knows no token of its texts. Is it the model's own?")
        places = np.concatenate(reads)
        targets = tokens[places + np.repeat(offsets[:-1], np.diff(slots))]
        held = Slots(slots, places.astype(np.int32), targets, np.ones(len(places), np.float32))
        return Labelled(tokens, offsets, np.zeros(len(found), np.int32), held, np.asarray([one.row for one in found]), {WORDS: words})

    def _count(self, words: np.ndarray) -> int:
        """How many tokens of an example are hidden; where there is one, at least one."""
        return min(max(round(self.rate * int((words > 0).sum())), 1), int((words > 0).sum()))

    def for_evaluation(self, model: nn.Module, examples: Examples, chosen: np.ndarray) -> Labelled:
        """Returns the examples with some tokens hidden, by the tokens of each and `evaluation_seed` alone, and the slots where they are."""
        assert isinstance(examples, Labelled)
        tokens, places = examples.tokens.copy(), [np.zeros(0, np.int64)] * len(examples)
        for numbers, batch in _by_length(examples, chosen):
            seen = jax.device_get(_hidden(self, model, dict(batch)))
            for b, i in enumerate(numbers):
                tokens[examples.offsets[i] : examples.offsets[i + 1]] = seen["tokens"][b, : examples.lengths[i]]
                places[i] = seen["scored"][b][seen["weights"][b] > 0]
        offsets = np.cumsum([0, *map(len, places)], dtype=np.int64)
        reads = np.concatenate(places).astype(np.int32)
        targets = examples.tokens[reads + np.repeat(examples.offsets[:-1], np.diff(offsets))]
        slots = Slots(offsets, reads, targets, np.ones(len(reads), np.float32))
        return dataclasses.replace(examples, tokens=tokens, labelled=slots, beside={})

    def hide(self, model: nn.Module, batch: Batch, rng: jax.Array) -> Batch:
        """Returns the batch as the model sees it: some tokens hidden, and the slots where they are.

        Args:
          model: of it the vocabulary.
          batch: of `examples`; the weights of a row's slots add up to the tokens that are hidden in it.
          rng: a key.
        """
        if self.mask_token_id == _OF_THE_TOKENIZER:
            raise UserError("The mask token isn't known yet: task.tokenized(tokenizer), or set task.mask_token_id.")
        which, what = jax.random.split(rng)
        tokens, counts = batch["tokens"], jnp.sum(batch["weights"], axis=1).astype(jnp.int32)
        groups = hidden_groups(which, batch, counts, self.policy)
        places, real = hidden_slots(groups, batch["scored"].shape[1])
        replacement = Replacement(self.mask_token_id, model.config.vocab_size, self.masked, self.random)
        return {name: values for name, values in batch.items() if name != WORDS} | {
            "tokens": replaced(what, tokens, groups, replacement),
            "scored": places,
            "targets": jnp.take_along_axis(tokens, places, axis=1),
            "weights": real.astype(jnp.float32),
        }

    def sums(self, model: nn.Module, params: Any, batch: Batch, rngs: Mapping[str, jax.Array], r_drop: float = 0.0, **options: Any) -> Sums:
        """Returns the sums over hidden tokens; they are drawn from the key `mask`, without it always the same; in a batch of
        `for_evaluation` they are hidden already.
        """
        key = rngs.get(MASK, jax.random.key(self.evaluation_seed))
        others = {name: value for name, value in rngs.items() if name != MASK}
        return super().sums(model, params, self.hide(model, batch, key) if WORDS in batch else batch, others, r_drop, **options)

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over (tokens, vocabulary) logits."""
        return cross_entropy(logits, targets, weights, 0.0, 0.0)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on validation."""
        return ("loss", "accuracy", "perplexity")

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns mean negative log-likelihood (nats a hidden token), perplexity, and the share of hidden tokens told right."""
        return language_scores(sums)

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns the metrics of the tokens' frequencies in training, over all tokens that may be hidden: each is as often as others."""
        seen, true = (found.tokens[found.per_token[WORDS] > 0] for found in (training, examples))
        counts = np.bincount(seen, minlength=model.config.vocab_size) + 1  # a token that training lacks isn't impossible
        loss = float(-np.log(counts[true] / counts.sum()).mean())
        return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": float((true == counts.argmax()).mean())}


def _by_length(examples: Labelled, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
    """Yields the numbers of some examples, and their batch, one a row: its length follows from theirs, not from what else is chosen."""
    lengths = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(np.maximum(examples.lengths[chosen], 1))).astype(np.int64))
    for length in np.unique(lengths):
        these = chosen[lengths == length]
        for start in range(0, len(these), _TEXTS):
            numbers = these[start : start + _TEXTS]
            batch: dict[str, np.ndarray] = {
                name: np.zeros((_TEXTS, length), np.int32) for name in ("tokens", "segment_ids", WORDS, "scored")
            }
            batch["weights"] = np.zeros((_TEXTS, length), np.float32)
            for b, i in enumerate(numbers):
                part, own = slice(examples.offsets[i], examples.offsets[i + 1]), slice(examples.lengths[i])
                batch["tokens"][b, own], batch[WORDS][b, own] = examples.tokens[part], examples.beside[WORDS][part]
                batch["segment_ids"][b, own] = 1
                batch["weights"][b, : examples.slots.counts[i]] = 1
            yield numbers, batch


@functools.partial(jax.jit, static_argnames=("task", "model"))
def _hidden(task: MaskedLM, model: nn.Module, batch: Batch) -> Batch:
    return task.hide(model, batch, jax.random.key(task.evaluation_seed))
