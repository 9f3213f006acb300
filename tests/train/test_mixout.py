"""Mixout: the paper's formula, its mean, its draws by step, and a step that uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_models import largest_difference, same_bits

from jaxft.tasks.head import Sums
from jaxft.train.mixout import mixed
from jaxft.train.state import new_state
from jaxft.train.step import make_step

RATE = 0.3
SHAPE = (50, 40)


def drawn(seed):
    return {"a": jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), jnp.float32), "b": None, "c": jnp.ones(SHAPE)}


def test_a_weight_is_its_start_or_moved_on_as_the_paper_has_it():
    weight, start = drawn(0), drawn(1)
    found = np.asarray(mixed(weight, start, RATE, jax.random.key(0))["a"], np.float64)
    w, u = (np.asarray(tree["a"], np.float64) for tree in (weight, start))
    paper = {kept: (u * (1 - kept) + w * kept - RATE * u) / (1 - RATE) for kept in (0, 1)}  # equation 4 for both outcomes
    taken = np.abs(found - paper[0]) < np.abs(found - paper[1])
    assert largest_difference(found, np.where(taken, paper[0], paper[1])) <= 1e-6  # float32 of numbers of order 1
    assert largest_difference(paper[0], u) <= 1e-12
    assert abs(taken.mean() - RATE) <= 5 * np.sqrt(RATE * (1 - RATE) / taken.size)


def test_the_mean_over_draws_is_the_weight():
    weight, start, count = drawn(0), drawn(1), 400
    total = jax.jit(lambda keys: jax.vmap(lambda key: mixed(weight, start, RATE, key)["a"])(keys).mean(axis=0))
    found = total(jax.random.split(jax.random.key(0), count))
    deviation = np.abs(np.asarray(weight["a"] - start["a"])) * np.sqrt(RATE / (1 - RATE) / count)
    assert (np.abs(np.asarray(found - weight["a"])) <= 5.5 * deviation + 1e-5).all()


def test_from_zero_it_is_dropout_of_weights():
    weight = drawn(0)
    found = np.asarray(mixed(weight, jax.tree.map(jnp.zeros_like, weight), 0.5, jax.random.key(0))["a"])
    kept = found != 0
    np.testing.assert_array_equal(found[kept], 2 * np.asarray(weight["a"])[kept])
    assert 0.4 < kept.mean() < 0.6


def test_leaves_of_one_shape_have_draws_of_their_own():
    weight, start = drawn(0), drawn(1)
    start["c"] = jnp.zeros(SHAPE)
    found = mixed(weight, start, RATE, jax.random.key(0))
    assert ((np.asarray(found["a"]) == np.asarray(start["a"])) != (np.asarray(found["c"]) == 0)).any()


# In a step


class Linear:
    """A task whose loss is the sum of the parameters times the batch's points: its gradient shows what was mixed."""

    def sums(self, model, params, batch, rngs, **_):
        loss = jnp.sum(params["a"] * batch["points"])
        return Sums(loss, loss, None, jnp.float32(1))


SGD = optax.sgd(1.0)


@functools.cache
def program(rate):
    return jax.jit(make_step(None, Linear(), SGD, seed=0, mixout=rate))


def moved(rate, number=0, accumulation=1):
    """Returns where a step takes the weight by a gradient of ones, and its loss."""
    weight = {"a": drawn(0)["a"]}
    state = new_state(weight, SGD)
    state = type(state)(jnp.int32(number), state.trainable, state.optimizer)
    points = {"points": np.ones((accumulation, *SHAPE), np.float32)}
    after, metrics = program(rate)(state, {"a": None}, points, {"a": drawn(1)["a"]} if rate else None)
    return np.asarray(weight["a"] - after.trainable["a"]), float(metrics["loss"])


def test_a_step_takes_its_loss_and_gradient_at_the_mixed_weights():
    gradient, loss = moved(RATE)
    kept = gradient > 0.5
    np.testing.assert_allclose(gradient, kept / (1 - RATE), atol=1e-5)  # nothing flows to a weight that stands at its start
    w, u = (np.asarray(drawn(seed)["a"], np.float64) for seed in (0, 1))
    np.testing.assert_allclose(loss, (u + kept * (w - u) / (1 - RATE)).sum(), rtol=1e-4)


def test_its_draws_are_keyed_by_the_step_and_each_micro_batch_has_its_own():
    assert same_bits(moved(RATE, 3), moved(RATE, 3))
    assert not same_bits(moved(RATE, 3), moved(RATE, 4))
    gradient, _ = moved(RATE, accumulation=2)
    shares = [(np.abs(gradient - times / 2 / (1 - RATE)) < 1e-5).mean() for times in (0, 1, 2)]
    assert np.isclose(sum(shares), 1)
    assert abs(shares[1] - 2 * RATE * (1 - RATE)) < 0.1  # one of both took it


def test_a_rate_of_zero_changes_nothing_and_all_of_it_compiles_once():
    np.testing.assert_allclose(moved(0.0)[0], 1.0, atol=1e-6)
    program.cache_clear()
    for number in (0, 1, 2):
        moved(RATE, number)
    assert program(RATE)._cache_size() == 1
