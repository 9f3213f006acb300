"""Strong views of rows: tokens swapped, masked and deleted, drawn in the jitted step, every slot still at its token.

Easy data augmentation (Wei and Zou 2019, arXiv:1901.11196) on tokens, in static shapes: a deleted token is turned into padding where it
stands, so that nothing attends to it, and the tokens after it close up by their positions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.models.attention import PADDING
from jaxft.models.dropout import kept as chosen
from jaxft.objectives.base import Batch

RANDOM = -1  # in the place of a mask token, where there is none: a random token


@dataclasses.dataclass(frozen=True)
class View:
    """How a view is drawn.

    >>> View(masked=0.2).masked
    0.2
    """

    masked: float = 0.1  # share of the tokens that become the mask token, or random ones
    deleted: float = 0.1  # share that is taken out
    swapped: float = 0.1  # share that changes place with a neighbour
    mask_token_id: int = RANDOM
    special: tuple[int, ...] = ()  # tokens that stay as and where they are
    vocabulary: int = 0  # random tokens are drawn from all of it
    keeps_read: bool = True  # whether the tokens that the head reads stay as well: where one stands for the whole text

    def __post_init__(self) -> None:
        for name in ("masked", "deleted", "swapped"):
            if not 0.0 <= (share := getattr(self, name)) < 1.0:
                raise UserError(f"objective.{name} is a share from 0 up to, not including, 1, not {share}.")


def strong(rng: jax.Array, batch: Batch, view: View) -> tuple[Batch, jax.Array]:
    """Returns the batch as the view has it, and which slots still have their token, (batch, slots) float32.

    A slot follows its token where that changes place, so a slot's target stays its own. Tokens of a shared prefix stay.

    Args:
      rng: a key.
      batch: tokens, segment_ids, positions, (batch, length) int32; scored, (batch, slots) int32; weights, (batch, slots) float32.
      view: what is drawn.
    """
    swapping, masking, words, deleting = (jax.random.fold_in(rng, number) for number in range(4))
    segments = batch["segment_ids"]
    free = _free(batch, view)
    order = _swaps(swapping, free, segments, view.swapped)
    tokens, free = (jnp.take_along_axis(array, order, axis=1) for array in (batch["tokens"], free))
    places = jnp.take_along_axis(order, batch["scored"], axis=1)  # swaps are their own inverse
    hidden = free & chosen(masking, view.masked, tokens.shape)
    tokens = jnp.where(hidden, _replacements(words, tokens, view), tokens)
    gone = free & chosen(deleting, view.deleted, tokens.shape)
    changed = {
        "tokens": tokens,
        "segment_ids": jnp.where(gone, PADDING, segments).astype(segments.dtype),
        "positions": batch["positions"] - _gone_before(gone, segments).astype(batch["positions"].dtype),
        "scored": places,
    }
    kept = ~jnp.take_along_axis(gone, places, axis=1)
    return {**batch, **changed}, kept.astype(jnp.float32)


def _free(batch: Batch, view: View) -> jax.Array:
    """Which tokens may be changed, (batch, length) bool: neither special nor of a prefix nor padding."""
    tokens = batch["tokens"]
    free = batch["segment_ids"] > PADDING
    if view.special:
        free &= ~jnp.isin(tokens, jnp.asarray(view.special, tokens.dtype))
    if not view.keeps_read:
        return free
    rows = jnp.arange(len(tokens))[:, None]
    return free & ~jnp.zeros(tokens.shape, bool).at[rows, batch["scored"]].max(batch["weights"] > 0)


def _swaps(rng: jax.Array, free: jax.Array, segments: jax.Array, share: float) -> jax.Array:
    """Where each place's token comes from, (batch, length) int32: some neighbours of one example change places.

    Neighbours are paired from the row's first or second token on, a coin's toss, so a token is in one pair.
    """
    phases, draws = jax.random.split(rng)
    rows, length = free.shape
    place = jnp.arange(length, dtype=jnp.int32)
    first = place % 2 == jax.random.bernoulli(phases, 0.5, (rows, 1)).astype(jnp.int32)
    pairs = free[:, :-1] & free[:, 1:] & (segments[:, :-1] == segments[:, 1:])
    pairs = jnp.pad(pairs, ((0, 0), (0, 1))) & first & chosen(draws, share, free.shape)
    second = jnp.pad(pairs[:, :-1], ((0, 0), (1, 0)))
    return place + pairs.astype(jnp.int32) - second.astype(jnp.int32)


def _replacements(rng: jax.Array, tokens: jax.Array, view: View) -> jax.Array:
    if view.mask_token_id != RANDOM:
        return jnp.full_like(tokens, view.mask_token_id)
    return jax.random.randint(rng, tokens.shape, 0, view.vocabulary, tokens.dtype)


def _gone_before(gone: jax.Array, segments: jax.Array) -> jax.Array:
    """How many tokens of its own example were deleted before each token, (batch, length) int32."""
    before = jnp.cumsum(gone, axis=1, dtype=jnp.int32) - gone.astype(jnp.int32)

    def row(before: jax.Array, segments: jax.Array) -> jax.Array:
        index = segments + 1  # a shared prefix is -1
        return before - jax.ops.segment_min(before, index, num_segments=len(segments) + 2)[index]

    return jax.vmap(row)(before, segments)
