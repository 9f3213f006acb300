"""What masking policies hide: the statistics of many draws against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.objectives.policies import (
    COSINE,
    LINEAR,
    MIX,
    POLICIES,
    SCHEDULES,
    VALIDATION,
    Knowledge,
    check_policy,
    counts,
    make_policy,
    progress,
)

LENGTH, KEYS, DRAWS = 32, 400, 4000
SIGMAS = 5.5  # a false alarm in 2e7
MIXED = (("tokens", 0.5), ("tags", 0.5))


@functools.cache
def drawing(name, mix=()):
    """Returns the policy of many keys, jitted."""
    return jax.jit(jax.vmap(make_policy(name, mix, 0.2, 10), in_axes=(0, None, None)))


def example(sizes, seed=0):
    """Returns a row whose words have so many tokens, between special ones, and padding behind."""
    numbers = np.zeros(LENGTH, np.int32)
    inside = np.repeat(np.arange(1, len(sizes) + 1), sizes)[: LENGTH - 2]
    numbers[1 : 1 + len(inside)] = inside
    segments = np.where(np.arange(LENGTH) < len(inside) + 2, 1, 0).astype(np.int32)
    tokens = np.random.default_rng(seed).integers(5, 90, LENGTH).astype(np.int32)
    return {"tokens": tokens[None], "segment_ids": segments[None], "words": numbers[None]}


def knowledge(rate, entity_rate=0.5, entities=None, salience=None, certainty=None):
    plain = np.ones((1, LENGTH), np.float32)
    return Knowledge(
        jnp.float32(rate),
        jnp.float32(entity_rate),
        np.zeros((1, LENGTH), bool) if entities is None else entities,
        plain if salience is None else salience,
        plain if certainty is None else certainty,
    )


def shares(name, batch, known, mix=()):
    """Returns how often each token is hidden, over many draws."""
    keys = jax.random.split(jax.random.key(0), DRAWS).reshape(-1, KEYS)
    return np.mean([(np.asarray(drawing(name, mix)(part, batch, known))[:, 0] >= 0).mean(axis=0) for part in keys], axis=0)


def near(found, expected):
    return np.abs(found - expected) <= SIGMAS * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9


@pytest.mark.parametrize(("name", "mix"), [*((name, ()) for name in POLICIES), (MIX, MIXED)])
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=14), rate=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_nothing_else_than_words_is_hidden_and_those_as_a_whole(name, mix, sizes, rate, seed):
    batch = example(sizes)
    words = batch["words"][0]
    keys, may = jax.random.split(jax.random.key(seed), KEYS), int((words > 0).sum())
    hidden = np.asarray(drawing(name, mix)(keys, batch, knowledge(rate, rate)))[:, 0] >= 0
    assert not hidden[:, words == 0].any()
    for word in set(words[words > 0].tolist()) if name not in ("tokens", MIX) else ():
        part = hidden[:, words == word]
        assert (part.all(axis=1) | ~part.any(axis=1)).all()
    if name in ("tokens", "words", "spans", "salience"):
        assert (hidden.sum(axis=1) <= np.ceil(np.float32(rate) * may)).all()
    if rate in (0.0, 1.0):
        assert (hidden.sum(axis=1) == rate * may).all()


@pytest.mark.parametrize("name", ["tokens", "words", "spans", "salience"])
def test_the_mean_share_is_the_rate(name):
    batch = example([1] * 13)
    found = shares(name, batch, knowledge(0.23))
    np.testing.assert_allclose(found.sum(), 0.23 * 13, atol=SIGMAS * 0.5 / np.sqrt(DRAWS))  # a row has 2 or 3: rounded at random
    if name != "spans":  # spans cover the middle of a text more often than its ends
        assert near(found[1:14], 0.23).all()


def test_the_number_hidden_is_rounded_at_random():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = np.asarray(jax.jit(jax.vmap(counts, in_axes=(0, None, None)))(keys, example([1] * 13), 0.23))[:, 0]
    assert set(found) == {2, 3}
    assert near((found == 3).mean(), 0.23 * 13 - 2)


def test_words_of_entities_and_others_have_their_rates():
    batch = example([2, 1, 3, 1, 1])
    entities = np.isin(batch["words"], (2, 3))
    found = shares("tags", batch, knowledge(0.1, 0.6, entities))
    assert near(found, np.where(batch["words"][0] == 0, 0, np.where(entities[0], 0.6, 0.1))).all()


def test_words_are_drawn_in_proportion_to_their_salience():
    batch = example([1, 2, 1, 4, 1, 1])
    salience = np.random.default_rng(1).random((1, LENGTH)).astype(np.float32)
    words = batch["words"][0]
    weight = np.asarray([salience[0][words == word].sum() if (words == word).sum() == 1 else 0 for word in range(1, 7)])
    found = shares("salience", batch, knowledge(0.1, salience=np.where(np.isin(words, (2, 4)), 0, salience)))  # one token of ten
    first = np.asarray([np.flatnonzero(words == word)[0] for word in range(1, 7)])
    assert near(found[first], weight / weight.sum()).all()


def test_the_rate_falls_with_the_loss():
    batch = example([1] * 10)
    certainty = np.linspace(0, 1, LENGTH, dtype=np.float32)[None]
    found = shares("loss", batch, knowledge(0.8, certainty=certainty))
    assert near(found, np.where(batch["words"][0] > 0, 0.8 * certainty[0], 0)).all()


def test_a_mix_draws_a_policy_for_each_row():
    batch = example([1] * 10)
    found = shares(MIX, batch, knowledge(1.0, 0.2, np.ones((1, LENGTH), bool)), MIXED)  # all of it, or a fifth
    assert near(found[1:11], 0.6).all()


@given(number=st.integers(0, 40), steps=st.integers(1, 30), moved=st.floats(0, 1, width=32))
@settings(deadline=None, max_examples=40)
def test_schedules_go_from_their_first_rate_to_their_last(number, steps, moved):
    done = min(number / max(steps - 1, 1), 1)
    expected = {LINEAR: done, COSINE: (1 - np.cos(np.pi * done)) / 2, VALIDATION: moved}
    for schedule in SCHEDULES:
        found = progress(schedule, jnp.int32(number), steps, jnp.float32(moved))
        np.testing.assert_allclose(found, expected.get(schedule, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mix", "message"),
    [
        ("word", (), "no objective.policy 'word'. Did you mean 'words'"),
        (MIX, (), "give both of them, or neither"),
        ("words", MIXED, "give both of them, or neither"),
        (MIX, (("span", 1.0),), "Did you mean 'spans'"),
        (MIX, (("spans", 0.0),), "the share of spans is above 0"),
    ],
)
def test_what_is_no_policy_is_refused(name, mix, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        check_policy(name, mix)
