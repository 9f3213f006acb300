"""Batches hold the examples' own tokens, at random access, the same at every call."""

import chex
import numpy as np
import pytest
from evaluation_batches import evaluation_batches
from hypothesis import given
from hypothesis import strategies as st

from jaxft.config import DataConfig
from jaxft.data.batches import Batches, Room, balanced, lay_out
from jaxft.data.examples import NextTokens
from jaxft.models.attention import PADDING, SHARED


def make_examples(lengths, prefix=0, scored_tail=2):
    """Examples of random tokens after a common prefix; the last `scored_tail` of each are scored."""
    random = np.random.default_rng(0)
    tokens = [np.concatenate([np.arange(100, 100 + prefix), random.integers(1, 90, length - prefix)]) for length in lengths]
    scored = [np.arange(length) >= max(length - scored_tail, 1) for length in lengths]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    zeros = np.zeros(len(lengths), np.int32)
    return NextTokens(np.concatenate(tokens).astype(np.int32), offsets, zeros, np.concatenate(scored), zeros, ("",) * len(lengths))


def unpacked(batch):
    """Returns the (tokens, positions, scored positions in the example, targets) of each example of a batch, as a set."""
    found = []
    width = batch["tokens"].shape[-1]
    for tokens, segments, positions in zip(
        *(batch[name].reshape(-1, width) for name in ("tokens", "segment_ids", "positions")), strict=True
    ):
        shared = segments == SHARED
        for segment in range(1, segments.max() + 1):
            own = shared | (segments == segment)
            found.append((tuple(tokens[own]), tuple(positions[own])))
    return found


def targets_of(batch):
    """Returns (token that predicts, target) of every weighted slot."""
    width, slots = batch["tokens"].shape[-1], batch["scored"].shape[-1]
    tokens = batch["tokens"].reshape(-1, width)
    scored, targets, weights = (batch[name].reshape(-1, slots) for name in ("scored", "targets", "weights"))
    row, slot = np.nonzero(weights)
    return sorted(zip(tokens[row, scored[row, slot]], targets[row, slot], strict=True))


@given(st.lists(st.integers(6, 40), min_size=1, max_size=30), st.booleans(), st.sampled_from([0, 4]), st.sampled_from([1, 2, 99]))
def test_unpacking_gives_the_examples_back(lengths, packing, prefix, scored_tail):
    examples = make_examples(lengths, prefix, scored_tail)
    config = DataConfig(max_length=64, packing=packing)
    batches = list(evaluation_batches(examples, config, batch_size=2, share_prefix=True))
    expected = [(tuple(examples[i][0]), tuple(range(length))) for i, length in enumerate(lengths)]
    assert sorted(found for batch in batches for found in unpacked(batch)) == sorted(expected)
    pairs = []
    for i in range(len(examples)):
        tokens, scored = examples[i]
        pairs += [(tokens[t - 1], tokens[t]) for t in np.flatnonzero(scored)]
    assert sorted(pair for batch in batches for pair in targets_of(batch)) == sorted(pairs)


def test_the_first_own_token_is_predicted_by_the_last_of_the_prefix():
    examples = make_examples([7, 6], prefix=4, scored_tail=99)
    examples.scored[:] = [False] * 4 + [True] * 3 + [False] * 4 + [True] * 2
    (batch,) = evaluation_batches(examples, DataConfig(max_length=64), batch_size=1, share_prefix=True)
    assert (batch["segment_ids"][0, :9] == [SHARED] * 4 + [1, 1, 1, 2, 2]).all()
    assert batch["scored"][0, :5].tolist() == [3, 4, 5, 3, 7]


def test_longer_examples_are_placed_first():
    """In the order given, 30 + 10, 20, 40 and 30 tokens would take four rows of 50."""
    config = DataConfig(max_length=50)
    batches = list(evaluation_batches(make_examples([30, 10, 20, 40, 30]), config, batch_size=1, share_prefix=False))
    assert [sorted(np.bincount(b["segment_ids"][0])[1:].tolist()) for b in batches] == [[10, 40], [20, 30], [30]]


def test_shapes_and_types():
    batches = Batches(make_examples([10] * 12), DataConfig(max_length=25), batch_size=2, accumulation=3, seed=0, share_prefix=False)
    batch = batches.batch(0)
    chex.assert_shape([batch[name] for name in ("tokens", "segment_ids", "positions")], (3, 2, 25))
    chex.assert_shape([batch[name] for name in ("scored", "targets", "weights")], (3, 2, 8))
    assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(batch, np.int32) | {"weights": np.float32}
    assert batches.tokens_per_row == 25
    assert batches.steps_per_epoch == 1


@pytest.mark.parametrize(("max_length", "expected"), [(512, 64), (70, 64), (50, 50)])
def test_rows_shrink_to_what_is_used(max_length, expected):
    config = DataConfig(max_length=max_length, packing=False)
    assert Batches(make_examples([40, 30]), config, 1, 1, 0, False).tokens_per_row == expected


def test_padding_has_its_token_and_no_weight():
    batches = Batches(make_examples([10]), DataConfig(max_length=16), 1, 1, seed=0, share_prefix=False, pad_token_id=7)
    batch = batches.batch(0)
    assert (batch["tokens"][0, 0, 10:] == 7).all()
    assert (batch["segment_ids"][0, 0, 10:] == PADDING).all()
    assert batch["weights"].sum() == 2


def test_the_same_seed_gives_the_same_batches_in_any_order():
    def build(seed):
        return Batches(make_examples(list(range(10, 40))), DataConfig(max_length=64), 2, 2, seed, share_prefix=True)

    forward = [build(0).batch(step) for step in range(12)]
    again = build(0)
    for step in reversed(range(12)):
        chex.assert_trees_all_equal(again.batch(step), forward[step])
    assert any((build(1).batch(0)[name] != forward[0][name]).any() for name in ("tokens",))


