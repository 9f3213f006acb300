"""Words as sub-words, and long texts in windows that overlap, so that every word stands in one of them with words around it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.encode import TOKEN_TYPES, check_fast
from jaxft.errors import UserError

CHUNK = 1000  # rows the tokenizer gets at once: it works on them in parallel


class Pieces(NamedTuple):
    """A row's words as a tokenizer gives them, whole."""

    tokens: np.ndarray  # (length,) int32, with special tokens at both ends
    token_types: np.ndarray | None  # (length,) int32
    begins: np.ndarray  # (words,) int: where each word's first sub-word stands
    before: int  # special tokens before the first word
    after: int  # and behind the last


class Window(NamedTuple):
    """A part of a row that a model reads at one time."""

    tokens: np.ndarray  # (length,) int32
    token_types: np.ndarray | None  # (length,) int32
    words: np.ndarray  # (scored,) int: the words that are scored here, none of which is in another window
    reads: np.ndarray  # (scored,) int: where in the window each one's first sub-word stands
    numbers: np.ndarray  # (length,) int: the number in the row of each token's word, from 1; 0 of special tokens


def fit_to_words(tokenizer: Any) -> Any:
    """Returns a tokenizer for single words; a byte-level BPE that tells a word by the space before it then adds that to each.

    That is transformers' own rule for such tokenizers: GPT-2's and RoBERTa's are loaded with add_prefix_space=True. It is changed in
    place, and written so.
    """
    check_fast(tokenizer)
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if type(splitter).__name__ == "ByteLevel" and not splitter.add_prefix_space:
        splitter.add_prefix_space = True
        tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
    return tokenizer


def pieces_of(rows: Sequence[Sequence[str]], tokenizer: Any, places: Sequence[str]) -> list[Pieces]:
    """Returns the rows' words as sub-words, as they are where they stand in a text with a space between them.

    A word that the tokenizer makes nothing of, as a sign that it strips, stands as its unknown token.

    Args:
      rows: each the words of one.
      tokenizer: as `fit_to_words` gives it.
      places: where each row stands, for messages.

    Raises:
      UserError: a word that is nothing to a tokenizer without an unknown token.
    """
    glues = _glues(tokenizer)
    found = []
    for start in range(0, len(rows), CHUNK):
        part = [_spaced(words) if glues else list(words) for words in rows[start : start + CHUNK]]
        encoded = tokenizer(part, is_split_into_words=True, verbose=False)  # no word of texts that are too long
        for i, words in enumerate(part):
            one, number = encoded, i
            if missing := sorted(set(range(len(words))) - set(encoded.word_ids(i))):
                if tokenizer.unk_token is None:
                    raise UserError(
                        f"{places[start + i]}: word {missing[0] + 1}, {words[missing[0]]!r}, is nothing to the tokenizer. Remove it and "
                        "its tag."
                    )
                known = [tokenizer.unk_token if at in missing else word for at, word in enumerate(words)]
                one, number = tokenizer([known], is_split_into_words=True, verbose=False), 0
            kinds = one.get(TOKEN_TYPES)
            found.append(_pieces(one["input_ids"][number], None if kinds is None else kinds[number], one.word_ids(number)))
    return found


def _glues(tokenizer: Any) -> bool:
    """Whether single words lack the space that stands before them in a text: byte-level BPE behind another splitter, as Llama 3's."""
    plain = {"add_special_tokens": False}
    return tokenizer(["a", "a"], is_split_into_words=True, **plain)["input_ids"] != tokenizer("a a", **plain)["input_ids"]


def _spaced(words: Sequence[str]) -> list[str]:
    return [word if i == 0 else f" {word}" for i, word in enumerate(words)]


def _pieces(tokens: Sequence[int], kinds: Sequence[int] | None, words: Sequence[int | None]) -> Pieces:
    numbers = np.asarray([-1 if word is None else word for word in words])
    own = np.flatnonzero(numbers >= 0)
    begins = np.unique(numbers[own], return_index=True)[1]
    types = None if kinds is None else np.asarray(kinds, np.int32)
    return Pieces(np.asarray(tokens, np.int32), types, own[begins], int(own[0]), len(tokens) - 1 - int(own[-1]))


def windows_of(row: Pieces, max_length: int, stride: int) -> list[Window]:
    """Returns a row as windows of at most `max_length` tokens, special tokens in each.

    A row that is too long is cut into as few windows as can share `stride` sub-words with their neighbours, all of one length and evenly
    spread. Each word is scored in the window where the nearer end is farthest from its first sub-word. A window that scores no word, in
    the midst of a very long one, is left out.

    Args:
      row: the row, whole.
      max_length: tokens of a window.
      stride: sub-words.

    Raises:
      UserError: windows that have no room for more than the stride.
    """
    special = row.before + row.after
    numbers = np.searchsorted(row.begins, np.arange(len(row.tokens)), side="right")
    numbers[len(numbers) - row.after :] = 0
    total, room = len(row.tokens) - special, max_length - special
    if total <= room:
        return [Window(row.tokens, row.token_types, np.arange(len(row.begins)), row.begins, numbers)]
    if room <= stride:
        raise UserError(
            f"config.data.max_length is {max_length}: a window of it holds {max(room, 0)} sub-words, and the next one shares {stride} of "
            "them, config.task.stride. Raise the one or lower the other."
        )
    count = -(-(total - stride) // (room - stride))
    starts = np.round(np.linspace(0, total - room, count)).astype(np.int64)
    places = row.begins - row.before
    context = np.minimum(places - starts[:, None], starts[:, None] + room - 1 - places)  # (windows, words); negative outside of one
    chosen = context.argmax(axis=0)
    found = []
    for number, start in enumerate(starts):
        words = np.flatnonzero(chosen == number)
        if len(words):
            part = _part(row.tokens, row, start, room)
            kinds = None if row.token_types is None else _part(row.token_types, row, start, room)
            found.append(Window(part, kinds, words, row.begins[words] - start, _part(numbers, row, start, room)))
    return found


def _part(values: np.ndarray, row: Pieces, start: int, room: int) -> np.ndarray:
    begin = row.before + start
    return np.concatenate([values[: row.before], values[begin : begin + room], values[len(values) - row.after :]])
