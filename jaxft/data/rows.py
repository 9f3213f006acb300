"""Rows of a data set, and where each stands in its source."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.errors import UserError

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one set, and where each stands in its source."""

    dataset: "datasets.Dataset"
    name: str  # "train.jsonl", "owner/name:train", "bundled:drug-reviews:test"
    unit: str  # what `numbers` count: "line" or "row"
    numbers: np.ndarray  # (n,) int64: the line or row of each, from 1

    def __len__(self) -> int:
        return len(self.dataset)

    def place(self, i: int) -> str:
        """Returns where row `i` stands, as "train.jsonl, line 17"."""
        return f"{self.name}, {self.unit} {self.numbers[i]}"

    def select(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """Returns these rows only, in this order."""
        return dataclasses.replace(self, dataset=self.dataset.select(indices), numbers=self.numbers[np.asarray(indices, dtype=np.int64)])

    def faults(self, read: Callable[[int], Any]) -> dict[int, str]:
        """Returns the rows that `read`, of a row's number, raises `UserError` for, and why: its message without the place."""
        found = {}
        for i in range(len(self)):
            try:
                read(i)
            except UserError as error:
                found[i] = str(error).removeprefix(f"{self.place(i)}: ")
        return found
