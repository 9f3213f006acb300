"""The output head and cross-entropy at scored positions only, in chunks: logits of tokens that nobody scores are never made."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError

_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a batch's slots add up to: each () float32. A mean is a sum divided by `weight`, once, at the end."""

    loss: jax.Array  # what the gradient descends: negative log-likelihood, with label smoothing and z-loss where they are on
    nll: jax.Array  # negative log-likelihood, nats; of numbers, half the squared error
    correct: jax.Array | None  # slots whose likeliest target is the true one; None where nothing is right or wrong
    weight: jax.Array  # the slots' weights


def check_label_smoothing(share: float) -> None:
    """Raises `UserError` for a share that isn't one."""
    if not 0.0 <= share < 1.0:
        raise UserError(f"task.label_smoothing is a share from 0 up to, not including, 1, not {share}.")


def check_head_chunk(tokens: int) -> None:
    """Raises `UserError` for a number of tokens that isn't one."""
    if tokens < 1:
        raise UserError(f"task.head_chunk is a number of tokens, 1 or more, not {tokens}.")


def language_scores(sums: Sums) -> dict[str, float]:
    """Returns mean negative log-likelihood (nats a scored token), perplexity, and the share of tokens told right."""
    loss = float(sums.nll / sums.weight)
    assert sums.correct is not None
    return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": float(sums.correct / sums.weight)}


def gather(hidden: jax.Array, scored: jax.Array) -> jax.Array:
    """Returns the rows of hidden (batch, length, features) at scored (batch, count): (batch * count, features)."""
    return jnp.take_along_axis(hidden, scored[:, :, None], axis=1).reshape(-1, hidden.shape[-1])


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float, z_loss: float) -> Sums:
    """Returns the sums over (tokens, vocabulary) logits, in float32.

    Label smoothing spreads its share evenly over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567); z-loss adds z_loss * log(Z)^2
    (Chowdhery et al. 2022, arXiv:2204.02311).
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    if z_loss:
        loss = loss + z_loss * log_z**2
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return Sums(jnp.sum(loss * weights), jnp.sum(nll * weights), jnp.sum(correct * weights), jnp.sum(weights))


def head_sums(
    model: nn.Module,
    params: Any,
    hidden: Sequence[jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    loss: Callable[[Sequence[jax.Array], jax.Array, jax.Array], _T],
    chunk: int,
    rngs: Mapping[str, jax.Array],
) -> _T:
    """Returns the sums over all slots, holding the outputs of `chunk` slots at a time, in the backward pass too.

    Args:
      model: its method `logits` is the output head.
      params: the model's parameters.
      hidden: of each pass over the batch, (slots, features), what the head reads.
      targets: (slots,) int32 or (slots, outputs) float32.
      weights: (slots,) float32, 0 for fill.
      loss: (logits of each pass, targets, weights) -> sums, or another pytree of what adds up.
      chunk: slots whose outputs exist at one time; 0 is all.
      rngs: keys of `dropout`.
    """
    slots = hidden[0].shape[0]

    def logits(index: int, rows: jax.Array) -> jax.Array:
        own = {name: jax.random.fold_in(key, len(hidden) + index) for name, key in rngs.items()}  # the passes' own come before these
        made: Any = model.apply({"params": params}, rows, method="logits", rngs=own)
        return made

    def one(hidden: Sequence[jax.Array], targets: jax.Array, weights: jax.Array) -> _T:
        return loss([logits(index, rows) for index, rows in enumerate(hidden)], targets, weights)

    given = (tuple(hidden), targets, weights)
    if not chunk or slots <= chunk:  # these outputs are in memory at one time anyway: making them twice would save nothing
        return one(*given)
    chunks = _chunks(given, chunk)

    def add(total: _T, piece: Any) -> tuple[_T, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(one)(*piece)), None

    zero = jax.tree.map(lambda sum: jnp.zeros(sum.shape, sum.dtype), jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], chunks)))
    found: _T = jax.lax.scan(add, zero, chunks)[0]
    return found


def log_likelihoods(model: nn.Module, params: Any, hidden: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns the log-likelihood of each slot's target, (slots,) float32, and whether it is the likeliest, (slots,) bool.

    Args:
      model: its method `logits` is the output head.
      params: the model's parameters.
      hidden: (slots, features), what the head reads.
      targets: (slots,) int32.
      chunk: slots whose outputs exist at one time; 0 is all.
    """

    def one(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, own = given
        made: Any = model.apply({"params": params}, rows, method="logits")
        likelihoods = jax.nn.log_softmax(made.astype(jnp.float32))
        return jnp.take_along_axis(likelihoods, own[:, None], axis=-1)[:, 0], jnp.argmax(made, axis=-1) == own

    slots = len(targets)
    if not chunk or slots <= chunk:
        return one((hidden, targets))
    found = jax.lax.map(one, _chunks((hidden, targets), chunk))
    return jax.tree.map(lambda leaf: leaf.reshape(-1)[:slots], found)


def _chunks(slots: Any, chunk: int) -> Any:
    """Each leaf, (slots, ...), as (chunks, chunk, ...), filled up with zeros."""

    def split(leaf: jax.Array) -> jax.Array:
        count = -(-len(leaf) // chunk)
        return jnp.pad(leaf, ((0, count * chunk - len(leaf)), *[(0, 0)] * (leaf.ndim - 1))).reshape(count, chunk, *leaf.shape[1:])

    return jax.tree.map(split, slots)
