"""Virtual tokens: what prefix tuning, prompt tuning and P-tuning have in common."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.methods.base import Params
from jaxft.models import heads, segments

TEXT = "text"  # the start from real tokens
SITES = ("prefix", "prompt")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer of an encoder: kernel (in, out), bias (out, ...), float32."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x (tokens, in) times the kernel plus the bias."""
        return jnp.tensordot(x, self.kernel, 1, precision="highest") + self.bias


def new_dense(rng: jax.Array, rows: int, columns: tuple[int, ...]) -> Dense:
    """Returns a layer of rows -> columns, uniform in +-1/sqrt(rows), as torch's Linear starts."""
    kernel, bias = jax.random.split(rng)
    return Dense(uniform(kernel, (rows, *columns), rows), uniform(bias, columns, rows))


def uniform(rng: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
    """Returns float32 numbers, uniform in +-1/sqrt(size)."""
    return jax.random.uniform(rng, shape, jnp.float32, -(size**-0.5), size**-0.5)


def check_start(start: str, starts: tuple[str, ...], virtual_tokens: int, text: str, tokens: tuple[int, ...]) -> None:
    """Raises `UserError` for settings of a start that make no sense together."""
    if virtual_tokens < 1:
        raise UserError(f"method.virtual_tokens is 1 or more, not {virtual_tokens}.")
    if start not in starts:
        raise unknown("method.start", start, starts)
    if start == TEXT and not text and not tokens:
        raise UserError("method.start='text' needs the text: set method.text, or method.tokens to its token ids.")
    if start != TEXT and (text or tokens):
        raise UserError(f"method.text and method.tokens are for method.start='text', not '{start}'.")


def tokenize(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Returns the token ids of a start's text, with what the tokenizer puts before a text; raises `UserError` where there are none."""
    found = tuple(int(token) for token in tokenizer(text)["input_ids"])
    if not found:
        raise UserError(f"method.text, {text!r}, has no tokens.")
    return found


def start_tokens(tokens: tuple[int, ...], count: int, vocabulary: int) -> jax.Array:
    """Returns a start's first `count` tokens, (count,) int32, repeated where there are fewer, as peft does.

    Raises `UserError` where there are none, or they aren't the model's.

    >>> start_tokens((5, 7), 3, 10).tolist()
    [5, 7, 5]
    """
    if not tokens:
        raise UserError("method.text isn't tokenized yet: method.tokenized(tokenizer).init(...), or set method.tokens.")
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise UserError(f"method.tokens has {wrong[0]}; the model's tokens are 0 to {vocabulary - 1}.")
    return jnp.asarray((tokens * math.ceil(count / len(tokens)))[:count], jnp.int32)


def embedded(model: nn.Module, params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the model's embeddings of tokens (count,), (count, hidden_size) float32."""

    def run(params: Params) -> Any:
        return model.apply({"params": params}, tokens, method=lambda bound, ids: bound.embed(ids))

    return jax.jit(run)(_bare(params)).astype(jnp.float32)


def keys_values(model: Any, params: Params, tokens: jax.Array) -> jax.Array:
    """Returns what every layer's attention sees of tokens (count,): (count, layers, 2, key_value_heads, head_dim) float32."""

    def run(params: Params) -> list[tuple[jax.Array, jax.Array]]:
        variables, count = {"params": params}, len(tokens)
        cache = model.apply(variables, 1, count, method="new_cache")
        filled = model.apply(variables, tokens[None], cache=cache).cache.layers
        return [filled[segments.key(group)] for group in segments.spans(params)]

    parts = [jnp.stack(pair, axis=1)[:, :, 0] for pair in jax.jit(run)(_bare(params))]  # (layers, 2, count, heads, head_dim) a segment
    return jnp.moveaxis(jnp.concatenate(parts), 2, 0).astype(jnp.float32)


def check_causal(model: Any, what: str, remedy: str) -> None:
    """Raises `UserError` where a model isn't causal: in packed rows its virtual tokens would look at all texts of the row at once."""
    if not heads.is_causal(model):
        raise UserError(f"{what} is for causal models: the virtual tokens of a {model.config.family} would look at the text too. {remedy}")


def check_width(model: Any, what: str) -> None:
    """Raises `UserError` where embeddings are projected to the model's width: peft's prompts, of that width, don't fit before them."""
    config = model.config
    size = getattr(config, "embedding_size", config.hidden_size)
    if size != config.hidden_size:
        raise UserError(
            f"{what} is for models whose embeddings have their hidden_size; this {config.family} has {size} and {config.hidden_size}, "
            "which peft's prompts don't fit either. Take Prefix, whose keys and values every layer sees."
        )


def placed(params: Params, site: str, node: Any) -> Params:
    """Returns `params` with a node at a site; raises `UserError` where one stands there already."""
    if site in params:
        raise UserError(f"These parameters have a {site} already ({type(params[site]).__name__}). A model holds one: leave the other out.")
    return params | {site: node}


def mask_at(params: Params, site: str) -> Any:
    """Returns True at the leaves of a site."""
    return segments.map_leaves(lambda leaf: leaf.path[0] == site, params)


def merge_refusal(method: str) -> UserError:
    """Returns the error of a method whose virtual tokens can't be folded into weights."""
    return UserError(
        f"{method} can't be merged: virtual tokens are no part of any weight. Keep it as an adapter: --mode=export --format=peft, or "
        "jaxft.save_adapter(folder, model, params, method); leave merge out to run the model with it."
    )


def _bare(params: Params) -> Params:
    """The model without virtual tokens."""
    return {name: value for name, value in params.items() if name not in SITES}
