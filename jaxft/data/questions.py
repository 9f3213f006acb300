"""Questions with a text that holds their answers, or holds none: rows in the form of SQuAD 1.1 and 2.0."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxft.data.rows import Rows
from jaxft.errors import UserError, nearest

COLUMNS = ("question", "context", "answers")
_SHOWN = 60  # characters of a text in a message
_FORM = '{"text": [...], "answer_start": [...]}'


class Answer(NamedTuple):
    """A part of the context."""

    text: str
    start: int  # its first character in the context


@dataclasses.dataclass(frozen=True)
class Question:
    """One row."""

    question: str
    context: str
    answers: tuple[Answer, ...]  # any of them is right, the first is trained on; empty where the context has none


def question_of(row: Mapping[str, Any], place: str) -> Question:
    """Returns a row's question, its context and the answers in it; of none the lists are empty, or `answers` is null.

    Args:
      row: `question` and `context`, text; `answers`, {"text": [...], "answer_start": [...]} or a list of {"text", "answer_start"}.
      place: where the row stands, for messages.

    Raises:
      UserError: a column that isn't there, or an answer that isn't where it says.
    """
    for column in COLUMNS:
        if column not in row:
            raise UserError(
                f"{place}: there is no column '{column}'.{nearest(column, row)} Question answering reads {', '.join(COLUMNS)}; the row has "
                f"{', '.join(row)}."
            )
    question, context = _text(row, "question", place), _text(row, "context", place)
    texts, starts = _lists(row["answers"], place)
    if len(texts) != len(starts):
        raise UserError(f"{place}: answers has {len(texts)} texts, but {len(starts)} of answer_start. Give each text its place.")
    return Question(question, context, tuple(_answer(text, start, context, place) for text, start in zip(texts, starts, strict=True)))


def questions_of(rows: Rows) -> list[Question]:
    """Returns the question of each row."""
    return [question_of(row, rows.place(i)) for i, row in enumerate(rows.dataset)]


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{place}: '{column}' must be text, not {value!r}.")
    if not value.strip():
        raise UserError(f"{place}: '{column}' is empty.")
    return value


def _lists(answers: Any, place: str) -> tuple[list[Any], list[Any]]:
    if answers is None:
        return [], []
    if isinstance(answers, list) and all(isinstance(one, dict) and {"text", "answer_start"} <= one.keys() for one in answers):
        return [one["text"] for one in answers], [one["answer_start"] for one in answers]
    if not isinstance(answers, dict) or not all(isinstance(answers.get(name), list) for name in ("text", "answer_start")):
        raise UserError(f"{place}: answers is {str(answers)[:_SHOWN]!r}. Give {_FORM}, with empty lists where there is no answer.")
    return answers["text"], answers["answer_start"]


def _answer(text: Any, start: Any, context: str, place: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: an answer's text is {text!r}. A question without an answer has empty lists in answers.")
    if not isinstance(start, int) or isinstance(start, bool):
        raise UserError(f"{place}: answer_start of '{text[:_SHOWN]}' is {start!r}; it is a character's number, from 0.")
    if start < 0 or context[start : start + len(text)] != text:
        found = context.find(text)
        remedy = f"It stands at {found}: correct answer_start." if found >= 0 else "It stands nowhere in it: correct the answer's text."
        raise UserError(f"{place}: the answer '{text[:_SHOWN]}' isn't what stands at answer_start, {start}, in its context. {remedy}")
    return Answer(text, start)
