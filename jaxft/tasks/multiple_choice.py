"""Multiple choice by likelihood: of several answers to a question a causal model gives the one that it finds likeliest."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.choices import Choices, choices_of
from jaxft.data.examples import Examples, Labelled, NextTokens, Slots, special_tokens
from jaxft.data.rows import Rows
from jaxft.errors import UserError, unknown
from jaxft.tasks.base import Batch, Task
from jaxft.tasks.head import Sums, check_head_chunk, check_label_smoothing, cross_entropy, log_likelihoods

TOKENS, BYTES = "tokens", "bytes"
_LONGEST = 2**31 - 1  # tokens: more than any choice has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers(Labelled):
    """An example for each choice, those of a row one after the other; slots of right ones alone have weight."""

    right: np.ndarray  # (n,) bool
    sizes: np.ndarray  # (n,) int64: bytes of the choice's text
    said: np.ndarray  # (slots,) bool: the slot's target is of the choice itself, not of what ends an answer

    def first(self, count: int) -> "Answers":
        """Returns the choices of the first `count` rows, or all where there are fewer."""
        return self.take(np.arange(int(np.searchsorted(self.row_numbers, count))))

    def take(self, chosen: np.ndarray) -> "Answers":
        """Returns these examples, in this order."""
        held = self.labelled
        slots, tokens = _places(held.offsets, chosen), _places(self.offsets, chosen)
        kept = Slots(_offsets(held.counts[chosen]), held.reads[slots], held.targets[slots], held.weights[slots])
        return Answers(
            self.tokens[tokens],
            _offsets(self.lengths[chosen]),
            self.cut[chosen],
            kept,
            self.row_numbers[chosen],
            right=self.right[chosen],
            sizes=self.sizes[chosen],
            said=self.said[slots],
        )


def _places(offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Task):
    """The choice whose tokens are likeliest after the question, on causal models; training raises that of the right one.

    Rows have question, choices and answer. A choice is likelier as a whole (`accuracy`) or by its length (`accuracy_normalized`), as in
    Brown et al. 2020 (arXiv:2005.14165, section 2.4); what ends an answer, as the end-of-text token, counts in the loss alone.

    >>> MultipleChoice(normalize="bytes").normalize
    'bytes'
    """

    normalize: str = TOKENS  # what a choice's log-likelihood is divided by: tokens or bytes
    label_smoothing: float = 0.0  # share of each target spread over the vocabulary
    head_chunk: int = 1024  # scored tokens whose logits exist at one time

    model_task: ClassVar[str] = "multiple_choice"
    data_fields: ClassVar[tuple[str, ...]] = ("prompt", "completion", "template", "cache")

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if self.normalize not in (TOKENS, BYTES):
            raise unknown("task.normalize", self.normalize, (TOKENS, BYTES))
        check_head_chunk(self.head_chunk)

    @property
    def chunk(self) -> int:  # type: ignore[override]  # a setting here
        """Scored tokens whose logits exist at one time."""
        return self.head_chunk

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Answers:
        """Returns each choice of a set's questions as tokens, those of the choice scored."""
        found = [choices_of(row, rows.place(i)) for i, row in enumerate(rows.dataset)]
        made, numbers = _uncut(rows, found, tokenizer, data)
        if (long := made.lengths > data.max_length).any():
            raise UserError(f"{rows.place(int(numbers[np.flatnonzero(long)[0]]))}: {_too_long(made, data)}")
        right = np.concatenate([np.arange(len(one.texts)) == one.right for one in found])
        weights = np.repeat(right, made.slots.counts).astype(np.float32)
        slots = dataclasses.replace(made.slots, weights=weights)
        sizes = np.asarray([len(text.encode()) for one in found for text in one.texts])
        said = _said(made, list(special_tokens(tokenizer).values()))
        return Answers(made.tokens, made.offsets, made.cut, slots, numbers, right=right, sizes=sizes, said=said)

    def faults(self, rows: Rows, tokenizer: Any, data: DataConfig, options: Mapping[str, Any]) -> dict[int, str]:
        """Returns the questions with a choice that is too long."""
        found = [choices_of(row, rows.place(i)) for i, row in enumerate(rows.dataset)]
        made, numbers = _uncut(rows, found, tokenizer, data)
        return {int(i): _too_long(made, data) for i in np.unique(numbers[made.lengths > data.max_length])}

    def for_training(self, model: nn.Module, examples: Examples) -> Examples:
        """Returns the right choices alone."""
        assert isinstance(examples, Answers)
        return examples.take(np.flatnonzero(examples.right))

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over (tokens, vocabulary) logits."""
        return cross_entropy(logits, targets, weights, self.label_smoothing, 0.0)

    def measure(self, model: nn.Module, params: Any, batch: Batch) -> tuple[Sums, Any]:
        """Returns the sums over the tokens of right choices, and the log-likelihood of every choice's, (batch, slots) float32."""
        targets, weights = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
        likelihoods, hits = log_likelihoods(model, params, self.hidden(model, params, batch, {}), targets, self.chunk)
        nll = -jnp.sum(likelihoods * weights)
        sums = Sums(nll, nll, jnp.sum(hits.astype(jnp.float32) * weights), jnp.sum(weights))
        return sums, likelihoods.reshape(batch["targets"].shape)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on validation."""
        return ("loss", "accuracy", "accuracy_normalized")

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns mean negative log-likelihood of right choices (nats a token), and the shares of questions whose right choice is the
        likeliest, as a whole and by its length.
        """
        assert isinstance(examples, Answers)
        assert outputs is not None
        whole, by_length = self.likelihoods(examples, outputs)
        return {
            "loss": float(sums.nll / sums.weight),
            "accuracy": _accuracy(examples, whole),
            "accuracy_normalized": _accuracy(examples, by_length),
        }

    def likelihoods(self, examples: Answers, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-likelihood of each choice, (n,) float64, as a whole and divided by its tokens or bytes."""
        starts = examples.slots.offsets[:-1]
        whole = np.add.reduceat(np.where(examples.said, outputs.astype(np.float64), 0.0), starts)
        size = np.add.reduceat(examples.said.astype(np.int64), starts) if self.normalize == TOKENS else examples.sizes
        return whole, whole / size

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns the accuracy of always choosing the place in the list that is right most often in training."""
        assert isinstance(training, Answers)
        assert isinstance(examples, Answers)
        place = int(np.bincount(_place(training)[training.right]).argmax())
        accuracy = float((_place(examples)[examples.right] == place).mean())
        return {"accuracy": accuracy, "accuracy_normalized": accuracy}


def _uncut(rows: Rows, found: Sequence[Choices], tokenizer: Any, data: DataConfig) -> tuple[NextTokens, np.ndarray]:
    """Every choice as tokens, whole, and the number of its row."""
    from jaxft.data.template import chat_template
    from jaxft.data.tokenize import tokenize

    own = "{choice}" if chat_template(tokenizer, data.template) else " {choice}"  # a text goes on after a space
    prompt, completion = data.prompt or "{question}", data.completion or own
    whole = dataclasses.replace(data, prompt=prompt, completion=completion, max_length=_LONGEST)
    made = tokenize(_one_each(rows, found), tokenizer, whole)
    return made, np.repeat(np.arange(len(found)), [len(one.texts) for one in found])


def _too_long(made: NextTokens, data: DataConfig) -> str:
    return f"config.data.max_length is {data.max_length}, which cuts a choice. Raise it to {int(made.lengths.max())}."


def _one_each(rows: Rows, found: Sequence[Choices]) -> Rows:
    """The rows with one choice each, in the column `choice`."""
    import datasets

    own = [
        {name: value for name, value in row.items() if name not in ("choices", "answer")} | {"choice": text}
        for row, one in zip(rows.dataset, found, strict=True)
        for text in one.texts
    ]
    counts = [len(one.texts) for one in found]
    return Rows(datasets.Dataset.from_list(own), rows.name, rows.unit, np.repeat(rows.numbers, counts))


def _said(made: NextTokens, special: Sequence[int]) -> np.ndarray:
    """Which slots' targets are of the text: those before the first special token, or all where that comes first."""
    slots = made.slots
    ends = np.isin(slots.targets, special)
    before = np.cumsum(ends) - np.repeat(np.cumsum(ends)[slots.offsets[:-1]] - ends[slots.offsets[:-1]], slots.counts)
    said = before == 0
    none = ~np.logical_or.reduceat(said, slots.offsets[:-1])
    return said | np.repeat(none, slots.counts)


def _place(examples: Answers) -> np.ndarray:
    """The place of each choice among those of its row."""
    numbers = examples.row_numbers
    starts = np.searchsorted(numbers, numbers)
    return np.arange(len(numbers)) - starts


def _accuracy(examples: Answers, likelihoods: np.ndarray) -> float:
    starts = np.flatnonzero(_place(examples) == 0)
    parts = np.split(np.arange(len(likelihoods)), starts[1:])
    return float(np.mean([examples.right[part[likelihoods[part].argmax()]] for part in parts]))
