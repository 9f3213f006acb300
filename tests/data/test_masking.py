"""What is hidden, and what stands in its place: the statistics of many draws against their definition."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.masking import Policy, Replacement, hidden_groups, hidden_slots, replaced
from jaxft.errors import UserError

LENGTH = 48
POLICIES = [Policy(), Policy(whole_words=True), Policy(spans=True), Policy(whole_words=True, spans=True)]
groups_of = functools.partial(jax.jit, static_argnames="policy")(hidden_groups)
put_in = functools.partial(jax.jit, static_argnames="replacement")(replaced)


def row(words, length=LENGTH):
    """Returns tokens, segments and words of a row: for each example, the tokens of each of its words between two special ones."""
    segments, numbers = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    for segment, example in enumerate(words, start=1):
        inside = np.repeat(np.arange(1, len(example) + 1), example)
        end = start + len(inside) + 2
        if end > length:
            break
        segments[start:end] = segment
        numbers[start + 1 : end - 1] = inside
        start = end
    return np.where(segments > 0, np.random.default_rng(len(words)).integers(5, 90, length), 0).astype(np.int32), segments, numbers


def batch_of(*rows):
    return dict(zip(("tokens", "segment_ids", "words"), map(np.stack, zip(*rows, strict=True)), strict=True))


WORDS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=30)
@given(words=WORDS, share=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_no_special_token_nor_padding_is_hidden_and_groups_are_whole(policy, words, share, seed):
    tokens, segments, numbers = row(words)
    count = round(share * int((numbers > 0).sum()))
    groups = np.asarray(groups_of(jax.random.key(seed), batch_of((tokens, segments, numbers)), np.int32([count]), policy=policy))[0]
    hidden = groups >= 0
    assert not hidden[numbers == 0].any()
    assert hidden.sum() <= count
    if policy == Policy():
        assert hidden.sum() == count
    if policy.whole_words:
        for segment, word in set(zip(segments[numbers > 0].tolist(), numbers[numbers > 0].tolist(), strict=True)):
            assert len(set(groups[(segments == segment) & (numbers == word)])) == 1
    for group in set(groups[hidden].tolist()):
        assert len(set(segments[groups == group].tolist())) == 1
        units = set(numbers[groups == group].tolist()) if policy.whole_words else groups[groups == group]
        assert len(units) <= (policy.span_max if policy.spans else 1)
    # what is left of the count has no room for any word that stays
    if policy == Policy(whole_words=True):
        stays = [int(((segments == s) & (numbers == w)).sum()) for s, w in zip(segments, numbers, strict=True) if w]
        left = [size for size, group in zip(stays, groups[numbers > 0], strict=True) if group < 0]
        assert all(size > count - hidden.sum() for size in left)


@functools.cache
def many(policy, length=512, rows=96, count=51):
    """Returns the groups of many rows of one example each, (rows, length), and the words: one to three tokens each."""
    words = np.random.default_rng(3).integers(1, 4, length)
    one = row([words[np.cumsum(words) <= length - 2]], length)
    batch = batch_of(*[(one[0] + number % 7, one[1], one[2]) for number in range(rows)])
    keys = jax.vmap(
        lambda key, tokens, segments, numbers: hidden_groups(
            key, {"tokens": tokens[None], "segment_ids": segments[None], "words": numbers[None]}, np.full(1, count, np.int32), policy
        )[0]
    )
    return np.asarray(jax.jit(keys)(jax.random.split(jax.random.key(0), rows), *batch.values())), one[2]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_share_is_the_one_asked_for_and_every_token_has_it(policy):
    groups, numbers = many(policy)
    share = (groups >= 0).mean(axis=0)
    assert (groups >= 0).sum(axis=1).min() >= 51 - policy.whole_words  # where one token is left, a word of one isn't hard to find
    halves = share[1:256].mean(), share[256:-1].mean()
    # 96 rows of 255 tokens, in groups of up to 7 or so: a standard error of about 0.005
    np.testing.assert_allclose(halves, 51 / (numbers > 0).sum(), atol=0.02)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy.spans])
def test_spans_have_geometric_lengths_up_to_the_longest(policy):
    policy = Policy(policy.whole_words, True, span_p=0.3, span_max=6)
    groups, numbers = many(policy, length=2048, rows=32, count=204)
    lengths = [
        len(set(numbers[found == group].tolist())) if policy.whole_words else int((found == group).sum())
        for found in groups
        for group in set(found[found >= 0].tolist())
    ]
    shares = np.bincount(lengths, minlength=7)[1:] / len(lengths)
    assert len(lengths) > 1000
    # standard errors up to 0.013; a span that meets an earlier one, or a row's last, is shorter: some percent of them
    np.testing.assert_allclose(shares, policy.span_shares, atol=0.05)
    np.testing.assert_allclose(np.mean(lengths), policy.span_mean, rtol=0.1)


def test_the_mean_length_of_spanbert():
    assert Policy(spans=True).span_mean == pytest.approx(3.8, abs=0.01)  # Joshi et al. 2020, section 3.1


@pytest.mark.parametrize("policy", [Policy(), Policy(whole_words=True)])
def test_hidden_groups_are_masked_made_random_or_kept_by_their_shares(policy):
    groups, _ = many(policy)
    tokens = np.full(groups.shape, 500, np.int32) + np.arange(len(groups), dtype=np.int32)[:, None]
    made = np.asarray(put_in(jax.random.key(1), tokens, groups, replacement=Replacement(1, 100_000, 0.7, 0.2)))
    hidden = groups >= 0
    assert (made[~hidden] == tokens[~hidden]).all()
    masked, kept = (made == 1) & hidden, (made == tokens) & hidden
    # some 5000 words: standard errors of 0.007; a random token is the mask token or its own with a chance of 1 in 100 000
    assert masked.sum() / hidden.sum() == pytest.approx(0.7, abs=0.03)
    assert kept.sum() / hidden.sum() == pytest.approx(0.1, abs=0.03)
    random = made[hidden & ~masked & ~kept]
    assert random.min() >= 0
    assert random.max() < 100_000
    assert np.mean(random) == pytest.approx(50_000, rel=0.1)
    for number, found in enumerate(groups[:20]):  # one kind a group
        for group in set(found[found >= 0].tolist()):
            assert len(set(masked[number][found == group].tolist())) == 1


def test_a_row_is_masked_alike_in_any_batch_and_otherwise_with_another_key():
    rows = [row([[1, 2, 3, 1, 1], [2, 2]]), row([[3, 1, 1, 1, 4, 2]]), row([[1] * 30])]
    counts = np.int32([5, 5, 5])
    whole = groups_of(jax.random.key(0), batch_of(*rows), counts, policy=Policy())
    turned = groups_of(jax.random.key(0), batch_of(*rows[::-1]), counts, policy=Policy())
    np.testing.assert_array_equal(whole, turned[::-1])
    assert (np.asarray(whole) != np.asarray(groups_of(jax.random.key(1), batch_of(*rows), counts, policy=Policy()))).any(axis=1).all()


def test_slots_are_where_the_groups_are():
    places, real = hidden_slots(np.int32([[-1, 2, -1, 3, 3], [-1, -1, 0, -1, -1]]), 4)
    np.testing.assert_array_equal(real, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(np.asarray(places)[np.asarray(real)], [1, 3, 4, 2])


@pytest.mark.parametrize(("settings", "message"), [({"span_p": 1.0}, "task.span_p"), ({"span_max": 0}, "task.span_max")])
def test_a_policy_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Policy(**settings)
