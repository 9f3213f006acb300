"""Prefix tuning: every layer's attention sees trained keys and values before the text's (Li & Liang 2021, arXiv:2101.00190)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.methods import virtual
from jaxft.methods.base import Method, Params
from jaxft.models import node as nodes

SITE = "prefix"
STARTS = ("random", "zero", virtual.TEXT)


@nodes.node
@dataclasses.dataclass(frozen=True)
class KeysValues(nodes.Prefix):
    """A prefix stored as it is used.

    Fields: embedding (virtual_tokens, layers, 2, key_value_heads, head_dim) float32, keys and values. Keys are as attention meets them:
    no rotary embedding is applied to them.
    """

    embedding: jax.Array

    def keys_values(self) -> tuple[jax.Array, jax.Array]:
        return _split(self.embedding)


@nodes.node
@dataclasses.dataclass(frozen=True)
class ProjectedKeysValues(nodes.Prefix):
    """A prefix made by a small network: embedding -> hidden -> tanh -> output.

    Fields: embedding (virtual_tokens, key_value_heads * head_dim) float32; output's columns are (layers, 2, key_value_heads, head_dim).
    """

    embedding: jax.Array
    hidden: virtual.Dense
    output: virtual.Dense

    def keys_values(self) -> tuple[jax.Array, jax.Array]:
        return _split(self.output(jnp.tanh(self.hidden(self.embedding))))


def _split(made: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(virtual_tokens, layers, 2, heads, head_dim) -> keys and values, each (layers, virtual_tokens, heads, head_dim)."""
    by_layer = jnp.moveaxis(made, 0, 2)
    return by_layer[:, 0], by_layer[:, 1]


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Trains keys and values of virtual tokens; the model is frozen.

    The text's positions begin after the prefix. A random or zero prefix takes a part of every token's attention, so that the model
    doesn't start as the base; started from a text, it starts as the base does with that text before the input.

    >>> Prefix(virtual_tokens=10, start="text", text="Summarize:").virtual_tokens
    10
    """

    virtual_tokens: int = 20  # length of the prefix
    projection: bool = False  # make it by a small network, embedding -> linear -> tanh -> linear, which steadies training
    projection_hidden: int = 0  # width of that network; 0 is key_value_heads * head_dim
    folded: bool = False  # with projection: only what the network gives, as an adapter's file holds it
    start: str = "random"  # random, zero, or text: the keys and values of real tokens
    text: str = ""  # of start=text; trimmed or repeated to virtual_tokens
    tokens: tuple[int, ...] = ()  # of start=text, the token ids in the place of a text

    def __post_init__(self) -> None:
        super().__post_init__()
        virtual.check_start(self.start, STARTS, self.virtual_tokens, self.text, self.tokens)
        if self.projection_hidden < 0:
            raise UserError(f"method.projection_hidden is 0 or more, not {self.projection_hidden}.")
        if self.folded and not self.projection:
            raise UserError("method.folded is for method.projection=True.")
        if self.projected and self.start == virtual.TEXT:
            raise UserError("method.start='text' gives keys and values, which no projection can be found for: set method.projection=False.")

    def tokenized(self, tokenizer: Any) -> "Prefix":
        """Returns the method with the tokens of its text."""
        return dataclasses.replace(self, tokens=virtual.tokenize(self.text, tokenizer)) if self.text else self

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a prefix; raises `UserError` where there is one already."""
        return virtual.placed(params, SITE, self._made(rng, model, params))

    def mask(self, params: Params) -> Any:
        """Returns True at the prefix."""
        return virtual.mask_at(params, SITE)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Raises `UserError`: a prefix can't be merged."""
        raise virtual.merge_refusal("Prefix")

    @property
    def projected(self) -> bool:
        """Whether the network is among the parameters."""
        return self.projection and not self.folded

    def hidden_of(self, model: Any) -> int:
        """Returns the width of the network for a model."""
        return self.projection_hidden or model.config.num_key_value_heads * model.config.head_dim

    def _made(self, rng: jax.Array, model: Any, params: Params) -> nodes.Prefix:
        config = model.config
        heads = (config.num_key_value_heads, config.head_dim)
        each = (config.num_hidden_layers, 2, *heads)
        first, second, third = jax.random.split(rng, 3)
        if self.projected:
            width, hidden = heads[0] * heads[1], self.hidden_of(model)
            output = virtual.new_dense(third, hidden, each)
            if self.start == "zero":
                output = jax.tree.map(jnp.zeros_like, output)
            embedding = jax.random.normal(first, (self.virtual_tokens, width), jnp.float32)
            return ProjectedKeysValues(embedding, virtual.new_dense(second, width, (hidden,)), output)
        if self.start == virtual.TEXT:
            virtual.check_causal(model, "method.start='text'", "Set method.start='random' or 'zero'.")
            tokens = virtual.start_tokens(self.tokens, self.virtual_tokens, config.vocab_size)
            return KeysValues(virtual.keys_values(model, params, tokens))
        if self.start == "zero":
            return KeysValues(jnp.zeros((self.virtual_tokens, *each), jnp.float32))
        return KeysValues(jax.random.normal(first, (self.virtual_tokens, *each), jnp.float32))
