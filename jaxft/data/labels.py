"""The label column of a classification data set: what kind of labels it has, their names, and each row's as numbers."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxft.data.rows import Rows
from jaxft.errors import UserError, nearest
from jaxft.models.heads import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL

_SHOWN = 12  # labels in a message
_UNNAMED = "LABEL_"  # what transformers calls a class without a name
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

    @functools.cached_property
    def is_multi_hot(self) -> bool:
        """Whether each row says of every class by 0 or 1 whether it is one of its own, as transformers has several labels."""
        first = self.values[0] if self.values else ()
        size = len(first) if isinstance(first, (list, tuple)) else 0
        return not self.is_named and size > 1 and all(_is_multi_hot(value, size) for value in self.values)

    def kind(self) -> str:
        """Returns what kind of task the labels are for: lists name several classes, or say of each by 0 or 1 whether it is one; other lists
        of fractions, and fractions, are values; all else is one class.

        Text is a fraction where all labels are numbers and one of them isn't whole: in CSV and TSV files all values are text.

        Raises:
          UserError: a row without a label.
        """
        self._check_filled()
        if self.is_multi_hot:
            return MULTI_LABEL
        if any(isinstance(value, (list, tuple)) for value in self.values):
            numbers = [part for value in self.values if isinstance(value, (list, tuple)) for part in value]
            return REGRESSION if numbers and all(isinstance(part, float) for part in numbers) else MULTI_LABEL
        return REGRESSION if any(isinstance(value, float) for value in self.values) or _are_fractions(self.values) else SINGLE_LABEL

    def names(self) -> tuple[str, ...]:
        """Returns the names of the classes: those of the data set's own feature, the distinct labels, sorted, or of rows that say 0 or 1 of
        each class, transformers' names.
        """
        self._check_filled()
        if self.is_named:
            return self.feature_names
        if self.is_multi_hot:
            return _unnamed(len(self.values[0]))
        return distinct({part for value in self.values for part in (value if isinstance(value, (list, tuple)) else (value,))})

    def classes(self, names: Sequence[str], given: Sequence[str]) -> np.ndarray:
        """Returns the class of each row, (n,) int32.

        Args:
          names: of the classes, in their order.
          given: the user's own names, where there are some.
        """
        return np.asarray([self._class(value, i, names, given) for i, value in enumerate(self.values)], np.int32)

    def indicators(self, names: Sequence[str], given: Sequence[str]) -> np.ndarray:
        """Returns which classes each row has, (n, classes) float32 of 0 and 1; arguments as of `classes`."""
        found = np.zeros((len(self.values), len(names)), np.float32)
        for i, value in enumerate(self.values):
            found[i, self._classes(value, i, names, given)] = 1
        return found

    def numbers(self, count: int) -> np.ndarray:
        """Returns each row's values, (n, count) float32."""
        return np.asarray([self._numbers(value, i, count) for i, value in enumerate(self.values)], np.float32)

    def faults(self, problem: str, names: Sequence[str], given: Sequence[str]) -> dict[int, str]:
        """Returns the rows whose labels aren't of this kind or not among these names, and why; arguments as of `classes`."""
        read: Callable[[int], Any] = {
            REGRESSION: lambda i: self._numbers(self.values[i], i, len(names)),
            MULTI_LABEL: lambda i: self._classes(self.values[i], i, names, given),
            SINGLE_LABEL: lambda i: self._class(self.values[i], i, names, given),
        }[problem]
        return self.rows.faults(read)

    def _classes(self, value: Any, i: int, names: Sequence[str], given: Sequence[str]) -> list[int]:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self._place(i)}: column '{self.column}' is no list of labels, as other rows have, but {value!r}.")
        if self.is_multi_hot and (given or names[0].startswith(_UNNAMED)):  # else 0 and 1 are names of the training rows
            own = given or _unnamed(len(names))
            if len(value) != len(own):
                raise UserError(
                    f"{self._place(i)}: column '{self.column}' has 0 or 1 for each of {len(value)} labels, and the model has {len(own)}: "
                    f"{_shown(own)}."
                )
            return [class_of(number, names, own, self._place(i)) for number, part in enumerate(value) if part]
        return [self._class(part, i, names, given) for part in value]

    def _numbers(self, value: Any, i: int, count: int) -> list[float]:
        try:
            found = [float(part) for part in (value if isinstance(value, (list, tuple)) else (value,))]
        except (TypeError, ValueError):  # text of a CSV file may be a number
            found = []
        if len(found) != count or not np.isfinite(found).all():
            wanted = "a number" if count == 1 else f"{count} numbers"
            raise UserError(f"{self._place(i)}: column '{self.column}' is {value!r}; regression needs {wanted}.")
        return found

    def _class(self, value: Any, i: int, names: Sequence[str], given: Sequence[str]) -> int:
        return class_of(value, names, names_of(self.feature_names, given), f"{self._place(i)}: label")

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


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"{_UNNAMED}{number}" for number in range(count))


def _is_multi_hot(value: Any, size: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == size and all(not isinstance(part, str) and part in (0, 1) for part in value)


def distinct(values: Collection[Any]) -> tuple[str, ...]:
    """Returns the names of distinct labels, sorted: whole numbers by their size, in text files too, all else as text.

    >>> distinct({"10", "9"}), distinct({"10", "9", "none"})
    (('9', '10'), ('10', '9', 'none'))
    """
    names = set(map(str, values))
    return tuple(sorted(names, key=int) if all(_WHOLE.fullmatch(name) for name in names) else sorted(names))


def class_of(value: Any, names: Sequence[str], own: Sequence[str], what: str) -> int:
    """Returns the class of a label: its place in `names`.

    Args:
      value: as the row has it.
      names: of the model's classes, in their order.
      own: of `names_of`; where there are some, a whole number is a place in them, also one written as text that is no name.
      what: the label's place and what it is called, as "train.jsonl, line 3: label", for messages.
    """
    if own and isinstance(value, str) and value not in names and value.strip().isdecimal():
        value = int(value)
    if own and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(own):
            raise UserError(f"{what} {value} is none of the {len(own)} classes, 0 to {len(own) - 1}.")
        value = own[value]
    if value is None or (text := str(value)) not in names:
        raise UserError(
            f"{what} '{value}' is none of the model's.{nearest(str(value), list(names))} They are: {_shown(names)}. Correct the row, or "
            "name all labels in config.task.labels."
        )
    return names.index(text)


def names_of(feature: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    """Returns what whole numbers of a set are places in, which may have another order than the model's names; () for names themselves.

    Args:
      feature: the names that the data set's own feature gives them; () where it doesn't.
      given: the user's names, which may be other ones for the same places; () where there are none.
    """
    return feature if not given or (feature and set(feature) <= set(given)) else given


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


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
