"""The output head and cross-entropy: in chunks or whole, against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import largest_difference

from jaxft.tasks.head import Sums, cross_entropy, gather, head_sums

TOKENS, FEATURES, VOCABULARY = 23, 8, 31


class Head(nn.Module):
    """The least that `head_sums` asks of a model."""

    @nn.compact
    def logits(self, hidden):
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(hidden)


@functools.cache
def drawn():
    """Returns hidden, kernel, targets and weights; some weights are 0, some not 1."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((TOKENS, FEATURES)).astype(np.float32)
    kernel = random.standard_normal((FEATURES, VOCABULARY)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, TOKENS).astype(np.int32)
    targets[::3] = (hidden @ kernel).argmax(axis=1)[::3]  # some right answers
    return hidden, kernel, targets, random.choice([0.0, 1.0, 2.5], TOKENS).astype(np.float32)


def ours(hidden, kernel, chunk, label_smoothing, z_loss):
    _, _, targets, weights = drawn()

    def loss(logits, targets, weights):
        return cross_entropy(logits[0], targets, weights, label_smoothing, z_loss)

    return head_sums(Head(), {"lm_head": {"kernel": kernel}}, [hidden], targets, weights, loss, chunk, {})


def theirs(label_smoothing, z_loss):
    """Returns sums and the loss's gradients by torch, in float64."""
    hidden, kernel, targets, weights = (torch.tensor(array) for array in drawn())
    hidden, kernel = hidden.double().requires_grad_(), kernel.double().requires_grad_()
    logits = hidden @ kernel
    entropy = functools.partial(torch.nn.functional.cross_entropy, logits, targets.long(), reduction="none")
    loss = (weights * (entropy(label_smoothing=label_smoothing) + z_loss * logits.logsumexp(-1) ** 2)).sum()
    loss.backward()
    correct = (weights * (logits.argmax(-1) == targets)).sum()
    sums = [float(part.detach()) for part in (loss, (weights * entropy()).sum(), correct, weights.sum())]
    return Sums(*sums), (hidden.grad.numpy(), kernel.grad.numpy())


OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.02)]


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), OPTIONS)
def test_sums_and_gradients_are_those_of_torch(label_smoothing, z_loss, chunk):
    hidden, kernel, _, _ = drawn()
    expected, expected_gradients = theirs(label_smoothing, z_loss)

    def loss(hidden, kernel):
        sums = ours(hidden, kernel, chunk, label_smoothing, z_loss)
        return sums.loss, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)
    # float32 sums of 23 tokens' losses of order 1 to 10
    np.testing.assert_allclose(jax.tree.leaves(sums), jax.tree.leaves(expected), rtol=1e-5)
    assert largest_difference(list(gradients), list(expected_gradients)) <= 1e-4


@settings(deadline=None, max_examples=8)
@given(st.integers(1, TOKENS + 5))
def test_any_chunk_gives_the_same_sums(chunk):
    hidden, kernel, _, _ = drawn()
    whole = ours(hidden, kernel, TOKENS, 0.1, 0.01)
    np.testing.assert_allclose(jax.tree.leaves(ours(hidden, kernel, chunk, 0.1, 0.01)), jax.tree.leaves(whole), rtol=1e-5)


def test_what_has_no_weight_adds_nothing():
    hidden, kernel, _, weights = drawn()
    wild = np.where(weights[:, None] == 0, 1e3, hidden).astype(np.float32)
    one, other = ours(hidden, kernel, 4, 0.0, 0.0), ours(wild, kernel, 4, 0.0, 0.0)
    np.testing.assert_array_equal(jax.tree.leaves(one), jax.tree.leaves(other))


def test_bfloat16_logits_are_summed_in_float32():
    logits = np.random.default_rng(0).standard_normal((5000, 7)).astype(np.float32)
    targets, weights = np.zeros(5000, np.int32), np.ones(5000, np.float32)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    sums = cross_entropy(rounded, targets, weights, 0.0, 0.0)
    expected = cross_entropy(rounded.astype(jnp.float32), targets, weights, 0.0, 0.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(jax.tree.leaves(sums), jax.tree.leaves(expected))


def test_gather_takes_each_rows_own_positions():
    hidden = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    scored = np.array([[4, 0], [2, 2]], np.int32)
    np.testing.assert_array_equal(gather(hidden, scored), [hidden[0, 4], hidden[0, 0], hidden[1, 2], hidden[1, 2]])
