"""Attention against torch's, in blocks and in one piece, forward and backward."""

import functools

import jax
import numpy as np
import pytest
import torch
from tiny_models import largest_difference

from jaxft.models.attention import BLOCK, QUERY_BLOCK, Tokens, attention, visible

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def places(length, kind):
    """Returns where (2, length) tokens stand."""
    order = np.arange(length, dtype=np.int32)
    if kind == "plain":
        return Tokens(np.ones((2, length), np.int32), np.stack([order, order]), order)
    # row 0: a shared prefix of 5, three examples, padding; row 1: padding, one example
    ends = [5, 5 + (length - 5) // 4, 5 + (length - 5) // 2, length - 3]
    number = np.searchsorted(ends, order, side="right")
    starts = np.array([0, *ends])[number]
    packed = np.choose(number, [-1, 1, 2, 3, 0])
    packed_positions = np.where(number == 0, order, np.where(number == 4, 0, order - starts + 5))
    padded = (order >= 7).astype(np.int32)
    segments = np.stack([packed, padded]).astype(np.int32)
    return Tokens(segments, np.stack([packed_positions, np.maximum(order - 7, 0)]).astype(np.int32), order)


def allowed(tokens, window, causal=True):
    """The mask in NumPy, written from the definition."""
    segments, positions, order = (np.asarray(part) for part in (tokens.segments, tokens.positions, tokens.order))
    mine, theirs = segments[:, :, None], segments[:, None, :]
    mask = (mine == theirs) | ((theirs == -1) & (mine != 0))
    if causal:
        mask &= (order[:, None] >= order[None, :])[None]
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None, :] < window
    return mask


@functools.cache
def drawn(length):
    random = np.random.default_rng(length)
    shapes = [(2, length, HEADS, HEAD_DIM), (2, length, GROUPS, HEAD_DIM), (2, length, GROUPS, HEAD_DIM), (2, length, HEADS, HEAD_DIM)]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def torch_attention(length, mask):
    """Returns output and gradients of torch's attention in float64."""
    query, key, value, weights = (torch.tensor(array, dtype=torch.float64).transpose(1, 2) for array in drawn(length))
    inputs = [part.clone().requires_grad_() for part in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True)
    (out * weights).sum().backward()
    return [part.transpose(1, 2).detach().numpy() for part in (out, *(part.grad for part in inputs))]


CASES = [
    *((length, "packed", None) for length in (40, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 77)),
    *((length, kind, window) for length in (40, 2 * QUERY_BLOCK + 77) for kind, window in (("plain", None), ("packed", 30))),
]


@pytest.mark.parametrize(("length", "kind", "window"), CASES)
def test_attention_and_its_gradients_are_those_of_torch(length, kind, window):
    check_torch(length, kind, window, causal=True)


@pytest.mark.parametrize("length", [40, 2 * QUERY_BLOCK + 77, BLOCK + 2])
def test_attention_in_both_directions_is_that_of_torch(length):
    check_torch(length, "packed", None, causal=False)


def check_torch(length, kind, window, causal):
    tokens = places(length, kind)
    query, key, value, weights = drawn(length)
    limit = None if window is None else np.int32(window)

    def weighted(query, key, value):
        out = attention(query, key, value, tokens, tokens, limit, causal=causal)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    expected = torch_attention(length, allowed(tokens, window, causal))
    # float32 against float64, outputs and gradients of order 1 to 10
    assert largest_difference([out, *gradients], expected) <= 2e-5


def test_dropped_weights_are_drawn_alike_forward_and_backward():
    """With values that are the keys' numbers, a query's output is its row of weights; the gradient is that of the weights left."""
    length, rate, rng = BLOCK + 9, 0.25, jax.random.key(3)
    query, key, _, _ = drawn(length)
    one_hot = np.broadcast_to(np.eye(length, dtype=np.float32)[:, None], (2, length, GROUPS, length))
    wide = np.concatenate([key, np.zeros((2, length, GROUPS, length - HEAD_DIM), np.float32)], axis=-1)
    query = np.concatenate([query, np.zeros((2, length, HEADS, length - HEAD_DIM), np.float32)], axis=-1) * 8
    tokens = places(length, "packed")
    run = functools.partial(attention, query_tokens=tokens, key_tokens=tokens, causal=False)
    weights = np.asarray(run(query, wide, one_hot))
    found = np.asarray(run(query, wide, one_hot, dropout=rate, rng=rng))
    kept = found != 0
    np.testing.assert_allclose(found[kept], weights[kept] / (1 - rate), rtol=1e-5)
    share = kept[weights > 0].mean()
    assert abs(share - (1 - rate)) <= 4 * np.sqrt(rate * (1 - rate) / (weights > 0).sum())
    assert np.array_equal(found, run(query, wide, one_hot, dropout=rate, rng=rng))
    assert np.array_equal(weights, run(query, wide, one_hot, dropout=rate))

    def plain(query, key):
        heads = key.repeat(HEADS // GROUPS, axis=2)
        scores = jax.numpy.einsum("bqhd,bkhd->bqhk", query, heads) * query.shape[-1] ** -0.5
        scores = jax.numpy.where(allowed(tokens, None, causal=False)[:, :, None], scores, -1e30)
        return jax.numpy.where(kept, jax.nn.softmax(scores, axis=-1) / (1 - rate), 0.0)

    def loss(function):
        return lambda query, key: jax.numpy.sum(jax.numpy.sin(10 * function(query, key)))

    ours = jax.grad(loss(lambda query, key: run(query, key, one_hot, dropout=rate, rng=rng)), argnums=(0, 1))(query, wide)
    expected = jax.grad(loss(plain), argnums=(0, 1))(query, wide)
    for one, other in zip(ours, expected, strict=True):
        assert largest_difference(one, other) <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("window", [None, 3])
def test_visible_keys(window):
    tokens = places(30, "packed")
    assert np.array_equal(visible(tokens, tokens, window), allowed(tokens, window))


def test_a_row_of_nothing_but_padding_is_finite_forward_and_backward():
    query, key, value, _ = drawn(40)
    nothing = Tokens(np.zeros((2, 40), np.int32), np.zeros((2, 40), np.int32), np.arange(40, dtype=np.int32))
    gradients = jax.grad(lambda *parts: attention(*parts, nothing, nothing).sum(), argnums=(0, 1, 2))(query, key, value)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


def test_bfloat16_gradients_stay_near_float32():
    query, key, value, weights = drawn(40)
    tokens = places(40, "packed")

    def gradients(dtype):
        parts = [jax.numpy.asarray(part, dtype) for part in (query, key, value)]
        return jax.grad(lambda *parts: (attention(*parts, tokens, tokens).astype(np.float32) * weights).sum(), argnums=(0, 1, 2))(*parts)

    half, wide = gradients("bfloat16"), gradients("float32")
    assert {leaf.dtype for leaf in half} == {jax.numpy.dtype("bfloat16")}
    for one, other in zip(half, wide, strict=True):  # 8 bits of mantissa, a handful of roundings
        assert largest_difference(one, other) <= 0.03 * np.abs(other).max()
