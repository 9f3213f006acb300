"""A model so small that it is written twice, here and in torch: a token's hidden state is tanh(embedding W) and its example's mean."""

import types

import jax.numpy as jnp
import numpy as np
import torch

from jaxft.objectives.base import Step
from jaxft.tasks import SequenceClassification, TokenClassification

VOCABULARY, FEATURES, HIDDEN, LABELS = 11, 5, 6, ("no", "maybe", "yes")
MASK, SPECIAL = 10, (0, 1)
RANDOM = np.random.default_rng(0)
PARAMS = {
    "embed": RANDOM.standard_normal((VOCABULARY, FEATURES)),
    "kernel": RANDOM.standard_normal((FEATURES, HIDDEN)),
    "head": RANDOM.standard_normal((HIDDEN, len(LABELS))),
}
TRAINABLE = {name: jnp.asarray(value, jnp.float32) for name, value in PARAMS.items() if name != "embed"} | {"embed": None}
FROZEN = {"embed": jnp.asarray(PARAMS["embed"], jnp.float32), "kernel": None, "head": None}
OTHER = {name: value + 0.3 * RANDOM.standard_normal(value.shape) for name, value in PARAMS.items() if name != "embed"}
TEACHER = {name: jnp.asarray(value, jnp.float32) for name, value in OTHER.items()} | {"embed": None}


class Bag:
    """The model."""

    config = types.SimpleNamespace(labels=LABELS, problem_type="single_label_classification", vocab_size=VOCABULARY, hidden_size=FEATURES)
    task = "sequence_classification"

    def apply(self, variables, first=None, *, method, rngs=None, input_ids=None, segment_ids=None, positions=None, embedding_offset=None):
        params = variables["params"]
        if method == "logits":
            return first @ params["head"]
        x = params["embed"][input_ids]
        x = x if embedding_offset is None else x + embedding_offset
        hidden = jnp.tanh(x @ params["kernel"])
        same = ((segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]).astype(jnp.float32)
        return hidden + same @ hidden / jnp.maximum(same.sum(axis=-1, keepdims=True), 1.0)


def torch_params(values):
    """Returns parameters in torch, float64; those that train take a gradient."""
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=name != "embed") for name, value in values.items()}


def torch_logits(params, batch, offset=None):
    """Returns the outputs in the batch's slots, (slots, classes)."""
    tokens, segments, scored = (torch.tensor(np.asarray(batch[name])).long() for name in ("tokens", "segment_ids", "scored"))
    x = params["embed"][tokens]
    x = x if offset is None else x + offset
    hidden = torch.tanh(x @ params["kernel"])
    same = ((segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]).double()
    hidden = hidden + same @ hidden / same.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.gather(hidden, 1, scored[:, :, None].expand(-1, -1, HIDDEN)).reshape(-1, HIDDEN) @ params["head"]


def batch(seed, words=False, known=True):
    """Returns a batch of two rows, with an example of 5 and one of 4 tokens, then padding: a slot an example, or one a word."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, MASK, (2, 12)).astype(np.int32)
    tokens[:, [0, 5]] = 0
    segments = np.repeat([[1] * 5 + [2] * 4 + [0] * 3], 2, axis=0).astype(np.int32)
    scored = np.repeat([[1, 2, 3, 4, 6, 7, 8, 0] if words else [0, 5, 0, 0]], 2, axis=0).astype(np.int32)
    real = np.repeat([[1] * 7 + [0] if words else [1, 1, 0, 0]], 2, axis=0).astype(np.float32)
    targets = random.integers(0, 3, scored.shape).astype(np.int32)
    if not known:
        targets[:, ::2] = -1
    positions = np.repeat([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], 2, axis=0).astype(np.int32)
    made = {"tokens": tokens, "segment_ids": segments, "positions": positions, "scored": scored, "targets": targets, "weights": real}
    return {name: jnp.asarray(value) for name, value in made.items()}


def rows(words=False):
    """Returns a step's micro-batch: labelled rows, and rows without labels."""
    numbers = np.arange(2 * (8 if words else 4), dtype=np.int32).reshape(2, -1)
    return batch(1, words) | {"unlabelled": batch(2, words, known=False) | {"numbers": jnp.asarray(numbers)}}


def step(keys, shared=None, words=False, number=0, steps=10):
    """Returns what a loss is made with."""
    task = TokenClassification() if words else SequenceClassification()
    return Step(task, Bag(), FROZEN, keys, {}, jnp.int32(number), steps, shared)
