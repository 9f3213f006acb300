"""What classes count in the training loss, as a user says or by the inverse of their frequency; and how frequent they are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxft.data.examples import Labelled
from jaxft.errors import UserError, unknown

ClassWeights = tuple[tuple[str, float], ...]


def check_weights(class_weights: ClassWeights, balanced: bool) -> None:
    """Raises `UserError` for weights that make no sense."""
    if balanced and class_weights:
        raise UserError("task.balanced sets the weights of the labels, and so does task.class_weights. Give one of them.")
    if wrong := [f"{name}:{weight}" for name, weight in class_weights if weight <= 0]:
        raise UserError(f"task.class_weights are above 0, not {wrong[0]}.")


def check_named(class_weights: ClassWeights, labels: Sequence[str]) -> None:
    """Raises `UserError` for the weight of a label that there isn't."""
    for name, _ in class_weights:
        if name not in labels:
            raise unknown("label in task.class_weights", name, labels)


def weighted(examples: Labelled, labels: Sequence[str], class_weights: ClassWeights, balanced: bool) -> Labelled:
    """Returns the examples, each slot with the weight of its class.

    Args:
      examples: the training set, its targets classes.
      labels: the names of the classes.
      class_weights: by name; 1 where it isn't named.
      balanced: all classes weigh alike: slots / (classes * slots of the class), as in scikit-learn.
    """
    if not (balanced or class_weights):
        return examples
    classes = examples.slots.targets
    if balanced:
        counts = np.bincount(classes, minlength=len(labels))
        by_class = len(classes) / (len(labels) * np.maximum(counts, 1))
    else:
        by_class = np.asarray([dict(class_weights).get(name, 1.0) for name in labels])
    slots = dataclasses.replace(examples.slots, weights=by_class[classes].astype(np.float32))
    return dataclasses.replace(examples, labelled=slots)


def log_shares(classes: np.ndarray, count: int) -> np.ndarray:
    """Returns the logarithm of the share of each of `count` classes, (count,): one that isn't there counts once, as nothing is impossible.

    >>> np.exp(log_shares(np.array([0, 0, 1]), 3)).round(2).tolist()
    [0.5, 0.33, 0.17]
    """
    return np.log((np.bincount(classes, minlength=count) + 1) / (len(classes) + count))
