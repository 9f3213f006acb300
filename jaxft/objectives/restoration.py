"""The words that were hidden, told by the family's own head of words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.models import heads
from jaxft.models.attention import SHARED
from jaxft.objectives.base import OWN
from jaxft.tasks.head import Sums, cross_entropy, head_sums


def language_model(model: Any, params: Any) -> tuple[nn.Module, Any]:
    """Returns the family's language model around the same weights, and its parameters.

    Args:
      model: of any task.
      params: its parameters; what it lacks of the language model stands in the objective's own branch.
    """
    if heads.is_language_model(model):
        return model, params
    kind = heads.CAUSAL_LM if heads.is_causal(model) else heads.MASKED_LM
    own = params.get(OWN, {})
    untied = "decoder" in own.get("lm_head", {}) if kind == heads.MASKED_LM else bool(own)
    return model.clone(config=dataclasses.replace(model.config, task=kind, tie_word_embeddings=not untied)), {**params, **own}


def reads(model: Any, segments: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where hidden tokens are told from, (batch, slots) int32, and which of them can be, (batch, slots) bool.

    An encoder tells a token where it stands; a causal model at the token before it in its example, which may stand in a shared prefix.

    Args:
      model: of it the direction.
      segments: (batch, length) int32.
      places: (batch, slots) int32, the hidden tokens'.
    """
    if not heads.is_causal(model):
        return places, jnp.ones(places.shape, bool)
    before = jnp.maximum(places - 1, 0)
    own, other = (jnp.take_along_axis(segments, at, axis=1) for at in (places, before))
    prefix = jnp.sum(segments == SHARED, axis=1, keepdims=True)
    same = (own == other) & (places > 0)
    return jnp.where(same, before, jnp.maximum(prefix - 1, 0)).astype(jnp.int32), same | (prefix > 0)


def restored(model: nn.Module, params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> Sums:
    """Returns the cross-entropy of hidden tokens, its companions with it, summed over slots.

    Args:
      model: of any task.
      params: its parameters, with the objective's own.
      hidden: (slots, features), what the head of words reads.
      targets: (slots,) int32, the tokens that were hidden.
      weights: (slots,) float32, 0 for slots that hold none.
      chunk: slots whose logits exist at one time.
    """

    def loss(logits: Sequence[jax.Array], targets: jax.Array, weights: jax.Array) -> Sums:
        return cross_entropy(logits[0], targets, weights, 0.0, 0.0)

    words, own = language_model(model, params)
    return head_sums(words, own, [hidden], targets, weights, loss, chunk, {})
