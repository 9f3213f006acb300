"""The texts of a row that a head reads: from columns, as they are or put together by a format."""

from collections.abc import Mapping
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.conversations import fill
from jaxft.data.rows import Rows
from jaxft.errors import UserError

_PAIR = "text_pair"


def text_of(row: Mapping[str, Any], data: DataConfig, place: str) -> str:
    """Returns a row's text, by `data.text`; raises `UserError` for columns that aren't there or aren't text."""
    return fill(data.text, row, "text", place)


def pair_of(row: Mapping[str, Any], data: DataConfig, place: str) -> str:
    """Returns a row's second text, by `data.text_pair`, or else the column text_pair; empty where there is none."""
    pattern = data.text_pair or ("{text_pair}" if _PAIR in row else "")
    return fill(pattern, row, _PAIR, place) if pattern else ""


def texts_of(rows: Rows, data: DataConfig) -> list[str]:
    """Returns the text of each row."""
    return [text_of(row, data, rows.place(i)) for i, row in enumerate(rows.dataset)]


def pairs_of(rows: Rows, data: DataConfig) -> list[str]:
    """Returns the second text of each row; empty where there is none."""
    if not data.text_pair and _PAIR not in rows.dataset.column_names:
        return []
    return [pair_of(row, data, rows.place(i)) for i, row in enumerate(rows.dataset)]


def check_pairs(sets: Mapping[str, Rows], data: DataConfig) -> None:
    """Raises `UserError` where some sets have second texts and others haven't: the model would read something else in them."""
    has = {name: _PAIR in rows.dataset.column_names for name, rows in sets.items()}
    if not data.text_pair and len(set(has.values())) > 1:
        one, other = (", ".join(name for name in has if has[name] is wanted) for wanted in (True, False))
        raise UserError(
            f"{one} has the column '{_PAIR}', and {other} hasn't. Give it to all sets, or take it out; or name what makes the second text "
            "in config.data.text_pair."
        )


def columns_of(rows: Rows, data: DataConfig) -> list[list[str]]:
    """Returns the texts, and the second texts where there are some."""
    pairs = pairs_of(rows, data)
    return [texts_of(rows, data), pairs] if pairs else [texts_of(rows, data)]
