"""Which training rows lose their label, and what rows without labels are as batches."""

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tiny_models import make_examples

from jaxft.config import DataConfig, TrainConfig
from jaxft.data.rows import Rows
from jaxft.data.unlabelled import UnlabelledBatches, check, hide, without_answers
from jaxft.errors import UserError


def rows(count):
    return Rows(datasets.Dataset.from_dict({"number": list(range(count))}), "rows.jsonl", "line", np.arange(1, count + 1))


@given(st.lists(st.integers(0, 4), min_size=30, max_size=200), st.floats(0.2, 0.9), st.integers(0, 9))
def test_each_class_keeps_its_share_and_at_least_one_row(classes, share, seed):
    kept, hidden = hide(rows(len(classes)), share, seed, [(one,) for one in classes])
    assert len(kept) == round(share * len(classes))
    assert sorted([*kept.dataset["number"], *hidden.dataset["number"]]) == list(range(len(classes)))
    classes = np.asarray(classes)
    counts = np.bincount(classes[kept.dataset["number"]], minlength=5)
    quota = np.bincount(classes, minlength=5) * len(kept) / len(classes)
    few = (quota > 0) & (quota < 1)
    assert (counts[few] == 1).all()
    assert (np.abs(counts - quota)[~few] <= 1 + few.sum()).all()


def test_the_seed_draws_the_rows_in_their_order():
    draws = [hide(rows(50), 0.3, seed, None)[0].dataset["number"] for seed in (0, 0, 1)]
    assert list(draws[0]) == list(draws[1]) == sorted(draws[0])
    assert list(draws[0]) != list(draws[2])


def test_rows_of_several_labels_keep_one_of_each():
    labels = [{"O"}] * 40 + [{"O", "B-X", "I-X"}, {"O", "B-Y"}] + [{"O"}] * 8
    for seed in range(5):
        kept = hide(rows(50), 0.1, seed, labels)[0].dataset["number"]
        assert {40, 41} <= set(kept)
        assert len(kept) == 5


@pytest.mark.parametrize(
    ("share", "labels", "message"),
    [
        (0.99, None, "labelled_fraction=0.99 of 10 rows hides no label: all 10 keep theirs"),
        (0.2, [(i % 4,) for i in range(10)], "keeps 2 of 10 rows, none of them with the label '2': there are 4 labels. Raise it"),
    ],
)
def test_a_share_that_hides_nothing_or_loses_a_label_is_refused(share, labels, message):
    with pytest.raises(UserError, match=message):
        hide(rows(10), share, 0, labels)


@pytest.mark.parametrize(
    ("data", "train", "wanted", "message"),
    [
        ({}, {}, True, "FixMatch learns from rows without labels, and there are none. Give some by config.data.unlabelled, or hide"),
        ({"unlabelled": "a.jsonl", "labelled_fraction": 0.5}, {}, True, "Leave one of them out"),
        ({"labelled_fraction": 0.0}, {}, True, "labelled_fraction is a share of the training rows, above 0 and up to 1, not 0.0"),
        ({"unlabelled": "a.jsonl"}, {}, False, "config.data.unlabelled has no effect: FixMatch learns from labelled rows alone"),
        ({}, {"unlabelled_batch_size": 4}, False, "config.train.unlabelled_batch_size has no effect"),
        ({"unlabelled": "a.jsonl"}, {"unlabelled_batch_size": -1}, True, "unlabelled_batch_size is 0 or more, not -1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(data, train, wanted, message):
    with pytest.raises(UserError, match=message):
        check(DataConfig(**data), TrainConfig(**train), "FixMatch", wanted)


def test_few_labels_are_no_mistake_without_an_objective():
    check(DataConfig(labelled_fraction=0.1), TrainConfig(), "", False)


def test_a_batch_says_which_slots_it_has_and_its_stream_is_its_own():
    examples = make_examples([7, 5, 9, 6, 8, 5, 4], answer=3)
    config = DataConfig(max_length=16)
    batches, others = (UnlabelledBatches(examples, config, 2, 2, 0, False, stream=stream) for stream in ("", "unlabelled"))
    for step in range(4):
        found = batches.batch(step)
        assert found["numbers"].shape == found["scored"].shape
        real = found["weights"] > 0
        assert (found["numbers"][~real] == len(examples.slots.reads)).all()
        np.testing.assert_array_equal(examples.slots.targets[found["numbers"][real]], found["targets"][real])
    assert any(batches.examples_of(step) != others.examples_of(step) for step in range(4))
    np.testing.assert_array_equal(batches.batch(3)["tokens"], UnlabelledBatches(examples, config, 2, 2, 0, False).batch(3)["tokens"])


def test_a_prompt_has_room_for_its_answer_and_a_text_a_slot_a_token():
    prompts, answers = [np.int32([5, 6, 7]), np.int32([8, 9])], [np.int32([1, 2]), np.zeros(0, np.int32)]
    found = without_answers(prompts, answers, 3, 16, ["a", "b"])
    np.testing.assert_array_equal(found.lengths, [6, 5])
    np.testing.assert_array_equal(found.slots.reads, [2, 3, 4, 1, 2, 3])
    np.testing.assert_array_equal(found.slots.targets, [1, 2, -1, -1, -1, -1])
    text = without_answers(prompts, answers, 0, 16, ["a", "b"])
    np.testing.assert_array_equal(text.slots.targets, [6, 7, 9])
    with pytest.raises(UserError, match="b: its prompt has 2 tokens: no 15 are left for an answer"):
        without_answers(prompts[1:], answers[1:], 15, 16, ["b"])
