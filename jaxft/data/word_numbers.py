"""Which tokens of an example may be hidden, and which of them are one word: for what hides parts of a task's input."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.data.examples import Examples, NextTokens, Words, special_ids

_SPACES = ("▁", "Ġ", "Ċ", "ĉ", "č")  # how tokens begin that a space, a line's end or a tab stands before: SentencePiece, byte-level BPE


def word_numbers(examples: Examples, tokenizer: Any) -> np.ndarray:
    """Returns the number of each token's word, from 1, in its example; 0 where nothing may be hidden: (total,) int32.

    Special tokens may not be hidden; of conversations neither what the template puts around each turn, as the examples' common beginning
    and what stands at every border of scored turns alike. A word is the rows' own where they have words, else what a tokenizer of words
    splits, or what spaces part.

    Args:
      examples: the set; each example is numbered by itself.
      tokenizer: that made it.
    """
    free = ~np.isin(examples.tokens, list(special_ids(tokenizer)))
    if isinstance(examples, Words) and examples.token_words is not None:
        return np.where(free, examples.token_words, 0).astype(np.int32)
    if isinstance(examples, NextTokens):
        free &= ~template_tokens(examples)
    starts = free & _begins(examples.tokens, tokenizer)
    starts[1:] |= free[1:] & ~free[:-1]
    starts[examples.offsets[:-1]] = free[examples.offsets[:-1]]
    numbers = np.cumsum(starts)
    before = np.concatenate([[0], numbers])[examples.offsets[:-1]]
    return np.where(free, numbers - np.repeat(before, examples.lengths), 0).astype(np.int32)


def _begins(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Which tokens begin a word, (total,) bool."""
    kinds, places = np.unique(tokens, return_inverse=True)
    texts, model = tokenizer.convert_ids_to_tokens(kinds.tolist()), tokenizer.backend_tokenizer.model
    if type(model).__name__ == "WordLevel":
        found = [True for _ in texts]
    elif type(model).__name__ == "WordPiece":
        found = [not text.startswith(model.continuing_subword_prefix) for text in texts]
    else:
        found = [text.startswith(_SPACES) for text in texts]
    return np.asarray(found)[places]


def template_tokens(examples: NextTokens) -> np.ndarray:
    """Returns which tokens a chat template puts around the turns, (total,) bool, as all examples have them: what they begin with, what
    stands before each scored turn, and what stands between its end and the next turn.
    """
    found = np.zeros(len(examples.tokens), bool)
    first, before, after = [], [], []  # unscored parts, as (start, stop)
    for start, stop in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        edges = np.flatnonzero(np.diff(examples.scored[start:stop])) + 1 + start
        borders = [int(start), *map(int, edges), int(stop)]
        for begin, end in itertools.pairwise(borders):
            if not examples.scored[begin]:
                before += [(begin, end)] if end != stop else []
                after += [(begin, end)] if begin != start else []
        first.append((int(start), borders[1]))
    for parts, backwards in ((first, False), (before, True), (after, False)):
        shared = _shared([examples.tokens[begin:end] for begin, end in parts], backwards)
        for begin, end in parts:
            found[slice(end - shared, end) if backwards else slice(begin, begin + shared)] = True
    return found


def _shared(parts: Sequence[np.ndarray], backwards: bool) -> int:
    """How many tokens all parts begin with, or end with; of one part alone all, since its own can't be told from the template's."""
    shortest = min(map(len, parts), default=0)
    stacked = np.stack([(part[::-1] if backwards else part)[:shortest] for part in parts]) if shortest else np.zeros((1, 0))
    same = (stacked == stacked[0]).all(axis=0)
    return shortest if same.all() else int(same.argmin())
