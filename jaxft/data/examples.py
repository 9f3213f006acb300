"""What a model reads of each row, where its head reads the hidden states, and what it should make of them."""

import abc
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Slots:
    """The places where the head reads, one example's after the other's, and what it should say there."""

    offsets: np.ndarray  # (n + 1,) int64: example i's are [offsets[i], offsets[i + 1])
    reads: np.ndarray  # (slots,) int32: the position in its example of the token whose hidden state is read
    targets: np.ndarray  # (slots,) int32 classes or tokens, or (slots, outputs) float32
    weights: np.ndarray  # (slots,) float32: what each counts in the loss

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64: the slots of each example."""
        return np.diff(self.offsets)

    def part(self, i: int) -> slice:
        """Returns where example `i`'s slots are."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))


@dataclasses.dataclass(frozen=True)
class Examples(abc.ABC):
    """Tokenized rows, one after the other in flat arrays."""

    tokens: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (n + 1,) int64: example i is [offsets[i], offsets[i + 1])
    cut: np.ndarray  # (n,) int32: tokens cut to fit max_length

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens_of(self, i: int) -> np.ndarray:
        """Returns (length,) int32: what the model reads of example `i`."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: the tokens of each example."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: the row of the data that each example is of."""
        return np.arange(len(self))

    @property
    @abc.abstractmethod
    def slots(self) -> Slots:
        """Where the head reads."""

    @property
    def per_token(self) -> Mapping[str, np.ndarray]:
        """What the model is given beside each token, by its name: (total,) int32 each."""
        return {}

    @property
    def digest(self) -> str:
        """A hash of what a model reads and should say: of other rows it is another."""
        slots, found = self.slots, hashlib.sha256()
        for array in (self.tokens, self.offsets, slots.offsets, slots.reads, slots.targets, slots.weights, *self.per_token.values()):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    @abc.abstractmethod
    def first(self, count: int) -> Self:
        """Returns the examples of the first `count` rows, or all where there are fewer."""


@dataclasses.dataclass(frozen=True)
class Labelled(Examples):
    """Examples with targets of their own, as classes: `slots` says where they belong."""

    labelled: Slots
    row_numbers: np.ndarray  # (n,) int64
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: the row of the data that each example is of."""
        return self.row_numbers

    @property
    def slots(self) -> Slots:
        """Where the head reads."""
        return self.labelled

    @property
    def per_token(self) -> Mapping[str, np.ndarray]:
        """What the model is given beside each token."""
        return self.beside

    def first(self, count: int) -> Self:
        """Returns the examples of the first `count` rows, or all where there are fewer."""
        n = int(np.searchsorted(self.row_numbers, count))
        end, last = self.offsets[n], self.labelled.offsets[n]
        slots = Slots(
            self.labelled.offsets[: n + 1], self.labelled.reads[:last], self.labelled.targets[:last], self.labelled.weights[:last]
        )
        return dataclasses.replace(
            self,
            tokens=self.tokens[:end],
            offsets=self.offsets[: n + 1],
            cut=self.cut[:n],
            labelled=slots,
            row_numbers=self.row_numbers[:n],
            beside={name: values[:end] for name, values in self.beside.items()},
        )


@dataclasses.dataclass(frozen=True)
class Words(Labelled):
    """Examples whose slots are words, each at its first token. A long row is several examples, its words in order over them."""

    words: tuple[str, ...] = ()  # one a slot
    token_words: np.ndarray | None = None  # (total,) int32: the number in its row of each token's word, from 1; 0 of special tokens

    def first(self, count: int) -> Self:
        """Returns the examples of the first `count` rows, or all where there are fewer."""
        found = super().first(count)
        numbers = None if self.token_words is None else self.token_words[: len(found.tokens)]
        return dataclasses.replace(found, words=self.words[: len(found.slots.reads)], token_words=numbers)

    @property
    def texts(self) -> list[slice]:
        """Where each row's words are."""
        begins = np.flatnonzero(np.diff(self.row_numbers, prepend=-1))
        starts = self.labelled.offsets[[*begins, len(self)]]
        return [slice(int(start), int(stop)) for start, stop in itertools.pairwise(starts)]


