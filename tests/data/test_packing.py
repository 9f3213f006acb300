"""Packing loses nothing, never overfills a row, and is first-fit."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.packing import common_prefix, pack


def first_fit(lengths, capacity):
    """First-fit as its definition says, in quadratic time."""
    rows, room = [], []
    for example, length in enumerate(lengths):
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(example)
        room[row] -= length
    return rows


@given(st.lists(st.integers(1, 20), max_size=200), st.integers(20, 60))
def test_is_first_fit(lengths, capacity):
    assert pack(lengths, capacity) == first_fit(lengths, capacity)


@given(st.lists(st.integers(1, 30), max_size=200))
def test_every_example_stands_once_and_no_row_is_overfull(lengths):
    rows = pack(lengths, 30)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= 30 for row in rows)


@pytest.mark.parametrize("length", [0, 31])
def test_refuses_a_length_that_no_row_can_hold(length):
    with pytest.raises(ValueError, match="1 to 30"):
        pack([3, length], 30)


def test_packs_a_hundred_thousand_examples_in_seconds():
    lengths = np.random.default_rng(0).integers(20, 512, 100_000)
    begin = time.monotonic()
    rows = pack(lengths, 512)
    assert time.monotonic() - begin < 10  # half a second on a quiet core
    assert len(rows) < 1.02 * lengths.sum() / 512


def shared(*rows):
    """(tokens, the first position that is read) of each example -> their common prefix."""
    return common_prefix([np.array(tokens) for tokens, _ in rows], np.array([read for _, read in rows]))


def test_common_prefix_ends_where_tokens_differ():
    assert shared(([1, 2, 3, 9, 9], 3), ([1, 2, 4, 9, 9], 3)) == 2


def test_common_prefix_ends_with_the_first_token_that_is_read():
    assert shared(([1, 2, 3, 4, 5], 3), ([1, 2, 3, 4, 5], 1)) == 2


def test_common_prefix_leaves_each_example_a_token():
    assert shared(([1, 2, 3], 2), ([1, 2, 3, 4], 3)) == 2


def test_common_prefix_of_nothing_in_common_is_none():
    assert shared(([1, 2], 0), ([2, 2], 0)) == 0
    assert common_prefix([], np.array([])) == 0
