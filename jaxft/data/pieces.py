"""Texts in pieces that fit a row: of a text that is too long nothing is dropped, it becomes several examples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.encode import check_fast
from jaxft.errors import UserError


class Piece(NamedTuple):
    """A part of a text, with the special tokens that the tokenizer puts around it."""

    row: int  # the text's number
    tokens: np.ndarray  # (length,) int32
    words: np.ndarray  # (length,) int32: the number of each token's word, from 1; 0 for special tokens and unknown ones


def pieces(texts: Sequence[str], tokenizer: Any, max_length: int, places: Sequence[str]) -> list[Piece]:
    """Returns the texts as tokens, those that are longer than `max_length` in as few pieces as do, of nearly one length.

    Args:
      texts: the texts.
      tokenizer: a fast tokenizer of transformers.
      max_length: tokens of an example, at most.
      places: where each text stands, for messages.

    Raises:
      UserError: an empty text, or a max_length that the special tokens fill.
    """
    check_fast(tokenizer)
    for text, place in zip(texts, places, strict=True):
        if not text.strip():
            raise UserError(f"{place}: the text is empty. Fill it, or remove the row.")
    special = tokenizer.num_special_tokens_to_add()
    room = max_length - special
    if room < 1:
        raise UserError(f"config.data.max_length is {max_length}: {special} special tokens leave no room for text. Raise it.")
    whole = tokenizer(list(texts))
    found = []
    for row, text in enumerate(texts):
        length = len(whole["input_ids"][row]) - special
        if length <= room:
            found.append(_piece(whole, row, row, tokenizer))
            continue
        size = -(-length // -(-length // room))
        parts = tokenizer(text, truncation=True, max_length=size + special, stride=0, return_overflowing_tokens=True)
        found += [_piece(parts, part, row, tokenizer) for part in range(len(parts["input_ids"]))]
    return found


def _piece(encoded: Any, part: int, row: int, tokenizer: Any) -> Piece:
    tokens = np.asarray(encoded["input_ids"][part], np.int32)
    words = np.asarray([0 if word is None else word + 1 for word in encoded.word_ids(part)], np.int32)
    return Piece(row, tokens, np.where(np.isin(tokens, tokenizer.all_special_ids), 0, words))
