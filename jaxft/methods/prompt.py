"""Prompt tuning: trained embeddings before the text's (Lester et al. 2021, arXiv:2104.08691)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.methods import virtual
from jaxft.methods.base import Method, Params
from jaxft.models import node as nodes

SITE = "prompt"
STARTS = ("vocabulary", "random", virtual.TEXT)
_RANGE = 0.5  # of a random start, uniform in +-0.5: section 3.2 of the paper


@nodes.node
@dataclasses.dataclass(frozen=True)
class Embeddings(nodes.Prompt):
    """A prompt stored as it is used: embedding (virtual_tokens, hidden_size) float32."""

    embedding: jax.Array

    def embeddings(self) -> jax.Array:
        return self.embedding


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Trains the embeddings of virtual tokens; the model is frozen.

    The text's positions begin after them. The model doesn't start as the base: it starts as the base does with the prompt's tokens
    before the input.

    >>> Prompt(virtual_tokens=10, start="text", text="Classify the review:").start
    'text'
    """

    virtual_tokens: int = 20  # length of the prompt
    start: str = "vocabulary"  # vocabulary: embeddings of tokens drawn at random; random: uniform in +-0.5; text: embeddings of a text
    text: str = ""  # of start=text; trimmed or repeated to virtual_tokens
    tokens: tuple[int, ...] = ()  # of start=text, the token ids in the place of a text

    def __post_init__(self) -> None:
        super().__post_init__()
        virtual.check_start(self.start, STARTS, self.virtual_tokens, self.text, self.tokens)

    def tokenized(self, tokenizer: Any) -> "Prompt":
        """Returns the method with the tokens of its text."""
        return dataclasses.replace(self, tokens=virtual.tokenize(self.text, tokenizer)) if self.text else self

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a prompt; raises `UserError` where there is one already, and where embeddings are projected."""
        virtual.check_width(model, "Prompt")
        return virtual.placed(params, SITE, Embeddings(self._start(rng, model, params)))

    def mask(self, params: Params) -> Any:
        """Returns True at the prompt."""
        return virtual.mask_at(params, SITE)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Raises `UserError`: a prompt can't be merged."""
        raise virtual.merge_refusal("Prompt")

    def _start(self, rng: jax.Array, model: Any, params: Params) -> jax.Array:
        count, config = self.virtual_tokens, model.config
        if self.start == "random":
            return jax.random.uniform(rng, (count, config.hidden_size), jnp.float32, -_RANGE, _RANGE)
        if self.start == virtual.TEXT:
            tokens = virtual.start_tokens(self.tokens, count, config.vocab_size)
        else:
            tokens = jax.random.randint(rng, (count,), 0, config.vocab_size)
        return virtual.embedded(model, params, tokens)
