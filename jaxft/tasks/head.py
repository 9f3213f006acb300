"""The output head and cross-entropy at scored positions only, in chunks: logits of tokens that nobody scores are never made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a batch's scored tokens add up to: each () float32. A mean is a sum divided by `weight`, once, at the end."""

    loss: jax.Array  # what the gradient descends: negative log-likelihood, with label smoothing and z-loss where they are on
    nll: jax.Array  # negative log-likelihood, nats
    correct: jax.Array  # tokens whose likeliest word is the true one
    weight: jax.Array  # the tokens' weights


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
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Returns the sums over all scored tokens, holding the logits of `chunk` tokens at a time, in the backward pass too.

    Args:
      model: its method `logits` is the output head.
      params: the model's parameters.
      hidden: (tokens, features), what the head reads.
      targets: (tokens,) int32.
      weights: (tokens,) float32, 0 for fill.
      chunk: tokens whose logits exist at one time.
      label_smoothing: share of the target spread over the vocabulary.
      z_loss: weight of the squared log-partition.
    """
    tokens = hidden.shape[0]

    def one(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        return cross_entropy(logits, targets, weights, label_smoothing, z_loss)

    if tokens <= chunk:  # these logits are in memory at one time anyway: making them twice would save nothing
        return one(hidden, targets, weights)
    count = -(-tokens // chunk)
    fill = count * chunk - tokens
    padded = (jnp.pad(hidden, ((0, fill), (0, 0))), jnp.pad(targets, (0, fill)), jnp.pad(weights, (0, fill)))
    chunks = jax.tree.map(lambda leaf: leaf.reshape(count, chunk, *leaf.shape[1:]), padded)

    def add(total: Sums, piece: Any) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(one)(*piece)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, Sums(zero, zero, zero, zero), chunks)[0]
