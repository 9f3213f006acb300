"""Attention over packed rows, through the fastest exact path of the backend."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.models.dropout import dropped, drops

SHARED = -1  # segment id of tokens that every example of the row sees
PADDING = 0  # segment id of padding
QUERY_BLOCK = 128  # queries a block on the plain path: keys above a block's diagonal are never multiplied
BLOCK = 512  # queries a block where there is no diagonal: its scores are what is in memory at one time
KEPT = "product"  # what remat policy "dots" keeps, here as in every linear layer
_NARROW = 64  # numbers of a row that are reduced at once
_MASKED = -1e30  # a score that no softmax notices, finite so that rows without a visible key stay finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where each token stands: what decides which tokens attend to which."""

    segments: jax.Array  # (batch, length) int32: PADDING, SHARED, or the example within the row
    positions: jax.Array  # (batch, length) int32: within the example
    order: jax.Array  # (length,) int32: place in the row


def visible(query: Tokens, key: Tokens, window: jax.Array | None, causal: bool = True) -> jax.Array:
    """Returns which keys each query attends to, (batch, queries, keys) bool.

    A query sees keys of its own segment and shared ones, none after itself where `causal`, none `window` or more positions before it.
    """
    same = query.segments[:, :, None] == key.segments[:, None, :]
    mask = same | ((key.segments == SHARED)[:, None, :] & (query.segments != PADDING)[:, :, None])
    if causal:
        mask &= query.order[:, None] >= key.order[None, :]
    if window is not None:
        mask &= query.positions[:, :, None] - key.positions[:, None, :] < window
    return mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_tokens: Tokens,
    key_tokens: Tokens,
    window: jax.Array | None = None,
    before: int = 0,
    causal: bool = True,
    dropout: float | jax.Array = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Returns grouped-query attention, (batch, queries, heads, head_dim).

    Args:
      query: (batch, queries, heads, head_dim).
      key: (batch, keys, key_value_heads, head_dim); heads is a multiple of key_value_heads.
      value: as key.
      query_tokens: where the queries stand.
      key_tokens: where the keys stand.
      window: () int32, a token sees only the last so many positions (Mistral); None is all.
      before: keys that stand before the row's own: a prefix.
      causal: whether tokens after the query are hidden from it.
      dropout: the share of attention weights that are set to 0 where there is an `rng`; the others are divided by 1 - dropout. An array
        () float32 may change without another compilation.
      rng: draws them; None is no dropout.
    """
    batch, queries, _, head_dim = query.shape
    chex.assert_shape([key, value], (batch, key.shape[1], key.shape[2], head_dim))
    dropout = 0.0 if rng is None else dropout
    dropping = drops(dropout)
    if jax.default_backend() == "gpu" and cudnn_takes(query, key) and not dropping:
        mask = visible(query_tokens, key_tokens, window, causal)[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    # Rows that attend to themselves go block by block: scores take a block's memory, and what lies above the diagonal is skipped.
    size = QUERY_BLOCK if causal else BLOCK
    starts = range(0, queries, size) if before + queries == key.shape[1] else range(1)
    blocks = []
    for start in starts:
        stop = min(start + size, queries) if len(starts) > 1 else queries
        end = before + stop if len(starts) > 1 and causal else key.shape[1]
        rows, columns = _slice(query_tokens, start, stop), _slice(key_tokens, 0, end)
        own = jax.random.fold_in(rng, start) if rng is not None and dropping else None
        mask = visible(rows, columns, window, causal)
        blocks.append(_plain(query[:, start:stop], key[:, :end], value[:, :end], mask, own, dropout))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def cudnn_takes(query: jax.Array, key: jax.Array) -> bool:
    """Returns whether cuDNN's flash attention with a mask takes these shapes and types, forward and backward, on every GPU that has it.

    Of its rules: heads of a multiple of 8 features, 128 at most, and in training an even number of queries and of keys.

    >>> half = lambda length, dim: jax.ShapeDtypeStruct((1, length, 4, dim), jnp.bfloat16)
    >>> cudnn_takes(half(64, 128), half(64, 128)), cudnn_takes(half(63, 64), half(63, 64)), cudnn_takes(half(64, 100), half(64, 100))
    (True, False, False)
    """
    lengths, head_dim = (query.shape[1], key.shape[1]), query.shape[-1]
    return query.dtype in (jnp.bfloat16, jnp.float16) and all(n % 2 == 0 for n in lengths) and head_dim % 8 == 0 and head_dim <= 128


def _slice(tokens: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(tokens.segments[:, start:stop], tokens.positions[:, start:stop], tokens.order[start:stop])


def _plain(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, rng: jax.Array | None, dropout: float | jax.Array
) -> jax.Array:
    """Softmax attention as one batched product over grouped heads; scores and softmax in float32."""
    batch, queries, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, queries, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4) * head_dim**-0.5
    fixed, rate = (0.0, dropout) if isinstance(dropout, jax.Array) else (dropout, None)
    out = _softmax_product(query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), mask, rng, rate, fixed)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _softmax_product(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, rng: jax.Array | None, rate: jax.Array | None, fixed: float
) -> jax.Array:
    """softmax(query @ key.T where mask) @ value.

    The backward pass makes the weights again from the scores and their log-sum (Dao et al. 2022, arXiv:2205.14135), and draws again what
    is dropped: nothing of the size queries x keys is kept.

    Args:
      query: (batch, groups, heads of a group, queries, head_dim), scaled.
      key: (batch, groups, keys, head_dim).
      value: as key.
      mask: (batch, queries, keys) bool.
      rng: draws which weights are dropped; None drops none.
      rate: their share, () float32, or None where it is a number of the program.
      fixed: that number.
    """
    return _forward(query, key, value, mask, rng, rate, fixed)[0]


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    batch, groups, heads, queries, head_dim = query.shape
    flat = query.reshape(batch, groups, heads * queries, head_dim)
    scores = jnp.einsum("bgqd,bgkd->bgqk", flat, key, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], scores.reshape(batch, groups, heads, queries, -1), _MASKED)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, rng: jax.Array | None, rate: jax.Array | None, fixed: float
) -> tuple[jax.Array, tuple[Any, ...]]:
    dropout = fixed if rate is None else rate
    scores = _scores(query, key, mask)
    top = _row_maximum(scores)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _times(dropped(weights, dropout, rng).astype(value.dtype), value).astype(jnp.float32) / total
    out = checkpoint_name(out.astype(query.dtype), KEPT)
    log_sum = checkpoint_name(top + jnp.log(total), KEPT)
    return out, (query, key, value, mask, rng, rate, out, log_sum)


def _row_maximum(x: jax.Array) -> jax.Array:
    """The maximum over the last axis, which is kept; halves are compared first, number by number, as XLA on CPU doesn't for a reduction."""
    while x.shape[-1] % 2 == 0 and x.shape[-1] > _NARROW:
        half = x.shape[-1] // 2
        x = jnp.maximum(x[..., :half], x[..., half:])
    return jnp.max(x, axis=-1, keepdims=True)


def _times(weights: jax.Array, value: jax.Array) -> jax.Array:
    """weights (batch, groups, heads, queries, keys) times value (batch, groups, keys, head_dim)."""
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    return jnp.einsum("bgqk,bgkd->bgqd", flat, value).reshape(*weights.shape[:-1], -1)


def _backward(fixed: float, kept: tuple[Any, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    query, key, value, mask, rng, rate, out, log_sum = kept
    dropout = fixed if rate is None else rate

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    weights = jnp.exp(_scores(query, key, mask) - log_sum)
    shared = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = jnp.einsum("bgqd,bgkd->bgqk", flat(gradient), value, preferred_element_type=jnp.float32).reshape(weights.shape)
    used = dropped(weights, dropout, rng)  # drawn once for both that need it
    d_scores = (used * d_weights - weights * shared).astype(query.dtype)
    d_value = jnp.einsum("bgqk,bgqd->bgkd", flat(used.astype(value.dtype)), flat(gradient))
    d_key = jnp.einsum("bgqk,bgqd->bgkd", flat(d_scores), flat(query))
    return _times(d_scores, key), d_key, d_value, None, None, None


_softmax_product.defvjp(_forward, _backward)
