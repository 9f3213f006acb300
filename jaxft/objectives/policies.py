"""What a masking policy hides: pure functions (rng, batch, state) -> groups, drawn inside the step. `jaxft.data.masking` draws.

Whatever the policy, special tokens, padding, a chat template and a prefix that several examples share are never hidden: `batch["words"]`
is 0 there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxft.data.masking import WORDS, Policy, hidden_groups, hidden_words, row_key
from jaxft.errors import UserError, unknown

CONSTANT, LINEAR, COSINE, VALIDATION = "constant", "linear", "cosine", "validation"
SCHEDULES = (CONSTANT, LINEAR, COSINE, VALIDATION)
TOKENS, UNITS, SPANS, TAGS, SALIENCE, LOSS, MIX = "tokens", "words", "spans", "tags", "salience", "loss", "mix"
POLICIES = (TOKENS, UNITS, SPANS, TAGS, SALIENCE, LOSS)

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knowledge:
    """The state that policies draw by; (batch, length) each, None where no policy of the run needs it."""

    rate: jax.Array  # () float32, share of the tokens that may be hidden
    entity_rate: jax.Array  # () float32, the same of tokens in entities
    entities: jax.Array | None = None  # bool, tokens whose word's tag is of an entity
    salience: jax.Array | None = None  # float32, how much the task's loss leans on the token
    certainty: jax.Array | None = None  # float32, from 0 to 1: how likely the model finds what is true there


def counts(rng: jax.Array, batch: Batch, rate: jax.Array) -> jax.Array:
    """Returns how many tokens of each row are hidden, (batch,) int32: `rate` of those that may be, rounded up or down at random so that
    the mean over draws is exact.
    """
    wanted = rate * jnp.sum(batch[WORDS] > 0, axis=1).astype(jnp.float32)
    drawn = jax.vmap(lambda tokens: jax.random.uniform(row_key(rng, tokens)))(batch["tokens"])
    return jnp.floor(wanted + drawn).astype(jnp.int32)


def _drawn(policy: Policy) -> Callable[[jax.Array, Batch, Knowledge], jax.Array]:
    def hide(rng: jax.Array, batch: Batch, known: Knowledge) -> jax.Array:
        many, which = jax.random.split(rng)
        return hidden_groups(which, batch, counts(many, batch, known.rate), policy)

    return hide


def by_tags(rng: jax.Array, batch: Batch, known: Knowledge) -> jax.Array:
    """Returns what is hidden where words of entities, and all others, have a rate of their own."""
    assert known.entities is not None
    return hidden_words(rng, batch, jnp.where(known.entities, known.entity_rate, known.rate))


def by_salience(rng: jax.Array, batch: Batch, known: Knowledge) -> jax.Array:
    """Returns what is hidden where words are drawn in proportion to their salience, until the rate is reached."""
    many, which = jax.random.split(rng)
    return hidden_groups(which, batch, counts(many, batch, known.rate), Policy(whole_words=True), known.salience)


def by_loss(rng: jax.Array, batch: Batch, known: Knowledge) -> jax.Array:
    """Returns what is hidden where a word's rate falls with the task's loss there: it is `rate` where the model is sure of what is true,
    and rate * p where it gives that the probability p.
    """
    assert known.certainty is not None
    return hidden_words(rng, batch, known.rate * known.certainty)


def make_policy(
    name: str, mix: Sequence[tuple[str, float]], span_p: float, span_max: int
) -> Callable[[jax.Array, Batch, Knowledge], jax.Array]:
    """Returns the policy (rng, batch, state) -> groups (batch, length) int32, as of `jaxft.data.masking.hidden_groups`.

    Args:
      name: one of `POLICIES`, or mix.
      mix: pairs of a policy and a share; each row is hidden by one of them, drawn by the shares.
      span_p: of the geometric distribution of the spans' lengths in words.
      span_max: longest span.
    """
    known = {
        TOKENS: _drawn(Policy()),
        UNITS: _drawn(Policy(whole_words=True)),
        SPANS: _drawn(Policy(whole_words=True, spans=True, span_p=span_p, span_max=span_max)),
        TAGS: by_tags,
        SALIENCE: by_salience,
        LOSS: by_loss,
    }
    if name != MIX:
        return known[name]
    shares = jnp.log(jnp.asarray([share for _, share in mix], jnp.float32))

    def mixed(rng: jax.Array, batch: Batch, state: Knowledge) -> jax.Array:
        chosen, which = jax.random.split(rng)
        turn = jax.vmap(lambda tokens: jax.random.categorical(row_key(chosen, tokens), shares))(batch["tokens"])
        groups = jnp.stack([known[name](jax.random.fold_in(which, i), batch, state) for i, (name, _) in enumerate(mix)])
        found: jax.Array = jnp.take_along_axis(groups, turn[None, :, None], axis=0)[0]
        return found

    return mixed


def check_policy(name: str, mix: Sequence[tuple[str, float]]) -> None:
    """Raises `UserError` for a policy that there isn't, and for a mix without shares."""
    if name not in (*POLICIES, MIX):
        raise unknown("objective.policy", name, (*POLICIES, MIX))
    if (name == MIX) != bool(mix):
        raise UserError("objective.mix has the shares of objective.policy=mix, as words:0.5,tags:0.5: give both of them, or neither.")
    for part, share in mix:
        if part not in POLICIES:
            raise unknown("policy of objective.mix", part, POLICIES)
        if share <= 0.0:
            raise UserError(f"objective.mix: the share of {part} is above 0, not {share}. Leave the policy out.")


def parts(name: str, mix: Sequence[tuple[str, float]]) -> set[str]:
    """Returns the policies that are used."""
    return {part for part, _ in mix} if name == MIX else {name}


def progress(schedule: str, number: jax.Array, steps: int, moved: jax.Array) -> jax.Array:
    """Returns how far a schedule is from its first rate to its last one, () float32 from 0 to 1.

    Args:
      schedule: constant stays at the first; linear and cosine reach the last one at the last step; validation goes as far as `moved` says.
      number: optimizer steps done before this one.
      steps: of the whole run.
      moved: of `validated`.
    """
    if schedule == VALIDATION:
        return moved
    done = jnp.minimum(number.astype(jnp.float32) / max(steps - 1, 1), 1.0)
    return {CONSTANT: jnp.zeros_like(done), LINEAR: done, COSINE: (1 - jnp.cos(jnp.pi * done)) / 2}[schedule]


def validated(moved: jax.Array, best: jax.Array, loss: float, move: float) -> tuple[jax.Array, jax.Array]:
    """Returns how far the rate has gone, and the best loss so far, () float32 each, after an evaluation.

    Where validation got no better, the model learns the training rows by heart: the rate goes on to its last one by the share `move` of
    the way.

    >>> moved, best = validated(jnp.float32(0), jnp.float32(jnp.inf), 0.7, 0.25)
    >>> moved, best = validated(moved, best, 0.8, 0.25)
    >>> float(moved), round(float(best), 2)
    (0.25, 0.7)
    """
    further = jnp.minimum(moved + move, 1.0)
    return jnp.where(loss < best, moved, further).astype(jnp.float32), jnp.minimum(best, loss).astype(jnp.float32)
