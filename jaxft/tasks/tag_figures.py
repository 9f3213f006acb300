"""Figures of tags: of whole entities by seqeval, of plain tags by scikit-learn."""

from collections.abc import Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from sklearn import metrics as sk

from jaxft.data.tags import as_seqeval, entities_of
from jaxft.tasks.base import Report, by_class

Texts = Sequence[Sequence[str]]  # the tags of each text


def entity_figures(true: Texts, made: Texts, scheme: str) -> dict[str, float]:
    """Returns precision, recall and F1 of entities, right where type and both ends are, and the share of words with the right tag.

    >>> entity_figures([["B-X", "I-X", "O", "B-X"]], [["B-X", "I-X", "B-X", "O"]], "IOB2")
    {'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'accuracy': 0.5}
    """
    precision, recall, f1, _ = precision_recall_fscore_support(*_given(true, made, scheme), average="micro", zero_division=0)
    right = [one == other for tags, others in zip(true, made, strict=True) for one, other in zip(tags, others, strict=True)]
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "accuracy": float(np.mean(right))}


def entity_report(true: Texts, made: Texts, scheme: str) -> Report:
    """Returns precision, recall and F1 of each type of entity."""
    kinds = sorted({entity.kind for tags in (*true, *made) for entity in entities_of(tags, scheme)})
    if not kinds:
        return Report()
    columns = precision_recall_fscore_support(*_given(true, made, scheme), average=None, zero_division=0)
    return Report((by_class("By type", ("type", "entities"), [kind or "all" for kind in kinds], columns),))


def _given(true: Texts, made: Texts, scheme: str) -> list[list[list[str]]]:
    return [[as_seqeval(tags, scheme) for tags in texts] for texts in (true, made)]


def plain_figures(true: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Returns the share of words with the right tag and the macro F1 of tags, given as classes, (words,) int."""
    return {"accuracy": float(np.mean(made == true)), "macro_f1": float(sk.f1_score(true, made, average="macro", zero_division=0))}


def plain_report(true: np.ndarray, made: np.ndarray, names: Sequence[str]) -> Report:
    """Returns precision, recall and F1 of each tag; arguments as of `plain_figures`, and the tags' names."""
    columns = sk.precision_recall_fscore_support(true, made, labels=np.arange(len(names)), zero_division=0)
    return Report((by_class("By tag", ("tag", "words"), names, columns),))
