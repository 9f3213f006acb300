"""Strong views: how often a token is changed, what is never changed, and that a slot stays with its token."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxft.objectives.views import View, strong

SPECIAL, MASK, VOCABULARY, LENGTH, ROWS = (0, 1), 2, 50, 96, 64
SEEN = jax.jit(strong, static_argnums=2)
ALL = View(0.2, 0.15, 0.3, MASK, SPECIAL, VOCABULARY, keeps_read=False)


def rows(seed):
    """Returns rows of three examples after a shared prefix of 4 tokens, the last 6 places padding; every ninth token is special."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, ::9] = 0
    segments = np.concatenate([np.full(4, -1), np.repeat([1, 2, 3], [20, 26, 40]), np.zeros(6)]).astype(np.int32)
    positions = np.concatenate([np.arange(4), *(np.arange(4, 4 + count) for count in (20, 26, 40)), np.zeros(6)]).astype(np.int32)
    scored = np.arange(4, 90, 2, dtype=np.int32)
    made = {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": positions,
        "scored": scored,
        "weights": np.ones(len(scored), np.float32),
    }
    return {name: jnp.asarray(value if name == "tokens" else np.repeat(value[None], ROWS, axis=0)) for name, value in made.items()}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_a_view_changes_its_shares_of_the_free_tokens_and_nothing_else(seed):
    batch = rows(seed)
    seen, kept = SEEN(jax.random.key(seed), batch, ALL)
    segments, tokens, before = (np.asarray(values) for values in (seen["segment_ids"], seen["tokens"], batch["tokens"]))
    own = np.asarray(batch["segment_ids"])
    free = (own > 0) & ~np.isin(before, SPECIAL)
    gone, masked = (segments == 0) & (own > 0), tokens == MASK
    np.testing.assert_array_equal(np.isin(before, SPECIAL) & (own > 0), np.isin(tokens, SPECIAL) & (own > 0))  # they stay where they are
    np.testing.assert_array_equal(tokens[:, :4], before[:, :4])
    assert not (gone | masked)[~free].any()
    bound = 5 * np.sqrt(0.25 / free.sum())  # five standard deviations
    assert abs(gone.sum() / free.sum() - 0.15) < bound
    assert abs(masked.sum() / free.sum() - 0.2) < bound
    moved = (tokens != before) & ~masked & ~gone
    pairs = 1 - 1 / 9  # most free tokens have a free neighbour: few of them stand between two that aren't
    assert 0.3 * pairs - 0.1 < moved.sum() / (free & ~masked & ~gone).sum() < 0.3
    places = np.asarray(seen["scored"])
    read = np.take_along_axis(tokens, places, axis=1)
    old = np.take_along_axis(before, np.asarray(batch["scored"]), axis=1)
    np.testing.assert_array_equal(read[read != MASK], old[read != MASK])  # a slot reads its own token, wherever that stands now
    np.testing.assert_array_equal(np.asarray(kept) > 0, ~np.take_along_axis(gone, places, axis=1))
    positions = np.asarray(seen["positions"])
    for segment, start in ((1, 4), (2, 4), (3, 4)):
        left = positions[0][segments[0] == segment]
        np.testing.assert_array_equal(left, np.arange(start, start + len(left)))  # what is left closes up


def test_what_the_head_reads_stays_where_it_stands_for_the_text():
    batch = rows(0)
    seen, kept = SEEN(jax.random.key(0), batch, View(0.4, 0.4, 0.4, MASK, SPECIAL, VOCABULARY, keeps_read=True))
    places = np.asarray(batch["scored"])
    np.testing.assert_array_equal(seen["scored"], places)
    for name in ("tokens", "segment_ids"):
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(seen[name]), places, 1), np.take_along_axis(np.asarray(batch[name]), places, 1)
        )
    assert np.asarray(kept).all()


def test_without_a_mask_token_they_become_random_ones():
    batch = rows(0)
    seen, _ = SEEN(jax.random.key(0), batch, View(0.5, 0.0, 0.0, -1, SPECIAL, VOCABULARY, keeps_read=False))
    changed = np.asarray(seen["tokens"])[np.asarray(seen["tokens"]) != np.asarray(batch["tokens"])]
    assert len(np.unique(changed)) == VOCABULARY


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(Exception, match="objective.deleted is a share from 0 up to, not including, 1"):
        View(deleted=share)
