"""P-tuning: embeddings before the text's, made by a trained encoder (Liu et al. 2021, arXiv:2103.10385)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.methods import virtual
from jaxft.methods.base import Method, Params
from jaxft.methods.prompt import SITE, Embeddings
from jaxft.models import node as nodes

ENCODERS = ("mlp", "lstm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LSTM:
    """One direction of one LSTM layer; the 4 * hidden columns are torch's gates: input, forget, cell, output."""

    weight_ih: jax.Array  # (in, 4 * hidden) float32
    weight_hh: jax.Array  # (hidden, 4 * hidden) float32
    bias_ih: jax.Array  # (4 * hidden,) float32
    bias_hh: jax.Array  # (4 * hidden,) float32

    def __call__(self, x: jax.Array, reverse: bool) -> jax.Array:
        """Returns the states of x (tokens, in), first to last or last to first: (tokens, hidden)."""
        given = jnp.matmul(x, self.weight_ih, precision="highest") + self.bias_ih + self.bias_hh

        def step(carry: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            state, cell = carry
            gates = row + jnp.matmul(state, self.weight_hh, precision="highest")
            enter, forget, new, leave = jnp.split(gates, 4)
            cell = nn.sigmoid(forget) * cell + nn.sigmoid(enter) * jnp.tanh(new)
            state = nn.sigmoid(leave) * jnp.tanh(cell)
            return (state, cell), state

        empty = jnp.zeros(len(self.weight_hh), jnp.float32)
        return jax.lax.scan(step, (empty, empty), given, reverse=reverse)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """One LSTM layer in both directions."""

    forward: LSTM
    backward: LSTM

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (tokens, in) -> (tokens, 2 * hidden)."""
        return jnp.concatenate([self.forward(x, reverse=False), self.backward(x, reverse=True)], axis=-1)


@nodes.node
@dataclasses.dataclass(frozen=True)
class EncodedEmbeddings(nodes.Prompt):
    """A prompt made by an encoder: embedding -> LSTM layers, where there are any -> linear layers with ReLU between.

    Fields: embedding (virtual_tokens, hidden_size) float32; lstm and mlp, tuples of layers.
    """

    embedding: jax.Array
    lstm: tuple[Bidirectional, ...]
    mlp: tuple[virtual.Dense, ...]

    def embeddings(self) -> jax.Array:
        x = self.embedding
        for both in self.lstm:
            x = both(x)
        for dense in self.mlp[:-1]:
            x = nn.relu(dense(x))
        return self.mlp[-1](x)


@dataclasses.dataclass(frozen=True)
class PTuning(Method):
    """Trains embeddings of virtual tokens and the encoder that they pass; the model is frozen.

    The text's positions begin after them. The model doesn't start as the base: the encoder starts at random, as peft's does.

    >>> PTuning(virtual_tokens=10, encoder="lstm").layers
    2
    """

    virtual_tokens: int = 20  # length of the prompt
    encoder: str = "mlp"  # mlp: three linear layers with ReLU between; lstm: bidirectional, then two linear layers
    hidden_size: int = 0  # width of the encoder, for an LSTM of each direction; 0 is the model's hidden_size
    layers: int = 2  # of the LSTM
    folded: bool = False  # only what the encoder gives, as an adapter's file holds it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.virtual_tokens < 1:
            raise UserError(f"method.virtual_tokens is 1 or more, not {self.virtual_tokens}.")
        if self.encoder not in ENCODERS:
            raise unknown("method.encoder", self.encoder, ENCODERS)
        if self.hidden_size < 0:
            raise UserError(f"method.hidden_size is 0 or more, not {self.hidden_size}.")
        if self.layers < 1:
            raise UserError(f"method.layers is 1 or more, not {self.layers}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a prompt and its encoder; raises `UserError` where there is one already, or embeddings are projected."""
        virtual.check_width(model, "PTuning")
        return virtual.placed(params, SITE, self._made(rng, model))

    def mask(self, params: Params) -> Any:
        """Returns True at the prompt and its encoder."""
        return virtual.mask_at(params, SITE)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Raises `UserError`: a prompt can't be merged."""
        raise virtual.merge_refusal("PTuning")

    def hidden_of(self, model: Any) -> int:
        """Returns the width of the encoder for a model."""
        return self.hidden_size or model.config.hidden_size

    def _made(self, rng: jax.Array, model: Any) -> nodes.Prompt:
        features, hidden = model.config.hidden_size, self.hidden_of(model)
        first, lstm, mlp = jax.random.split(rng, 3)
        embedding = jax.random.normal(first, (self.virtual_tokens, features), jnp.float32)
        if self.folded:
            return Embeddings(embedding)
        if self.encoder == "mlp":
            return EncodedEmbeddings(embedding, (), _chain(mlp, (features, hidden, hidden, features)))
        sizes = [features, *[2 * hidden] * (self.layers - 1)]
        stack = tuple(_bidirectional(jax.random.fold_in(lstm, number), size, hidden) for number, size in enumerate(sizes))
        return EncodedEmbeddings(embedding, stack, _chain(mlp, (2 * hidden, 2 * hidden, features)))


def _chain(rng: jax.Array, sizes: tuple[int, ...]) -> tuple[virtual.Dense, ...]:
    """Linear layers from each size to the next."""
    pairs = enumerate(itertools.pairwise(sizes))
    return tuple(virtual.new_dense(jax.random.fold_in(rng, number), rows, (columns,)) for number, (rows, columns) in pairs)


def _bidirectional(rng: jax.Array, features: int, hidden: int) -> Bidirectional:
    forward, backward = jax.random.split(rng)
    return Bidirectional(_lstm(forward, features, hidden), _lstm(backward, features, hidden))


def _lstm(rng: jax.Array, features: int, hidden: int) -> LSTM:
    """A layer uniform in +-1/sqrt(hidden), as torch's LSTM starts."""
    shapes = ((features, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden,))
    keys = jax.random.split(rng, len(shapes))
    return LSTM(*(virtual.uniform(key, shape, hidden) for key, shape in zip(keys, shapes, strict=True)))
