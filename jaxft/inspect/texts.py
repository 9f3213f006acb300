"""Rows of any task as inspection reads them: what the model is given, what it is asked for, and the labels in that."""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.choices import choices_of
from jaxft.data.conversations import Conversation, conversation, fill
from jaxft.data.labels import label_column
from jaxft.data.questions import Question, question_of
from jaxft.data.sources import Rows
from jaxft.data.tags import feature_names, tagged_row
from jaxft.data.texts import pair_of, text_of
from jaxft.errors import UserError
from jaxft.models.heads import CAUSAL_LM, MASKED_LM, MULTIPLE_CHOICE, QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION

CONVERSATION, CLASSIFICATION, TAGGING, ANSWERS = "conversation", "classification", "tagging", "question answering"
TEXT, CHOICES = "text", "multiple choice"
UNCUT = (TEXT, CHOICES)  # kinds whose rows aren't cut: they become several examples, or are refused where they are too long
_KINDS = {
    CAUSAL_LM: CONVERSATION,
    MASKED_LM: TEXT,
    MULTIPLE_CHOICE: CHOICES,
    SEQUENCE_CLASSIFICATION: CLASSIFICATION,
    TOKEN_CLASSIFICATION: TAGGING,
    QUESTION_ANSWERING: ANSWERS,
}
_ROWS_A_LABEL = 3  # on average: a column with fewer is free text
_LONGEST_LABEL = 80  # characters
_NO_ANSWER = "(no answer)"  # SQuAD 2.0's questions without one


@dataclasses.dataclass(frozen=True)
class Labels:
    """The values of one label column: one a row, or several (tags of tokens, several labels)."""

    name: str  # the column
    values: tuple[str, ...]
    rows: np.ndarray  # (values,) int: the readable row that each stands in
    each: str = "row"  # what has one: "row", "token" or "label"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A row that training would refuse."""

    row: int  # in `Texts.rows`
    reason: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """One set: its readable rows, and those that training would refuse."""

    name: str  # "train"
    kind: str  # CONVERSATION, TEXT, CHOICES, CLASSIFICATION, TAGGING or ANSWERS
    rows: Rows
    numbers: tuple[int, ...]  # of the readable rows, in `rows`
    texts: tuple[str, ...]  # what the model is given
    answers: tuple[str, ...]  # what it is asked for; empty where a row is text alone
    labels: tuple[Labels, ...]  # the columns that the answer is made of; by `read_sets` those of few distinct values alone
    blank: tuple[Refused, ...]  # readable, but with an empty value in a column that is used
    refused: tuple[Refused, ...]
    conversations: tuple[Conversation, ...] = ()  # of CONVERSATION, the readable rows'
    words: tuple[tuple[str, ...], ...] = ()  # of TAGGING, the readable rows'
    questions: tuple[Question, ...] = ()  # of ANSWERS, the readable rows'

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, i: int) -> str:
        """Returns where the `i`-th readable row stands."""
        return self.rows.place(self.numbers[i])


@dataclasses.dataclass(frozen=True)
class _Read:
    """One row, read."""

    text: str
    answer: str
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    conversation: Conversation | None = None
    words: tuple[str, ...] = ()
    question: Question | None = None


def kind_of(task: str) -> str:
    """Returns how the rows of a task are read, by what `load_pretrained` calls it."""
    return _KINDS[task]


def read_set(name: str, rows: Rows, config: DataConfig, kind: str = CONVERSATION) -> Texts:
    """Returns one set as inspection reads it.

    Args:
        name: the set's name, as "train".
        rows: its rows.
        config: how rows become conversations; of other kinds nothing is read of it.
        kind: CONVERSATION, TEXT, CHOICES, CLASSIFICATION, TAGGING or ANSWERS.

    Raises:
        UserError: every row is refused: what is wrong is the configuration, or the columns.
    """
    read, used = _reader(rows, config, kind)
    found: list[tuple[int, _Read]] = []
    refused, blank, first = [], [], None
    for i, row in enumerate(rows.dataset):
        try:
            found.append((i, read(row, rows.place(i))))
        except UserError as error:
            refused.append(Refused(i, str(error).removeprefix(f"{rows.place(i)}: ")))
            first = first or error
            continue
        if empty := [column for column in used if not str(row[column] if row[column] is not None else "").strip()]:
            blank.append(Refused(i, f"{', '.join(repr(column) for column in empty)} is empty."))
    if first is not None and not found:
        raise first
    return Texts(
        name,
        kind,
        rows,
        tuple(i for i, _ in found),
        tuple(one.text for _, one in found),
        tuple(one.answer for _, one in found),
        _labels([one for _, one in found], kind),
        tuple(blank),
        tuple(refused),
        tuple(one.conversation for _, one in found if one.conversation),
        tuple(one.words for _, one in found if one.words),
        tuple(one.question for _, one in found if one.question),
    )


