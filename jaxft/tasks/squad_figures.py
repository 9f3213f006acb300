"""Answers against true ones as SQuAD's own script compares them (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822)."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from jaxft.data.questions import Question

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Returns what of an answer is compared: lower case, without punctuation, articles and more than single spaces.

    >>> normalized("The  Birth-Control, a pill")
    'birthcontrol pill'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(made: str, true: str) -> float:
    """Returns the F1 of the words that two texts share; where one has none, whether the other has none either.

    >>> word_f1("chronic migraine", "The migraine")
    0.6666666666666666
    """
    one, other = normalized(made).split(), normalized(true).split()
    if not one or not other:
        return float(one == other)
    return 2 * sum((collections.Counter(one) & collections.Counter(other)).values()) / (len(one) + len(other))


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
    return max(word_f1(made, true) for true in _true(answers))


def _true(answers: Sequence[str]) -> Sequence[str]:
    return [text for text in answers if normalized(text)] or [""]


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