def test_each_epoch_holds_each_row_once_in_another_order():
    batches = Batches(make_examples([30] * 10), DataConfig(max_length=30, packing=False), 4, 1, seed=3, share_prefix=False)
    stream = [example for step in range(10) for example in batches.examples_of(step)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batches.steps_per_epoch == 2.5


def test_examples_of_names_what_the_batch_holds():
    examples = make_examples(list(range(10, 40)), prefix=3)
    batches = Batches(examples, DataConfig(max_length=64), 2, 2, seed=0, share_prefix=True)
    for step in range(10):
        named = sorted(tuple(examples[i][0]) for i in batches.examples_of(step))
        assert named == sorted(tokens for tokens, _ in unpacked(batches.batch(step)))


def test_tokens_are_counted_with_and_without_the_shared_prefix():
    examples = make_examples([10, 12, 14, 16], prefix=4)
    batches = Batches(examples, DataConfig(max_length=64), 1, 1, seed=0, share_prefix=True)
    assert len(batches.layout.rows) == 1
    assert batches.real_tokens(0) == 52
    assert batches.computed_tokens(0) == 52 - 3 * 4 == (batches.batch(0)["segment_ids"] != PADDING).sum()
    assert batches.efficiency == 40 / 64


@pytest.mark.parametrize(("given", "config"), [(False, {}), (True, {"share_prefix": False}), (True, {"packing": False})])
def test_nothing_is_shared_unless_all_agree(given, config):
    batches = Batches(make_examples([10, 12], prefix=4), DataConfig(max_length=64, **config), 2, 1, seed=0, share_prefix=given)
    assert (batches.batch(0)["segment_ids"] != SHARED).all()


def test_the_last_evaluation_batch_is_filled_with_padding():
    config = DataConfig(max_length=32, packing=False)
    batches = list(evaluation_batches(make_examples([10] * 5), config, batch_size=4, share_prefix=False))
    assert [batch["tokens"].shape for batch in batches] == [(4, 32)] * 2
    assert (batches[1]["segment_ids"][1:] == PADDING).all()
    assert batches[1]["weights"].sum() == 2


# Balanced classes

CLASSES = np.array([0] * 7 + [1] * 3 + [2])


def balanced_batches(seed=0, packing=False):
    examples = make_examples(list(range(10, 21)))
    config = DataConfig(max_length=64, packing=packing)
    return Batches(examples, config, 3, 1, seed, share_prefix=False, classes=CLASSES)


def epochs_of(batches, count):
    """Returns the examples of each of the first epochs, without packing: 21 rows each."""
    stream = [example for step in range(7 * count) for example in batches.examples_of(step)]
    return [stream[start : start + 21] for start in range(0, 21 * count, 21)]


def test_each_class_comes_as_often_as_any_other_in_each_epoch():
    batches = balanced_batches()
    assert batches.steps_per_epoch == 7
    for epoch in epochs_of(batches, 10):
        assert np.bincount(CLASSES[epoch]).tolist() == [7, 7, 7]
        assert set(epoch) == set(range(11))  # and no example is left out
        counts = np.bincount(epoch)
        assert set(counts[:7]) == {1}
        assert set(counts[7:10]) == {2, 3}
        assert counts[10] == 7


def test_what_is_repeated_once_more_takes_turns_and_is_drawn_by_the_seed():
    epochs = epochs_of(balanced_batches(), 6)
    assert np.bincount([example for epoch in epochs for example in epoch])[7:10].tolist() == [14, 14, 14]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({tuple(epochs_of(balanced_batches(seed), 1)[0]) for seed in range(3)}) == 3


def test_balanced_batches_are_the_same_in_any_order_and_of_one_shape():
    batches, again = balanced_batches(packing=True), balanced_batches(packing=True)
    forward = [batches.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        chex.assert_trees_all_equal(again.batch(step), forward[step])
    assert {array.shape for batch in forward for array in [batch["tokens"]]} == {(1, 3, 64)}
    count = sum(np.bincount(CLASSES[batches.examples_of(step)], minlength=3) for step in range(300))
    assert (abs(count / count.sum() - 1 / 3) < 0.01).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_any_classes_are_balanced(drawn):
    classes = np.array(drawn)
    for epoch in balanced(classes, np.arange(len(classes))):
        counts = np.bincount(classes[epoch], minlength=4)
        assert set(counts) <= {0, counts.max()}
        assert counts.max() == np.bincount(classes).max()
        assert set(epoch) == set(range(len(classes)))


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_each_example_has_room_before_it_and_one_of_max_length_still_fits(packing, read):
    lengths, room = [64, 30, 20, 7], 3
    examples = make_examples(lengths, prefix=4)
    layout = lay_out(examples, np.arange(4), DataConfig(max_length=64, packing=packing), True, 0, Room(room, read))
    batch = layout.fill(range(len(layout.rows)))
    expected = [((0,) * room + tuple(examples[i][0]), tuple(range(room + length))) for i, length in enumerate(lengths)]
    assert sorted(unpacked(batch)) == sorted(expected)
    assert layout.length == 64 + room
    assert layout.prefix == 0
    assert sum(layout.computed_tokens(row) for row in range(len(layout.rows))) == sum(lengths) + room * len(lengths)
    scored = [examples.slots.reads[examples.slots.part(i)] + (0 if read else room) for i in range(4)]
    rows, slots = np.nonzero(batch["weights"])
    assert sorted(batch["positions"][rows, batch["scored"][rows, slots]]) == sorted(np.concatenate(scored))