def read_sets(rows: Mapping[str, Rows], config: DataConfig, kind: str = CONVERSATION) -> list[Texts]:
    """Returns the sets, the training set first, with the label columns alone that are such in the training set."""
    sets = [read_set(name, found, config, kind) for name, found in rows.items()]
    chosen = [labels.name for labels in sets[0].labels if _is_label(labels)]
    return [dataclasses.replace(texts, labels=tuple(one for one in texts.labels if one.name in chosen)) for texts in sets]


def _reader(rows: Rows, config: DataConfig, kind: str) -> tuple[Callable[[Mapping[str, Any], str], _Read], list[str]]:
    """Returns what reads one row, and the columns that are used and could be blank in a row that training takes."""
    if kind == TEXT:
        return lambda row, place: _Read(_given(row, config, place), ""), []
    if kind == CHOICES:
        return lambda row, place: _choices(row, config, place), []
    if kind == CLASSIFICATION:
        classes = label_column(rows, config.label).feature_names
        return lambda row, place: _classification(row, config, classes, place), []
    if kind == TAGGING:
        names = feature_names(rows, config)
        return lambda row, place: _tagging(row, config, names, place), []
    if kind == ANSWERS:
        return _answers, []
    fields = _columns(config.completion)
    used = [column for column in dict.fromkeys([*_columns(config.prompt), *fields]) if column in rows.dataset.column_names]
    return lambda row, place: _conversation(row, config, fields, place), used


def _columns(pattern: str) -> list[str]:
    """The columns that a format names; one that is no format is told by `conversation`, with its place."""
    try:
        return [column for _, column, _, _ in string.Formatter().parse(pattern) if column]
    except ValueError:
        return []


def _conversation(row: Mapping[str, Any], config: DataConfig, fields: Sequence[str], place: str) -> _Read:
    found = conversation(row, config, place)
    if not found.messages:
        return _Read(found.text, "", conversation=found)
    last = found.scored[-1]
    given = "\n".join(message["content"] for message in found.messages[:last] if message["role"] != "system")
    answer = found.messages[last]["content"]
    labels = {field: [str(row[field])] for field in fields} if fields else {"answer": [answer]}
    return _Read(given, answer, labels, found)


def _classification(row: Mapping[str, Any], config: DataConfig, names: Sequence[str], place: str) -> _Read:
    text = _given(row, config, place)
    pair, label = pair_of(row, config, place), row[config.label]
    given = [_named(one, names) for one in (label if isinstance(label, list) else [label])]
    if any(one is None or not str(one).strip() for one in (label if isinstance(label, list) else [label])):
        raise UserError(f"{place}: '{config.label}' is empty.")
    return _Read(f"{text}\n{pair}" if pair else text, ", ".join(given), {config.label: given})


def _given(row: Mapping[str, Any], config: DataConfig, place: str) -> str:
    text = text_of(row, config, place)
    if not text.strip():
        raise UserError(f"{place}: the text is empty.")
    return text


def _choices(row: Mapping[str, Any], config: DataConfig, place: str) -> _Read:
    question, found = fill(config.prompt or "{question}", row, "prompt", place), choices_of(row, place)
    if not question.strip():
        raise UserError(f"{place}: the question is empty.")
    return _Read("\n".join((question, *found.texts)), found.texts[found.right])


def _tagging(row: Mapping[str, Any], config: DataConfig, names: Sequence[str], place: str) -> _Read:
    found = tagged_row(row, config, place)
    tags = [_named(tag, names) for tag in found.tags]
    return _Read(" ".join(found.words), " ".join(tags), {config.tags: tags}, words=tuple(found.words))


def _answers(row: Mapping[str, Any], place: str) -> _Read:
    found = question_of(row, place)
    return _Read(f"{found.question}\n{found.context}", found.answers[0].text if found.answers else _NO_ANSWER, question=found)


def _named(value: Any, names: Sequence[str]) -> str:
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


def _labels(found: Sequence[_Read], kind: str) -> tuple[Labels, ...]:
    columns = dict.fromkeys(name for one in found for name in one.labels)
    return tuple(_column([one.labels.get(name, ()) for one in found], name, kind) for name in columns)


def _column(values: Sequence[Sequence[str]], name: str, kind: str) -> Labels:
    counts = [len(row) for row in values]
    each = "token" if kind == TAGGING else "row" if set(counts) == {1} else "label"
    return Labels(name, tuple(value for row in values for value in row), np.repeat(np.arange(len(values)), counts), each)


def _is_label(labels: Labels) -> bool:
    """Whether a column has few distinct, short values."""
    values = set(labels.values)
    return len(values) * _ROWS_A_LABEL <= len(labels.values) and max(map(len, values)) <= _LONGEST_LABEL
