"""From the scores of starts and ends to the answers of questions, and what SQuAD's own script measures of them."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from jaxft.data.questions import Question
from jaxft.data.windows import NONE, Windows

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


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


# ---------------------------------------------------------------- SQuAD's figures


def normalized(text: str) -> str:
    """Returns what of an answer is compared: lower case, without punctuation, articles and more than single spaces.

    >>> normalized("The  Birth-Control, a pill")
    'birthcontrol pill'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(made: str, answers: Sequence[str]) -> float:
    """Returns whether an answer is one of the true ones; without such, whether it is empty.

    >>> exact_match("the migraine", ["Migraine", "headache"]), exact_match("", [])
    (1.0, 1.0)
    """
    return max(float(normalized(made) == normalized(true)) for true in _true(answers))


def f1(made: str, answers: Sequence[str]) -> float:
    """Returns the F1 of an answer's words, that of the nearest true answer.

    >>> f1("chronic migraine", ["migraine"])
    0.6666666666666666
    """
    return max(_f1(normalized(made).split(), normalized(true).split()) for true in _true(answers))


def _true(answers: Sequence[str]) -> Sequence[str]:
    return [text for text in answers if normalized(text)] or [""]


def _f1(made: Sequence[str], true: Sequence[str]) -> float:
    if not made or not true:  # no answer: right or wrong as a whole
        return float(made == true)
    same = sum((collections.Counter(made) & collections.Counter(true)).values())
    return 2 * same / (len(made) + len(true))


def squad_figures(made: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Returns exact match and F1, of all questions and, where some have an answer and some don't, of each kind.

    Of questions without an answer the two are one: the share that got none.
    """
    texts = [[answer.text for answer in question.answers] for question in questions]
    exact = np.asarray([exact_match(*pair) for pair in zip(made, texts, strict=True)])
    words = np.asarray([f1(*pair) for pair in zip(made, texts, strict=True)])
    found = {"exact_match": float(exact.mean()), "f1": float(words.mean())}
    has = np.asarray([bool(own) for own in texts])
    if has.all() or not has.any():
        return found
    of_kinds = {"exact_match_answered": exact[has], "answered_f1": words[has], "exact_match_unanswerable": exact[~has]}
    return found | {name: float(values.mean()) for name, values in of_kinds.items()}
