"""The rows as tokens, whole: their lengths, which tokens are scored, what would be cut, and rows that training would refuse."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.encode import check_fast
from jaxft.data.questions import Question
from jaxft.data.template import ChatTemplate, Span, chat_template
from jaxft.data.tokenize import CHUNK, scored_tokens, turn_tokens, unscored
from jaxft.data.windows import windows
from jaxft.data.words import pieces_of
from jaxft.errors import UserError
from jaxft.inspect.findings import Case, Finding, counted, finding, raw_spot, spot
from jaxft.inspect.texts import ANSWERS, CONVERSATION, TAGGING, UNCUT, Refused, Texts

_SPECIAL = 64  # tokens: more than any tokenizer adds to a pair of texts
_EMPTY = "is empty."  # how the reasons of empty rows end


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The readable rows of a set as tokens, before anything is cut."""

    tokens: tuple[np.ndarray, ...]  # each (length,) int32; empty where the template refuses the row
    scored: tuple[np.ndarray, ...]  # each (length,) bool
    refused: tuple[Refused, ...]  # what training would refuse of them
    max_length: int
    in_windows: bool = False  # rows longer than `max_length` are read in several windows, so that nothing is cut

    @property
    def whole_lengths(self) -> np.ndarray:
        """(rows,) int64: tokens of each row."""
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)

    @property
    def cut(self) -> np.ndarray:
        """(rows,) int64: tokens of each row beyond `max_length`."""
        return self.whole_lengths - self.lengths

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64: tokens of each row, once rows are cut."""
        return self.whole_lengths if self.in_windows else np.minimum(self.whole_lengths, self.max_length)

    @property
    def scored_share(self) -> float:
        """The share of the tokens that is scored, once rows are cut."""
        scored = sum(int(one[:length].sum()) for one, length in zip(self.scored, self.lengths, strict=True))
        return scored / max(int(self.lengths.sum()), 1)


def encode(texts: Texts, tokenizer: Any, config: DataConfig) -> Encoded:
    """Returns the set's rows as tokens.

    Args:
        texts: the set.
        tokenizer: a fast tokenizer of transformers.
        config: of it `template` and `max_length`.

    Raises:
        UserError: every row is refused: the template is at fault.
    """
    check_fast(tokenizer)
    if texts.kind == TAGGING:
        return _tagging(texts, tokenizer, config)
    if texts.kind == ANSWERS:
        return _questions(texts.questions, tokenizer, config.max_length)
    if texts.kind != CONVERSATION:
        whole = tuple(np.asarray(one, np.int32) for one in tokenizer(list(texts.texts))["input_ids"])
        # of masked language modelling a text that is too long is several examples, a choice that is too long is refused
        return Encoded(whole, tuple(np.zeros(len(one), bool) for one in whole), (), config.max_length, in_windows=texts.kind in UNCUT)
    template = chat_template(tokenizer, config.template)
    tokens, scored, refused = [], [], []
    for start in range(0, len(texts), CHUNK):
        for i, (row, turns, reason) in enumerate(_chunk(texts, range(start, min(start + CHUNK, len(texts))), tokenizer, template), start):
            mask = scored_tokens(len(row), turns, texts.conversations[i].everything)
            tokens.append(row)
            scored.append(mask)
            if reason := reason or unscored(mask, config.max_length):
                refused.append(Refused(texts.numbers[i], reason))
    if not any(map(len, tokens)):
        raise UserError(f"{texts.place(0)}: {refused[0].reason}")
    return Encoded(tuple(tokens), tuple(scored), tuple(refused), config.max_length)


def _tagging(texts: Texts, tokenizer: Any, config: DataConfig) -> Encoded:
    """The words as the task reads them, each scored at its first sub-word."""
    found = pieces_of(texts.words, tokenizer, [texts.place(i) for i in range(len(texts))])
    scored = tuple(np.isin(np.arange(len(one.tokens)), one.begins) for one in found)
    return Encoded(tuple(one.tokens for one in found), scored, (), config.max_length, in_windows=True)


def _questions(questions: Sequence[Question], tokenizer: Any, max_length: int) -> Encoded:
    """Each question with all of its context, the tokens of its answer scored; the first token where it has none."""
    if not questions:
        return Encoded((), (), (), max_length, in_windows=True)
    longest = max(len(text.encode()) for one in questions for text in (one.question, one.context))  # no text has more tokens than bytes
    whole = windows(questions, tokenizer, 2 * longest + _SPECIAL, 0, longest, takes_types=False)
    scored = []
    for i in range(len(whole)):
        part, mask = whole.slots.part(i), np.zeros(int(whole.lengths[i]), bool)
        reads, (first, last) = whole.slots.reads[part], whole.slots.targets[part].argmax(axis=0)
        mask[reads[first] : reads[last] + 1] = True
        scored.append(mask)
    return Encoded(tuple(whole.tokens_of(i) for i in range(len(whole))), tuple(scored), (), max_length, in_windows=True)


def _chunk(texts: Texts, numbers: Sequence[int], tokenizer: Any, template: ChatTemplate | None) -> list[tuple[np.ndarray, list[Span], str]]:
    """Returns tokens, scored turns and the reason of a refusal; row by row where the rows together are refused."""
    found = [texts.conversations[i] for i in numbers]
    places = [texts.place(i) for i in numbers]
    try:
        return [(*one, "") for one in turn_tokens(found, places, tokenizer, template)]
    except UserError as error:
        if len(numbers) == 1:
            return [(np.zeros(0, np.int32), [], str(error).removeprefix(f"{places[0]}: "))]
    return [one for i in numbers for one in _chunk(texts, [i], tokenizer, template)]


# ---------------------------------------------------------------- findings


def refused_rows(sets: Sequence[Texts], further: Sequence[Sequence[Refused]] = ()) -> list[Finding]:
    """Returns what is found of rows that are empty, and of others that training would refuse.

    Args:
        sets: the sets.
        further: of each set, what its tokens showed.
    """
    refused = [(texts, one) for texts, more in zip(sets, further or [()] * len(sets), strict=True) for one in (*texts.refused, *more)]
    blank = [(texts, one) for texts in sets for one in texts.blank]
    empty = [(texts, one) for texts, one in refused if one.reason.endswith(_EMPTY)]
    other = [(texts, one) for texts, one in refused if not one.reason.endswith(_EMPTY)]
    found = []
    if other:
        title = f"training refuses {counted(len(other), 'row')}"
        found.append(finding("refused", "error", title, "Mend or remove them: training stops at the first one.", _told(other)))
    if empty or blank:
        title = f"{counted(len(empty) + len(blank), 'row')} with an empty text"
        advice = "training stops at the first one" if empty else "there is nothing to learn from them"
        weight = "error" if empty else "warning"
        found.append(finding("empty", weight, title, f"Fill or remove them: {advice}.", _told([*empty, *blank])))
    return found


def _told(rows: Sequence[tuple[Texts, Refused]]) -> list[Case]:
    return [Case((raw_spot(texts, one.row),), one.reason) for texts, one in rows]


def cut_rows(
    sets: Sequence[Texts], cuts: Sequence[np.ndarray], max_length: int, scored: Sequence[Sequence[np.ndarray]] = ()
) -> list[Finding]:
    """Returns what is found of rows that are longer than `max_length`, the longest first.

    Args:
        sets: the sets.
        cuts: of each set, (rows,) the tokens cut.
        max_length: tokens a row.
        scored: of each set and row, which of its tokens are scored, uncut; where it isn't known, how many of the cut ones are isn't told.
    """
    found = []
    for number, texts in enumerate(sets):
        for i in np.flatnonzero(cuts[number]).tolist():
            note = f"{max_length + cuts[number][i]:,} tokens, {cuts[number][i]:,} of them cut"
            if scored and (lost := int(scored[number][i][max_length:].sum())):
                note += f", {lost:,} of those scored"
            found.append((int(cuts[number][i]), Case((spot(texts, i),), note)))
    if not found:
        return []
    found.sort(key=lambda one: -one[0])
    tokens, longest = sum(count for count, _ in found), max_length + found[0][0]
    verb = "is" if len(found) == 1 else "are"
    title = f"{counted(len(found), 'row')} {verb} longer than config.data.max_length, {max_length}: {counted(tokens, 'token')} cut"
    advice = (
        f"Raise config.data.max_length, up to {longest:,} to cut nothing, or shorten the texts: what is cut is the end, often the answer."
    )
    return [finding("cut", "warning", title, advice, [case for _, case in found])]
