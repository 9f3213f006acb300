"""Attention over packed rows, through the fastest exact path of the backend."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

SHARED = -1  # segment id of tokens that every example of the row sees
PADDING = 0  # segment id of padding
QUERY_BLOCK = 256  # queries a block on the plain path: keys above a block's diagonal are never multiplied
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
    query: jax.Array, key: jax.Array, value: jax.Array, query_tokens: Tokens, key_tokens: Tokens, window: jax.Array | None = None
) -> jax.Array:
    """Returns causal grouped-query attention, (batch, queries, heads, head_dim).

    Args:
      query: (batch, queries, heads, head_dim).
      key: (batch, keys, key_value_heads, head_dim); heads is a multiple of key_value_heads.
      value: as key.
      query_tokens: where the queries stand.
      key_tokens: where the keys stand.
      window: () int32, a token sees only the last so many positions (Mistral); None is all.
    """
    batch, queries, heads, head_dim = query.shape
    chex.assert_shape([key, value], (batch, key.shape[1], key.shape[2], head_dim))
    if jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and queries > 1:
        mask = visible(query_tokens, key_tokens, window)[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    if queries == key.shape[1]:  # rows attend to themselves: skip what lies above the diagonal, block by block
        starts = range(0, queries, QUERY_BLOCK)
    else:
        starts = range(0, 1)
    blocks = []
    for start in starts:
        stop = min(start + QUERY_BLOCK, queries) if len(starts) > 1 else queries
        end = stop if len(starts) > 1 else key.shape[1]
        rows, columns = _slice(query_tokens, start, stop), _slice(key_tokens, 0, end)
        blocks.append(_plain(query[:, start:stop], key[:, :end], value[:, :end], visible(rows, columns, window)))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _slice(tokens: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(tokens.segments[:, start:stop], tokens.positions[:, start:stop], tokens.order[start:stop])


def _plain(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention as one batched product over grouped heads; scores and softmax in float32."""
    batch, queries, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, queries, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, groups, -1, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bgqd,bkgd->bgqk", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, heads // groups, queries, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(value.dtype)
    out = jnp.einsum("bgqk,bkgd->bgqd", weights.reshape(batch, groups, -1, weights.shape[-1]), value)
    out = out.reshape(batch, groups, heads // groups, queries, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)
