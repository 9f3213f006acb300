"""Which tokens of a text are hidden, and what stands in their place: pure functions of a key, drawn inside the jitted step.

A policy makes groups of tokens that are hidden together: each token its own, the tokens of a word (Devlin et al. 2019, "whole word
masking"), or spans of either with geometric lengths (Joshi et al. 2020, arXiv:1907.10529).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxft.errors import UserError

WORDS = "words"  # what a batch has beside each token: the number of its word, from 1, in its example; 0 where nothing may be hidden
_OPEN = -1  # the group of a token that isn't hidden
_MULTIPLIER = 2654435761  # odd, near 2^32 over the golden ratio (Knuth): neighbouring rows get keys far apart


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is hidden together.

    >>> Policy(spans=True).span_mean
    3.797...
    """

    whole_words: bool = False  # all tokens of a word, or none
    spans: bool = False  # neighbouring tokens, or words where `whole_words` is on
    span_p: float = 0.2  # of the geometric distribution of the spans' lengths
    span_max: int = 10  # longest span; lengths above have no probability

    def __post_init__(self) -> None:
        if not 0.0 < self.span_p < 1.0:
            raise UserError(f"task.span_p is a probability between 0 and 1, not {self.span_p}.")
        if self.span_max < 1:
            raise UserError(f"task.span_max is a number of tokens or words, 1 or more, not {self.span_max}.")

    @property
    def span_shares(self) -> list[float]:
        """The probability of each length, from 1."""
        shares = [self.span_p * (1 - self.span_p) ** length for length in range(self.span_max)]
        return [share / sum(shares) for share in shares]

    @property
    def span_mean(self) -> float:
        """The mean length."""
        return sum(length * share for length, share in enumerate(self.span_shares, start=1))


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What stands in the place of a hidden group, the same kind for all of its tokens."""

    token: int  # the mask token
    vocabulary: int  # random tokens are drawn from all of it
    masked: float = 0.8  # share of the groups that become the mask token
    random: float = 0.1  # share that become random tokens; the rest is kept as it is


def hidden_groups(
    rng: jax.Array, batch: Mapping[str, jax.Array], counts: jax.Array, policy: Policy, preferences: jax.Array | None = None
) -> jax.Array:
    """Returns which tokens are hidden: (batch, length) int32, the number of a token's group in its row, or -1 where it stays.

    Groups are drawn evenly, one after the other, until a row's count is reached; of the last span what is beyond it stays, and a word with
    more tokens than are left is passed over, as in BERT's own code, so a count of few tokens hides no long word.

    Args:
      rng: a key; a row's draw follows from it and from what the row holds, not from its place in the batch.
      batch: tokens, segment_ids and words, (batch, length) int32.
      counts: (batch,) int32, the tokens to hide in each row.
      policy: what is hidden together.
      preferences: (batch, length) float32, 0 or more: a group that isn't drawn yet is the next one in proportion to the sum of its first
        unit's; None: evenly.
    """

    def row(tokens: jax.Array, segments: jax.Array, words: jax.Array, count: jax.Array, own: jax.Array | None) -> jax.Array:
        return _row(row_key(rng, tokens), segments, words, count, policy, own)

    return jax.vmap(row)(batch["tokens"], batch["segment_ids"], batch[WORDS], counts, preferences)


def hidden_words(rng: jax.Array, batch: Mapping[str, jax.Array], rates: jax.Array) -> jax.Array:
    """Returns which tokens are hidden, as `hidden_groups` does, each word by a draw of its own.

    Args:
      rng: a key.
      batch: as of `hidden_groups`.
      rates: (batch, length) float32, how likely the word is hidden, at its first token.
    """

    def row(tokens: jax.Array, segments: jax.Array, words: jax.Array, rates: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(row_key(rng, tokens), tokens.shape) < rates
        first = word_starts(segments, words)
        return jnp.where((words > 0) & drawn[first], first, _OPEN)

    return jax.vmap(row)(batch["tokens"], batch["segment_ids"], batch[WORDS], rates)


def word_starts(segments: jax.Array, words: jax.Array) -> jax.Array:
    """Returns where the word of each token of a row begins, (length,) int32; of a token without a word, somewhere before it."""
    starts = (words > 0) & _changes(segments, words)
    return jax.lax.cummax(jnp.where(starts, jnp.arange(len(words), dtype=jnp.int32), 0))


def _changes(segments: jax.Array, words: jax.Array) -> jax.Array:
    """Which tokens of a row are of another word than the one before, (length,) bool."""
    key = jnp.stack([segments, words])
    return jnp.concatenate([jnp.ones(1, bool), (key[:, 1:] != key[:, :-1]).any(axis=0)])


def replaced(rng: jax.Array, tokens: jax.Array, groups: jax.Array, replacement: Replacement) -> jax.Array:
    """Returns the tokens as the model sees them, (batch, length) int32: hidden groups become mask tokens, random ones, or stay.

    Args:
      rng: a key.
      tokens: (batch, length) int32.
      groups: of `hidden_groups`.
      replacement: the shares.
    """

    def row(tokens: jax.Array, groups: jax.Array) -> jax.Array:
        kinds, words = jax.random.split(row_key(rng, tokens))
        drawn = jax.random.uniform(kinds, tokens.shape)[groups]  # a number for each group
        random = jax.random.randint(words, tokens.shape, 0, replacement.vocabulary, tokens.dtype)
        other = jnp.where(drawn < replacement.masked, jnp.full_like(tokens, replacement.token), random)
        keeps = (groups == _OPEN) | (drawn >= replacement.masked + replacement.random)
        return jnp.where(keeps, tokens, other)

    return jax.vmap(row)(tokens, groups)


def hidden_slots(groups: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Returns where the hidden tokens stand, (batch, slots) int32, and which of the slots hold one, (batch, slots) bool.

    Args:
      groups: of `hidden_groups`.
      slots: as many as the tokens hidden in a row at most, or more.
    """
    shown = (groups == _OPEN).astype(jnp.int32)
    places = jnp.argsort(shown, axis=1, stable=True)[:, :slots].astype(jnp.int32)
    return places, jnp.take_along_axis(groups, places, axis=1) != _OPEN


