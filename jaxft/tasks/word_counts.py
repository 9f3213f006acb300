"""A linear model of word counts, by scikit-learn: what a task's figures stand beside, and what finds labels that look wrong."""

from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

WORD = r"\w+"
MOST_TEXTS = 20_000  # that it is made for
_MOST_WORDS = 200_000


def word_model(longest: int, balanced: bool) -> Any:
    """Returns an untrained pipeline: logistic regression on TF-IDF of words.

    Args:
      longest: words in a row that count as one more, at most.
      balanced: whether all classes weigh alike.
    """
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, longest), token_pattern=WORD, max_features=_MOST_WORDS)
    return make_pipeline(words, LogisticRegression(C=10.0, class_weight="balanced" if balanced else None, max_iter=300, tol=1e-3))
