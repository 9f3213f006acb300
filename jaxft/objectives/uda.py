"""Unsupervised data augmentation: the sharpened distribution of a weak view for a strong view of the same row.

Xie et al. 2019, arXiv:1904.12848; without its schedule that holds labelled rows back.
"""

import dataclasses
from typing import Any

import jax

from jaxft.errors import UserError
from jaxft.objectives.base import Batch
from jaxft.objectives.pseudo_labels import Views, confident
from jaxft.objectives.unlabelled import divergence


@dataclasses.dataclass(frozen=True)
class UDA(Views):
    """Divergence of the strong view's distribution from the weak view's, sharpened, where that is at least `threshold` likely somewhere.

    >>> UDA(temperature=0.4).threshold
    0.45
    """

    threshold: float = 0.45  # probability of the likeliest class, before it is sharpened, from which a row is used
    temperature: float = 0.85  # that the weak view's logits are divided by: below 1 makes it surer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0.0:
            raise UserError(f"objective.temperature is more than 0, not {self.temperature}.")

    def losses(self, teacher: jax.Array, student: jax.Array, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the divergences, and which rows are used."""
        _, taken = confident(jax.nn.softmax(teacher), self.threshold)
        return divergence(jax.nn.softmax(teacher / self.temperature), student), taken