def row_key(rng: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns a row's key, of the shared one and of what the row holds, (length,) int32, wherever it stands in a batch."""
    odd = 2 * jnp.arange(tokens.shape[0], dtype=jnp.uint32) + jnp.uint32(1)
    return jax.random.fold_in(rng, jnp.sum((tokens.astype(jnp.uint32) + jnp.uint32(1)) * odd * jnp.uint32(_MULTIPLIER)))


def _row(
    rng: jax.Array, segments: jax.Array, words: jax.Array, count: jax.Array, policy: Policy, preferences: jax.Array | None
) -> jax.Array:
    """The groups of one row, (length,): units are tokens or words, in the row's order; a group has the number of its first unit."""
    length = segments.shape[0]
    order, lengths = jax.random.split(rng)
    hideable = words > 0
    starts = hideable
    if policy.whole_words:
        starts &= _changes(segments, words)
    unit = jnp.where(hideable, jnp.cumsum(starts) - 1, length)  # past the end: dropped
    sizes = jnp.zeros(length, jnp.int32).at[unit].add(1, mode="drop")
    if preferences is None:
        place = jax.random.permutation(order, length)
    else:  # the largest of log(weight) + Gumbel noise come first: draws without replacement, each in proportion to the weights left
        weights = jnp.zeros(length, jnp.float32).at[unit].add(preferences, mode="drop")
        place = jnp.argsort(jnp.argsort(-jnp.log(weights) - jax.random.gumbel(order, (length,))))
    group = jnp.arange(length)
    if policy.spans:
        group = _spans(lengths, place, jnp.zeros_like(segments).at[unit].set(segments, mode="drop"), policy)
    drawn = jnp.argsort(place[group], stable=True)  # units, those of the first group drawn first
    taken = jnp.zeros(length, bool).at[drawn].set(_fitting(sizes[drawn], count))
    held = jnp.minimum(unit, length - 1)
    return jnp.where(hideable & taken[held], group[held], _OPEN).astype(jnp.int32)


def is_hidden(groups: jax.Array) -> jax.Array:
    """Returns which tokens are hidden, (batch, length) bool, of `hidden_groups`."""
    return groups != _OPEN


def _spans(rng: jax.Array, place: jax.Array, segments: jax.Array, policy: Policy) -> jax.Array:
    """The group of each unit: of the spans that begin at every unit and cover this one, the start of the first one drawn.

    Args:
      rng: of the lengths.
      place: (units,) when the span that begins here is drawn.
      segments: (units,) the examples: a span ends with its own.
    """
    units = jnp.arange(len(place))
    lengths = jax.random.categorical(rng, jnp.log(jnp.asarray(policy.span_shares)), shape=place.shape) + 1
    group = units
    for back in range(1, min(policy.span_max, len(place))):
        start = jnp.maximum(units - back, 0)
        covers = (units >= back) & (lengths[start] > back) & (segments[start] == segments)
        group = jnp.where(covers & (place[start] < place[group]), start, group)
    return group


def _fitting(sizes: jax.Array, room: jax.Array) -> jax.Array:
    """Which units are taken, (units,) bool: one after the other, each that the room left has space for.

    All that fit before the first one that doesn't are taken at once, so that few rounds do for many units.
    """

    def fits(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        taken, left = state
        return ~taken & (sizes > 0) & (sizes <= left)

    def take(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        taken, left = state
        wanted = jnp.where(fits(state), sizes, 0)
        new = (wanted > 0) & (jnp.cumsum(wanted) <= left)
        return taken | new, left - jnp.sum(jnp.where(new, sizes, 0))

    start = (jnp.zeros(sizes.shape, bool), room.astype(sizes.dtype))
    return jax.lax.while_loop(lambda state: fits(state).any(), take, start)[0]
