"""Folds: each row held out once, classes in their shares, and folds that make no sense."""

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.config import DataConfig
from jaxft.data.folds import check, cut_fold, folds_of, folds_of_groups
from jaxft.data.sources import Rows, load_splits
from jaxft.errors import UserError
from jaxft.tasks import QuestionAnswering


def rows(count):
    return Rows(datasets.Dataset.from_dict({"number": list(range(count))}), "rows.jsonl", "line", np.arange(1, count + 1))


@given(st.integers(2, 8), st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(0, 5))
def test_folds_have_one_size_and_their_share_of_each_class(folds, classes, seed):
    found = folds_of(len(classes), folds, seed, np.array(classes))
    for chosen in (np.ones(len(classes), bool), *(np.array(classes) == one for one in set(classes))):
        counts = np.bincount(found[chosen], minlength=folds)
        assert len(counts) == folds
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("classes", [None, np.arange(17) % 3])
def test_each_row_is_held_out_once_and_trained_on_otherwise(classes):
    held = []
    for fold in range(4):
        sets = cut_fold(rows(17), DataConfig(folds=4, fold=fold), 0, classes)
        parts = [found.dataset["number"] for found in (sets["train"], sets["validation"])]
        assert sorted([*parts[0], *parts[1]]) == list(range(17))
        held += parts[1]
    assert sorted(held) == list(range(17))


@given(st.integers(2, 5), st.lists(st.integers(0, 9), min_size=8, max_size=60), st.integers(0, 5))
def test_a_group_of_rows_stays_in_one_fold_and_no_fold_is_larger_than_the_largest_group_makes_it(folds, groups, seed):
    groups = np.array(groups)
    found = folds_of_groups(groups, folds, seed)
    assert all(len(set(found[groups == group].tolist())) == 1 for group in groups)
    counts = np.bincount(found, minlength=folds)
    assert counts.max() - counts.min() <= np.bincount(groups).max()


def questions():
    """Twelve questions on four contexts, those of one apart from each other."""
    asked = [{"question": f"q{i}", "context": f"text {i % 4}", "answers": {"text": [], "answer_start": []}} for i in range(12)]
    return Rows(datasets.Dataset.from_list(asked), "rows.jsonl", "line", np.arange(1, 13))


def test_questions_on_one_context_stay_together_in_folds_and_sets(tmp_path):
    task, rows = QuestionAnswering(), questions()
    for fold in range(3):
        sets = cut_fold(rows, DataConfig(folds=3, fold=fold), 0, None, task.row_groups(rows))
        assert not set(sets["train"].dataset["context"]) & set(sets["validation"].dataset["context"])
        assert len(sets["train"]) + len(sets["validation"]) == 12
    with pytest.raises(UserError, match="rows.jsonl has 4 groups of rows that belong together.* too few for 5 folds"):
        cut_fold(rows, DataConfig(folds=5, fold=0), 0, None, task.row_groups(rows))
    rows.dataset.to_json(tmp_path / "rows.jsonl")
    sets = load_splits(DataConfig(train=str(tmp_path / "rows.jsonl"), split=(0.5, 0.25, 0.25)), 0, grouped=task.row_groups)
    contexts = [set(found.dataset["context"]) for found in sets.values()]
    assert sum(map(len, contexts)) == 4
    assert sum(map(len, sets.values())) == 12


def test_the_seed_draws_the_folds():
    assert folds_of(40, 4, 0).tolist() == folds_of(40, 4, 0).tolist() != folds_of(40, 4, 1).tolist()


def test_no_validation_set_is_cut_beside_folds_but_a_test_set_is(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(20)))
    found = load_splits(DataConfig(train=str(tmp_path / "rows.jsonl"), split=(0.7, 0.2, 0.1), folds=3), 0)
    assert {name: len(part) for name, part in found.items()} == {"train": 18, "test": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"folds": 1}, "config.data.folds is 1: one part is held out and the others train, so give 2 or more, or 0 for none."),
        ({"folds": -3}, "config.data.folds is -3: "),
        ({"folds": 3, "fold": 3}, "config.data.fold is 3: 3 folds are numbered 0 to 2, and -1 is each in its turn."),
        ({"folds": 3, "fold": -2}, "config.data.fold is -2: "),
        ({"fold": 1}, "config.data.fold is 1, but there are no folds"),
        ({"folds": 3, "validation": "x.jsonl"}, "config.data.folds holds out parts of the training rows, and config.data.validation gives"),
    ],
)
def test_folds_that_make_no_sense_are_refused(config, message):
    with pytest.raises(UserError) as caught:
        check(DataConfig(**config))
    assert str(caught.value).startswith(message)


def test_too_few_rows_and_a_label_that_stands_alone_are_refused():
    with pytest.raises(UserError, match="rows.jsonl has 3 rows to train on, too few for 4 folds"):
        cut_fold(rows(3), DataConfig(folds=4, fold=0), 0, None)
    with pytest.raises(UserError, match="rows.jsonl, line 6: its label stands in no other row"):
        cut_fold(rows(9), DataConfig(folds=2, fold=0), 0, np.array([0, 0, 0, 1, 1, 2, 0, 1, 1]))
