"""Labels of a set: which kind they are of, their names, and numbers that are places in the set's own names, the user's or the model's."""

import datasets
import numpy as np
import pytest

from jaxft.data.labels import distinct, label_column
from jaxft.data.rows import Rows
from jaxft.errors import UserError
from jaxft.models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def column(values, feature=None):
    features = None if feature is None else datasets.Features({"label": feature})
    rows = datasets.Dataset.from_dict({"label": values}, features=features)
    return label_column(Rows(rows, "a.jsonl", "line", np.arange(1, len(values) + 1)), "label")


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("good", "bad"), (), [1, 0, 1]),  # the model's order isn't the set's
        (("bad", "good"), (), [0, 1, 0]),
        (("good", "bad"), ("good", "bad"), [1, 0, 1]),  # the set's own names count before the place in the user's
        (("no", "yes"), ("no", "yes"), [0, 1, 0]),  # the user's are other names for the same places
        (("yes", "no"), ("no", "yes"), [1, 0, 1]),  # which the model's files have in another order
    ],
)
def test_numbers_of_a_feature_are_what_it_calls_them(names, given, expected):
    found = column([0, 1, 0], datasets.ClassLabel(names=["bad", "good"]))
    assert found.classes(names, given).tolist() == expected
    assert not found.faults(SINGLE_LABEL, names, given)
    several = column([[0], [0, 1], []], datasets.Sequence(datasets.ClassLabel(names=["bad", "good"])))
    rows = [[expected[0]], expected[:2], []]
    assert several.indicators(names, given).tolist() == [[float(place in row) for place in range(2)] for row in rows]


def test_a_feature_with_names_that_the_model_lacks_is_refused():
    with pytest.raises(UserError, match=r"a.jsonl, line 1: label 'a' is none of the model's"):
        column([0, 1], datasets.ClassLabel(names=["a", "b"])).classes(("b", "c"), ())
    with pytest.raises(UserError, match=r"line 2: label -1 is none of the 2 classes, 0 to 1"):
        column([0, -1], datasets.ClassLabel(names=["a", "b"])).classes(("a", "b"), ())


def test_numbers_in_text_are_places_among_given_names():
    """As CSV files have them."""
    assert column(["0", "1", "no"]).classes(("no", "yes"), ("no", "yes")).tolist() == [0, 1, 0]
    assert column(["1", "0"]).classes(("1", "0"), ("1", "0")).tolist() == [0, 1]  # a name is that name
    with pytest.raises(UserError, match=r"line 1: label 2 is none of the 2 classes"):
        column(["2"]).classes(("no", "yes"), ("no", "yes"))
    with pytest.raises(UserError, match="label '0' is none of the model's"):
        column(["0"]).classes(("no", "yes"), ())


def test_names_that_are_numbers_are_sorted_by_size():
    assert distinct({"10", "9", "-1"}) == distinct({10, 9, -1}) == ("-1", "9", "10")
    assert distinct({"10", "9", "x"}) == ("10", "9", "x")


@pytest.mark.parametrize("kind", [int, float, bool])
def test_lists_of_0_and_1_say_it_of_each_class(kind):
    values = [[kind(part) for part in row] for row in ((1, 0, 0), (0, 1, 1), (0, 0, 0))]
    found = column(values)
    assert found.kind() == MULTI_LABEL
    assert found.names() == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.indicators(found.names(), ()).tolist() == np.asarray(values, float).tolist()
    assert found.indicators(("c", "a", "b"), ("a", "b", "c")).tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    with pytest.raises(UserError, match=r"line 1: column 'label' has 0 or 1 for each of 3 labels, and the model has 2: a, b"):
        found.indicators(("a", "b"), ("a", "b"))


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([[0, 1], [1]], MULTI_LABEL, ("0", "1")),
        ([[0], [1]], MULTI_LABEL, ("0", "1")),
        ([["0", "1"], ["1", "1"]], MULTI_LABEL, ("0", "1")),
        ([[0, 2], [1, 0]], MULTI_LABEL, ("0", "1", "2")),
        ([[0.5, 1.0], [0.0, 1.0]], REGRESSION, None),
    ],
    ids=str,
)
def test_other_lists_are_names_or_values(values, kind, names):
    found = column(values)
    assert found.kind() == kind
    assert names is None or found.names() == names


def test_names_of_training_rows_that_are_0_and_1_stay_names():
    assert column([[0, 1], [1, 0]]).indicators(("0", "1"), ()).tolist() == [[1, 1], [1, 1]]