@dataclasses.dataclass(frozen=True)
class NextTokens(Examples):
    """Examples of a causal model: the hidden state of each token predicts the next one, where that is scored."""

    scored: np.ndarray  # (total,) bool: the token is a target counted in the loss
    prompts: np.ndarray  # (n,) int32: tokens before the last scored turn
    answers: tuple[str, ...]  # n texts: the last scored turn, as the row has it

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (length,) int32 tokens and (length,) bool scored of example `i`."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.scored[part]

    @functools.cached_property
    def slots(self) -> Slots:
        """A slot for each scored token: the token before it is read."""
        targets = np.flatnonzero(self.scored)
        offsets = np.searchsorted(targets, self.offsets)
        starts = np.repeat(self.offsets[:-1], np.diff(offsets))
        return Slots(offsets, (targets - starts - 1).astype(np.int32), self.tokens[targets], np.ones(len(targets), np.float32))

    def first(self, count: int) -> "NextTokens":
        """Returns the first `count` examples, or all where there are fewer."""
        count = min(count, len(self))
        end = self.offsets[count]
        return NextTokens(
            self.tokens[:end], self.offsets[: count + 1], self.cut[:count], self.scored[:end], self.prompts[:count], self.answers[:count]
        )

    def prompt(self, i: int) -> np.ndarray:
        """Returns (length,) int32: what the model is given before the last scored turn, the generation prompt included."""
        return self[i][0][: self.prompts[i]]

    def answer(self, i: int) -> str:
        """Returns the true text of the last scored turn."""
        return self.answers[i]


@dataclasses.dataclass(frozen=True)
class NotedTokens(NextTokens):
    """The same, with more beside each token."""

    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def per_token(self) -> Mapping[str, np.ndarray]:
        """What stands beside each token."""
        return self.beside

    def first(self, count: int) -> "NotedTokens":
        """Returns the first `count` examples, or all where there are fewer."""
        found = super().first(count)
        return _noted(found, {name: values[: len(found.tokens)] for name, values in self.beside.items()})


def noted(examples: Examples, beside: Mapping[str, np.ndarray]) -> Examples:
    """Returns examples with more beside each token: (total,) int32 by name."""
    if isinstance(examples, Labelled):
        return dataclasses.replace(examples, beside={**examples.beside, **beside})
    assert isinstance(examples, NextTokens)
    return _noted(examples, {**examples.per_token, **beside})


def _noted(examples: NextTokens, beside: Mapping[str, np.ndarray]) -> NotedTokens:
    return NotedTokens(**{field.name: getattr(examples, field.name) for field in dataclasses.fields(NextTokens)}, beside=beside)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the id of every special token: those with a name, as eos_token, and those that the tokenizer's file alone calls special."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the ids of `special_tokens`."""
    return set(special_tokens(tokenizer).values())


def answer_end(tokenizer: Any, examples: NextTokens) -> int | None:
    """Returns the special token that most answers end with, or None where they end with text."""
    special = special_ids(tokenizer)

    @functools.cache
    def is_blank(token: int) -> bool:
        return token not in special and not tokenizer.decode([token]).strip()

    def last(i: int) -> int:
        tokens, scored = examples[i]
        end = len(tokens) - int(np.argmax(scored[::-1]))  # behind it stands what isn't scored, as the line break of some templates
        while scored.all() and end > 1 and is_blank(int(tokens[end - 1])):  # where that is scored too
            end -= 1
        return int(tokens[end - 1])

    ends = [last(i) for i in np.flatnonzero(examples.cut == 0).tolist()]
    common = int(np.bincount(ends).argmax()) if ends else None
    return common if common in special else None
