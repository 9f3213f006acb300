"""Texts, alone or in pairs, in the form that a tokenizer gives them, special tokens and all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.errors import UserError

TOKEN_TYPES = "token_type_ids"


class Encoded(NamedTuple):
    """One text, or one pair."""

    tokens: np.ndarray  # (length,) int32
    token_types: np.ndarray | None  # (length,) int32: which text of a pair each token is of; None where the tokenizer tells no difference
    cut: int  # tokens that max_length cut


def encode(texts: Sequence[str], pairs: Sequence[str], tokenizer: Any, max_length: int, places: Sequence[str]) -> list[Encoded]:
    """Returns the texts as tokens; of what is too long the longer text of a pair is cut first.

    Args:
      texts: the texts.
      pairs: the second text of each, or empty.
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
    special = tokenizer.num_special_tokens_to_add(pair=bool(pairs))
    if max_length <= special:
        raise UserError(f"config.data.max_length is {max_length}: {special} special tokens leave no room for text. Raise it.")
    whole = tokenizer(list(texts), list(pairs) or None)
    lengths = [len(one) for one in whole["input_ids"]]
    found = [Encoded(*_part(whole, i), 0) for i in range(len(lengths))]
    long = [i for i, length in enumerate(lengths) if length > max_length]
    if long:
        second = [pairs[i] for i in long] if pairs else None
        short = tokenizer([texts[i] for i in long], second, truncation=True, max_length=max_length)
        for number, i in enumerate(long):
            found[i] = Encoded(*_part(short, number), lengths[i] - max_length)
    return found


def check_fast(tokenizer: Any) -> None:
    """Raises `UserError` for a tokenizer that has no tokenizer.json."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer. Save it with its tokenizer.json (`tokenizers` library).")


def _part(encoded: Any, i: int) -> tuple[np.ndarray, np.ndarray | None]:
    kinds = encoded.get(TOKEN_TYPES)
    return np.asarray(encoded["input_ids"][i], np.int32), None if kinds is None else np.asarray(kinds[i], np.int32)


def joined(encoded: Sequence[Encoded], takes_types: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns the flat arrays of `Examples`: tokens, offsets, cut, and what stands beside each token.

    Args:
      encoded: the examples.
      takes_types: whether the model tells the texts of a pair apart.
    """
    tokens = np.concatenate([one.tokens for one in encoded])
    offsets = np.cumsum([0, *(len(one.tokens) for one in encoded)], dtype=np.int64)
    cut = np.asarray([one.cut for one in encoded], np.int32)
    kinds = [one.token_types for one in encoded]
    beside = {TOKEN_TYPES: np.concatenate([kind for kind in kinds if kind is not None])} if takes_types and kinds[0] is not None else {}
    return tokens, offsets, cut, beside
