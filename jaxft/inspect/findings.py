"""What is wrong with the data: one finding a kind of fault, with the rows it concerns."""

import dataclasses
import json
from collections.abc import Sequence

from jaxft.inspect.texts import Texts

WEIGHTS = ("error", "warning", "note")  # training refuses it; it spoils training or its figures; good to know
MOST_CASES = 1000  # of a finding that are kept; `count` counts all


@dataclasses.dataclass(frozen=True)
class Spot:
    """One row of a finding."""

    set: str  # "train"
    place: str  # "train.jsonl, line 17"
    text: str  # what the model is given
    answer: str  # what it is asked for


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows that show the fault together, and what is to be said of them."""

    spots: tuple[Spot, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of fault.

    >>> finding("empty", "warning", "1 row is empty", "Remove it.", [Case((Spot("train", "a.jsonl, line 3", "", ""),))]).count
    1
    """

    kind: str  # "duplicates", "leak", ...
    weight: str  # one of WEIGHTS
    title: str  # one line
    advice: str  # what to do
    count: int  # cases there are
    cases: tuple[Case, ...]  # the first of them


def finding(kind: str, weight: str, title: str, advice: str, cases: Sequence[Case]) -> Finding:
    """Returns the finding of these cases."""
    return Finding(kind, weight, title, advice, len(cases), tuple(cases[:MOST_CASES]))


def spot(texts: Texts, i: int) -> Spot:
    """Returns the `i`-th readable row of a set."""
    return Spot(texts.name, texts.place(i), texts.texts[i], texts.answers[i])


def raw_spot(texts: Texts, row: int) -> Spot:
    """Returns a row by its number in `texts.rows`, as it stands there: it may be one that can't be read."""
    return Spot(texts.name, texts.rows.place(row), json.dumps(texts.rows.dataset[row], ensure_ascii=False, default=str), "")


def counted(count: int, noun: str) -> str:
    """Returns "1 row", "2 rows".

    >>> counted(1200, "row")
    '1,200 rows'
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, most: int) -> str:
    """Returns the text on one line, cut to so many characters.

    >>> shortened("A long\\nline", 8)
    'A long l...'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
