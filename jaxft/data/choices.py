"""Questions with choices, one of them right: rows in the forms that data sets have them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxft.errors import UserError

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choices(NamedTuple):
    """What one row lets a model choose from."""

    texts: tuple[str, ...]
    right: int  # its number, from 0


def choices_of(row: Mapping[str, Any], place: str) -> Choices:
    """Returns a row's choices and the number of the right one.

    `choices` is a list of texts, or {"text": texts, "label": names}; `answer` is the right one's text, its name, its letter, A for the
    first, or its number, 0 for the first. A number that isn't written as text is a place, unless the choices are numbers themselves, or
    their names are.

    Args:
      row: a row with `choices` and `answer`.
      place: where it stands, for messages.

    Raises:
      UserError: a column that isn't there, fewer than two choices, one that is empty or stands twice, an answer that is none of them.

    >>> choices_of({"choices": ["a cat", "a dog"], "answer": "B"}, "a.jsonl, line 1")
    Choices(texts=('a cat', 'a dog'), right=1)
    """
    for column in ("choices", "answer"):
        if row.get(column) is None:
            raise UserError(f"{place}: there is no '{column}'. Multiple choice needs the columns choices, a list, and answer.")
    given = row["choices"]
    found, names = (given.get("text"), given.get("label") or ()) if isinstance(given, Mapping) else (given, ())
    if not isinstance(found, list | tuple):
        raise UserError(f"{place}: 'choices' must be a list of texts, not {given!r:.80}.")
    if None in found:
        raise UserError(f"{place}: choice {list(found).index(None) + 1} is null. Fill it, or leave it out.")
    if names and (not isinstance(names, list | tuple) or len(names) != len(found)):
        raise UserError(f"{place}: the label of 'choices' must be a list of a name for each of the {len(found)} texts, not {names!r:.80}.")
    texts = tuple(str(one) for one in found)
    if len(texts) < 2:
        raise UserError(f"{place}: 'choices' has {len(texts)}: there is nothing to choose from. Give two or more, or remove the row.")
    if not all(text.strip() for text in texts):
        raise UserError(f"{place}: choice {[bool(text.strip()) for text in texts].index(False) + 1} is empty. Fill it, or leave it out.")
    if twice := [text for number, text in enumerate(texts) if text in texts[:number]]:
        raise UserError(f"{place}: 'choices' has '{twice[0]}' twice. Leave one of them out.")
    own = [str(name) for name in names]
    numbers = not any(isinstance(one, str) for one in found) or (names and all(name.strip().isdecimal() for name in own))
    answer = row["answer"]
    if numbers and isinstance(answer, int | float) and not isinstance(answer, bool):  # a choice or its name, and no place among them
        answer = str(answer)
    return Choices(texts, _right(answer, texts, own, not numbers, place))


def _right(answer: Any, texts: tuple[str, ...], names: list[str], places: bool, place: str) -> int:
    """The number of the right choice: a text counts before a name, or else a letter, and that before a number, where it may be a place."""
    if isinstance(answer, str):
        said = answer.strip()
        for known in ([text.strip() for text in texts], names or list(_LETTERS[: len(texts)])):
            if said in known:
                return known.index(said)
        answer = int(said) if said.isdecimal() and not names and places else None
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    letters = f"{_LETTERS[0]} to {_LETTERS[min(len(texts), len(_LETTERS)) - 1]}" + (f", 0 to {len(texts) - 1}" if places else "")
    raise UserError(f"{place}: the answer is none of the {len(texts)} choices ({', '.join(names) or letters}, or one's text).")
