"""Three rows as the model sees them: what the template makes of them, which tokens are scored, which are cut."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.inspect.encoded import Encoded
from jaxft.inspect.texts import Texts

GIVEN, SCORED, CUT = "given", "scored", "cut"
_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character
_MOST_BYTES = 8  # tokens of one character


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token, or the few that make one character."""

    text: str
    state: str  # GIVEN, SCORED or CUT


@dataclasses.dataclass(frozen=True)
class Shown:
    """One row."""

    place: str
    which: str  # "the shortest row", ...
    pieces: tuple[Piece, ...]
    answer: str  # of a row none of whose tokens is scored: its label

    def runs(self) -> list[Piece]:
        """Returns the text in pieces of one state each."""
        runs: list[Piece] = []
        for piece in self.pieces:
            if runs and runs[-1].state == piece.state:
                runs[-1] = Piece(runs[-1].text + piece.text, piece.state)
            else:
                runs.append(piece)
        return runs


def three_rows(texts: Texts, encoded: Encoded, tokenizer: Any) -> list[Shown]:
    """Returns the shortest row, one of median length, and the longest; fewer where the set has fewer."""
    order = [int(i) for i in np.argsort(encoded.whole_lengths, kind="stable") if len(encoded.tokens[i])]
    chosen = {order[0]: "the shortest row", order[-1]: "the longest row", order[len(order) // 2]: "a row of median length"}
    return [_shown(texts, encoded, i, chosen[i], tokenizer) for i in sorted(chosen, key=order.index)]


def _shown(texts: Texts, encoded: Encoded, i: int, which: str, tokenizer: Any) -> Shown:
    tokens, scored, length = encoded.tokens[i], encoded.scored[i], encoded.lengths[i]
    states = [CUT if at >= length else SCORED if scored[at] else GIVEN for at in range(len(tokens))]
    which = f"{which}, {len(tokens):,} tokens, {sum(state == SCORED for state in states):,} scored"
    return Shown(texts.place(i), which, tuple(pieces(tokens.tolist(), states, tokenizer)), "" if scored.any() else texts.answers[i])


def pieces(tokens: Sequence[int], states: Sequence[str], tokenizer: Any) -> list[Piece]:
    """Returns the text of each token as it stands among the others: together they are the text of them all.

    Args:
        tokens: the row.
        states: of each token.
        tokenizer: of transformers.
    """

    def text(start: int, stop: int) -> str:
        return tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False)

    found, start = [], 0
    for stop in range(1, len(tokens) + 1):
        before = max(start - 1, 0)  # a token by itself may lose the space before it
        piece = text(before, stop)[len(text(before, start)) :]
        if piece.endswith(_UNFINISHED) and stop - start < _MOST_BYTES and stop < len(tokens):
            continue
        found.append(Piece(piece, states[start]))
        start = stop
    return found
