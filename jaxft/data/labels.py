"""The label column of a classification data set: what kind of labels it has, their names, and each row's as numbers."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxft.data.rows import Rows
from jaxft.errors import UserError, nearest
from jaxft.models.heads import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL

_SHOWN = 12  # labels in a message
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")


@dataclasses.dataclass(frozen=True)
class LabelColumn:
    """The labels of one set, as its rows have them: names, numbers of classes, or values."""

    rows: Rows
    column: str
    values: tuple[Any, ...]  # one a row

    @property
    def is_named(self) -> bool:
        """Whether the data set's own feature names the classes, so that numbers are places in it."""
        return bool(getattr(self._feature, "names", None))  # datasets.ClassLabel

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names that the data set's own feature gives the classes; () where it doesn't."""
        return tuple(self._feature.names) if self.is_named else ()

    @property
    def _feature(self) -> Any:
        feature = self.rows.dataset.features[self.column]
        return getattr(feature, "feature", feature)  # of a list, that of its parts

    def kind(self) -> str:
        """Returns what kind of task the labels are for: lists name several classes, fractions are values, all else is one class.

        Text is a fraction where all labels are numbers and one of them isn't whole: in CSV and TSV files all values are text.

        Raises:
          UserError: a row without a label.
        """
        self._check_filled()
        if any(isinstance(value, (list, tuple)) for value in self.values):
            numbers = [part for value in self.values if isinstance(value, (list, tuple)) for part in value]
            return REGRESSION if numbers and all(isinstance(part, float) for part in numbers) else MULTI_LABEL
        return REGRESSION if any(isinstance(value, float) for value in self.values) or _are_fractions(self.values) else SINGLE_LABEL

    def names(self) -> tuple[str, ...]:
        """Returns the names of the classes: those of the data set's own feature, or the distinct labels, sorted."""
        self._check_filled()
        if self.is_named:
            return self.feature_names
        return distinct({part for value in self.values for part in (value if isinstance(value, (list, tuple)) else (value,))})

    def classes(self, names: Sequence[str], named: bool) -> np.ndarray:
        """Returns the class of each row, (n,) int32.

        Args:
          names: of the classes, in their order.
          named: whether a whole number is the place of a class in `names` (given by the user, or by the data set's own feature), not a
            name of its own.
        """
        return np.asarray([self._class(value, i, names, named) for i, value in enumerate(self.values)], np.int32)

    def indicators(self, names: Sequence[str], named: bool) -> np.ndarray:
        """Returns which classes each row has, (n, classes) float32 of 0 and 1."""
        found = np.zeros((len(self.values), len(names)), np.float32)
        for i, value in enumerate(self.values):
            found[i, self._classes(value, i, names, named)] = 1
        return found

    def numbers(self, count: int) -> np.ndarray:
        """Returns each row's values, (n, count) float32."""
        return np.asarray([self._numbers(value, i, count) for i, value in enumerate(self.values)], np.float32)

    def faults(self, problem: str, names: Sequence[str], named: bool) -> dict[int, str]:
        """Returns the rows whose labels aren't of this kind or not among these names, and why; arguments as of `classes`."""
        read: Callable[[int], Any] = {
            REGRESSION: lambda i: self._numbers(self.values[i], i, len(names)),
            MULTI_LABEL: lambda i: self._classes(self.values[i], i, names, named),
            SINGLE_LABEL: lambda i: self._class(self.values[i], i, names, named),
        }[problem]
        return self.rows.faults(read)

    def _classes(self, value: Any, i: int, names: Sequence[str], named: bool) -> list[int]:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self._place(i)}: column '{self.column}' is no list of labels, as other rows have, but {value!r}.")
        return [self._class(part, i, names, named) for part in value]

    def _numbers(self, value: Any, i: int, count: int) -> list[float]:
        try:
            found = [float(part) for part in (value if isinstance(value, (list, tuple)) else (value,))]
        except (TypeError, ValueError):  # text of a CSV file may be a number
            found = []
        if len(found) != count or not np.isfinite(found).all():
            wanted = "a number" if count == 1 else f"{count} numbers"
            raise UserError(f"{self._place(i)}: column '{self.column}' is {value!r}; regression needs {wanted}.")
        return found

    def _class(self, value: Any, i: int, names: Sequence[str], named: bool) -> int:
        return class_of(value, names, named, f"{self._place(i)}: label")

    def _check_filled(self) -> None:
        for i, value in enumerate(self.values):
            parts = value if isinstance(value, (list, tuple)) else (value,)
            if any(part is None or (isinstance(part, str) and not part.strip()) for part in parts):
                raise UserError(f"{self._place(i)}: column '{self.column}' is empty: the row has no label. Fill it, or remove the row.")
            if wrong := [part for part in parts if not isinstance(part, str | int | float)]:
                raise UserError(
                    f"{self._place(i)}: column '{self.column}' holds {wrong[0]!r}. A label is a text or a number, or a list of such."
                )

    def _place(self, i: int) -> str:
        return self.rows.place(i)


def _are_fractions(values: Sequence[Any]) -> bool:
    """Whether text is written as numbers, one of them at least with a fraction.

    >>> _are_fractions(["0.5", "2"]), _are_fractions(["1", "2"]), _are_fractions(["0.5", "good"])
    (True, False, False)
    """
    if not all(isinstance(value, str) for value in values):
        return False
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return any(math.isfinite(number) and not _WHOLE.fullmatch(value) for number, value in zip(numbers, values, strict=True))


def distinct(values: Collection[Any]) -> tuple[str, ...]:
    """Returns the names of distinct labels, sorted: numbers by their size, all else as text."""
    return tuple(map(str, sorted(values) if all(isinstance(value, int) for value in values) else sorted(map(str, values))))


def class_of(value: Any, names: Sequence[str], named: bool, what: str) -> int:
    """Returns the class of a label: its place in `names`.

    Args:
      value: as the row has it.
      names: of the classes, in their order.
      named: whether a whole number is the place of a class in `names`, not a name of its own.
      what: the label's place and what it is called, as "train.jsonl, line 3: label", for messages.
    """
    if named and isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(names):
            return value
        raise UserError(f"{what} {value} is none of the {len(names)} classes, 0 to {len(names) - 1}.")
    if value is None or (text := str(value)) not in names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise UserError(
            f"{what} '{value}' is none of the model's.{nearest(str(value), list(names))} They are: {shown}. Correct the row, or name all "
            "labels in config.task.labels."
        )
    return names.index(text)


def label_column(rows: Rows, column: str) -> LabelColumn:
    """Returns a set's labels; raises `UserError` where there is no such column."""
    columns = rows.dataset.column_names
    if column not in columns:
        raise UserError(
            f"{rows.name} has no column '{column}' of labels.{nearest(column, columns)} It has: {', '.join(columns)}. Name the one that "
            "holds them in config.data.label."
        )
    return LabelColumn(rows, column, tuple(rows.dataset[column]))


def problem_of(column: LabelColumn, wanted: str) -> str:
    """Returns the kind of task: `wanted`, or where that is auto, what the labels look like."""
    if wanted == "auto":
        return column.kind()
    assert wanted in PROBLEM_TYPES
    return wanted
