"""When losses that part are called by their name, and on which training examples they are measured."""

import numpy as np
import pytest

from jaxft.train.gap import Gap, sample


def followed(pairs):
    """Returns what is remembered after these (validation, training) losses, at steps 10, 20, ..."""
    gap = Gap()
    for number, (validation, training) in enumerate(pairs, start=1):
        gap = gap.after(10 * number, validation, training)
    return gap


@pytest.mark.parametrize(
    ("pairs", "warned"),
    [
        ([(1.0, 0.9), (0.8, 0.7), (0.9, 0.5), (0.85, 0.3)], True),
        ([(1.0, 0.9), (0.8, 0.7), (0.9, 0.5), (0.7, 0.3), (0.8, 0.2)], False),  # better again in between
        ([(1.0, 0.9), (1.1, 0.95), (1.2, 1.0), (1.3, 1.1)], False),  # both get worse: the rate is too high, nothing is learnt by heart
        ([(1.0, 0.9), (1.1, 0.8), (1.2, 0.95), (1.1, 0.8)], False),  # not in a row
        ([(1.0, 0.9), (0.9, 0.5), (0.8, 0.1)], False),  # a gap alone is none
    ],
)
def test_it_warns_where_validation_worsens_twice_while_training_improves(pairs, warned):
    assert followed(pairs).warned is warned


def test_it_warns_once_and_says_since_when():
    gap = followed([(1.0, 0.9), (0.8, 0.7), (0.9, 0.5), (0.85, 0.3)])
    text = gap.warning(0.85, 0.3)
    assert "since step 20 the loss on validation rows rises (0.8000 to 0.8500)" in text
    assert "falls (0.7000 to 0.3000), 2 evaluations in a row" in text
    assert gap.after(50, 0.7, 0.2).warned  # a new lowest loss forgets the rest, not that


def test_the_sample_is_drawn_once_for_a_seed():
    rows = np.arange(100)
    one, again, other = sample(rows, 20, 0), sample(rows, 20, 0), sample(rows, 20, 1)
    assert one.tolist() == again.tolist() != other.tolist()
    assert len(set(one.tolist())) == 20
    np.testing.assert_array_equal(sample(rows[:10], 20, 0), np.arange(10))


def test_all_examples_of_a_row_are_sampled_or_none():
    rows = np.repeat(np.arange(30), 4)  # as the choices of a question
    found = sample(rows, 7, 0)
    assert len(found) == 28
    assert set(np.bincount(rows[found])) == {0, 4}
