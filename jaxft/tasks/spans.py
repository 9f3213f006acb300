"""From the scores of starts and ends to the answers of questions."""

import collections
from collections.abc import Sequence

import numpy as np

from jaxft.data.windows import NONE, Windows


def best_answers(
    examples: Windows, outputs: np.ndarray, n_best: int, max_answer_length: int, no_answer: bool, threshold: float
) -> list[str]:
    """Returns the answer to each row's question, a part of its context as it stands there, or "" for none.

    The likeliest starts and ends of each window are paired; of all windows' pairs the highest sum of the two scores wins. "" wins where
    the lowest sum at a window's first token is above that by more than the threshold: each window would have to be without an answer.

    Args:
      examples: the windows.
      outputs: (slots, 2) scores of start and end.
      n_best: starts and ends of a window that are paired.
      max_answer_length: tokens of an answer.
      no_answer: whether a question may have none.
      threshold: of the difference between the two sums.
    """
    by_row: dict[int, list[int]] = collections.defaultdict(list)
    for window, row in enumerate(examples.rows.tolist()):
        by_row[row].append(window)
    found = []
    for row, question in enumerate(examples.questions):
        none, spans = np.inf, []
        for window in by_row[row]:
            part = examples.slots.part(window)
            start, end = outputs[part].T
            none = min(none, float(start[NONE] + end[NONE]))
            spans += _spans(start, end, examples.spans[part], n_best, max_answer_length)
        best, text = _best(spans, question.context)
        found.append("" if no_answer and none - best > threshold else text)
    return found


def _spans(start: np.ndarray, end: np.ndarray, characters: np.ndarray, n_best: int, max_answer_length: int) -> list[tuple[float, int, int]]:
    """A window's pairs: their score, first character, and the one behind their last."""
    starts, ends = (np.argsort(-scores, kind="stable")[:n_best] for scores in (start, end))
    first, last = (grid.ravel() for grid in np.meshgrid(starts, ends, indexing="ij"))
    valid = (first != NONE) & (first <= last) & (last - first < max_answer_length)
    first, last = first[valid], last[valid]
    scores = start[first] + end[last]
    return list(zip(scores.tolist(), characters[first, 0].tolist(), characters[last, 1].tolist(), strict=True))


def _best(spans: Sequence[tuple[float, int, int]], context: str) -> tuple[float, str]:
    for score, first, last in sorted(spans, key=lambda span: -span[0]):
        if text := context[first:last].strip():
            return score, text
    return -np.inf, ""
