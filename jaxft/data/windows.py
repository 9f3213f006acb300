"""A question and a long text in as many windows as the text needs: each has the question whole, and a slot for each token of the text."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.encode import TOKEN_TYPES, check_fast
from jaxft.data.examples import Labelled, Slots
from jaxft.data.questions import Answer, Question
from jaxft.errors import UserError

_CHUNK = 1000  # questions that the tokenizer gets at once
_CONTEXT = 1  # what a tokenizer calls the second text of a pair
NONE = 0  # the slot of a window that says that it has no answer: the first token's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows(Labelled):
    """Examples of question answering: a window each, several of a row where its context is long.

    A window's first slot is its first token's, the others are its context's tokens'. A target is 1 in the first column where the answer
    begins, in the second where it ends; a window without the whole answer has both in its first slot.
    """

    spans: np.ndarray  # (slots, 2) int32: the characters of the context that the slot's token is of; 0, 0 of a first token
    questions: tuple[Question, ...]  # of each row
    question_lengths: np.ndarray  # (rows,) int32: tokens of each question, uncut

    def first(self, count: int) -> "Windows":
        """Returns the windows of the first `count` rows, or all where there are fewer."""
        base = super().first(count)
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(Labelled)}
        spans = self.spans[: len(base.slots.reads)]
        return Windows(**fields, spans=spans, questions=self.questions[:count], question_lengths=self.question_lengths[:count])

    @property
    def answered(self) -> np.ndarray:
        """(windows,) bool: whether the answer stands in the window."""
        return self.slots.targets[self.slots.offsets[:-1], 0] == 0


class _Window(NamedTuple):
    row: int
    tokens: np.ndarray  # (length,) int32
    token_types: np.ndarray | None  # (length,) int32
    reads: np.ndarray  # (slots,) int32
    spans: np.ndarray  # (slots, 2) int32


def windows(
    questions: Sequence[Question], tokenizer: Any, max_length: int, stride: int, question_length: int, takes_types: bool
) -> Windows:
    """Returns the windows of each question, in order.

    Args:
      questions: of each row.
      tokenizer: a fast tokenizer of transformers.
      max_length: tokens of a window, at most.
      stride: tokens of the context that a window shares with the one before it.
      question_length: tokens of a question, at most; a longer one is cut at its end.
      takes_types: whether the model tells question and context apart by token types.

    Raises:
      UserError: a window that would have no more than `stride` tokens of the context.
    """
    check_fast(tokenizer)
    asked, lengths, longest = _cut([one.question for one in questions], tokenizer, question_length)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length - special - longest <= stride:
        raise UserError(
            f"config.data.max_length is {max_length}: {special} special tokens and a question of {longest} leave "
            f"{max(max_length - special - longest, 0)} for the context, and config.task.stride, what windows share, is {stride}. Raise "
            "max_length, or lower config.task.stride or question_length."
        )
    found: list[_Window] = []
    for start in range(0, len(questions), _CHUNK):
        part = slice(start, start + _CHUNK)
        found += _encoded(asked[part], [one.context for one in questions[part]], tokenizer, max_length, stride, start)
    return _joined(found, questions, lengths, takes_types)


def _cut(texts: Sequence[str], tokenizer: Any, most: int) -> tuple[list[str], np.ndarray, int]:
    """The questions, cut after `most` tokens; how many tokens each had; and how many the longest has now."""
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    lengths = np.asarray([len(own) for own in offsets], np.int32)
    cut = {i: texts[i][: offsets[i][most - 1][1]] for i in np.flatnonzero(lengths > most).tolist()}
    # A part of a text may become other tokens than it was of.
    again = tokenizer(list(cut.values()), add_special_tokens=False)["input_ids"] if cut else []
    longest = max([*map(len, again), *lengths[lengths <= most].tolist()])
    return [cut.get(i, text) for i, text in enumerate(texts)], lengths, longest


def _encoded(questions: Sequence[str], contexts: Sequence[str], tokenizer: Any, max_length: int, stride: int, first: int) -> list[_Window]:
    encoded = tokenizer(
        list(questions),
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
        own = np.flatnonzero([number == _CONTEXT for number in encoded.sequence_ids(i)])
        reads = np.concatenate([[0], own])
        spans = np.asarray(encoded["offset_mapping"][i], np.int32)[reads]
        spans[NONE] = 0
        kinds = np.asarray(encoded[TOKEN_TYPES][i], np.int32) if TOKEN_TYPES in encoded else None
        found.append(_Window(first + int(row), np.asarray(encoded["input_ids"][i], np.int32), kinds, reads.astype(np.int32), spans))
    return found


def _joined(found: Sequence[_Window], questions: Sequence[Question], lengths: np.ndarray, takes_types: bool) -> Windows:
    offsets = np.cumsum([0, *(len(one.reads) for one in found)], dtype=np.int64)
    targets = np.zeros((int(offsets[-1]), 2), np.float32)
    for begin, window in zip(offsets, found, strict=False):
        first, last = target(window.spans, questions[window.row].answers)
        targets[begin + first, 0] = targets[begin + last, 1] = 1
    kinds = [one.token_types for one in found if one.token_types is not None]
    return Windows(
        np.concatenate([one.tokens for one in found]),
        np.cumsum([0, *(len(one.tokens) for one in found)], dtype=np.int64),
        np.zeros(len(found), np.int32),  # what a window leaves out stands in another
        Slots(offsets, np.concatenate([one.reads for one in found]), targets, np.ones(len(targets), np.float32)),
        np.asarray([one.row for one in found], np.int64),
        {TOKEN_TYPES: np.concatenate(kinds)} if takes_types and kinds else {},
        spans=np.concatenate([one.spans for one in found]),
        questions=tuple(questions),
        question_lengths=lengths,
    )


def target(spans: np.ndarray, answers: Sequence[Answer]) -> tuple[int, int]:
    """Returns the slots of the tokens with the first and the last character of the first answer; NONE twice where not all of it is there.

    Args:
      spans: (slots, 2) of a window.
      answers: of its question.

    >>> spans = np.array([[0, 0], [7, 10], [11, 19], [19, 20]])
    >>> target(spans, [Answer("migraine.", 11)]), target(spans, [Answer("for it", 4)])
    ((2, 3), (0, 0))
    """
    if not answers or len(spans) == 1:
        return NONE, NONE
    text, start = answers[0].text.rstrip(), answers[0].start
    start, end = start + len(text) - len(text.lstrip()), start + len(text)
    begins, ends = spans[1:].T
    if begins[0] > start or ends[-1] < end:
        return NONE, NONE
    first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(begins, end, side="left")) - 1
    return (first + 1, last + 1) if first <= last else (NONE, NONE)  # else the tokenizer dropped its characters
