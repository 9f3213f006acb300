"""FixMatch: the label of a weak view, where the model is sure of it, for a strong view of the same row.

Sohn et al. 2020, arXiv:2001.07685.
"""

import dataclasses
from typing import Any

import jax

from jaxft.objectives.base import Batch
from jaxft.objectives.pseudo_labels import Views, confident
from jaxft.objectives.unlabelled import cross_entropies


@dataclasses.dataclass(frozen=True)
class FixMatch(Views):
    """Cross-entropy of the strong view for the weak view's likeliest class, where that is at least `threshold` likely.

    The mean is over all unlabelled slots, those whose label isn't taken included.

    >>> FixMatch(threshold=0.9).weight
    1.0
    """

    def losses(self, teacher: jax.Array, student: jax.Array, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the cross-entropies, and which labels are taken."""
        labels, taken = confident(jax.nn.softmax(teacher), self.threshold)
        return cross_entropies(labels, student), taken
