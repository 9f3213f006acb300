"""Text from a causal model: greedy, temperature, top-k, top-p, for prompts of different lengths.

A program is compiled for each padded length of prompts (a multiple of 64) and number of rows in a batch, and kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.methods.mixed_lora import BASE_ALONE, choose_adapters
from jaxft.models.layers import Cache
from jaxft.models.node import prepared, virtual_tokens

_BUCKET = 64  # prompts are padded to a multiple of so many tokens, so that few programs serve all lengths
_MASKED = -1e30
_GREEDY = 1e-6  # a temperature below which the likeliest token is all that is left


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 32
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # only the k likeliest; 0 is off
    top_p: float = 1.0  # only the likeliest that together reach p (Holtzman et al. 2019, arXiv:1904.09751); 1 is off
    eos_token_ids: tuple[int, ...] = ()  # any of these ends a text
    pad_token_id: int = 0  # what follows an ended text

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"Sampling needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {self.max_new_tokens}, "
                f"{self.temperature}, {self.top_k} and {self.top_p}."
            )


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 16,
    done: Callable[[int], Any] = lambda count: None,
    adapters: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Returns the new tokens of each prompt, (new,) int32, its end-of-text token left out.

    Prompts of similar length share a batch; a batch is padded on the left, and ends once all its texts have. Batches whose longest prompts
    are padded to the same multiple of 64 tokens share a compiled program.

    Args:
      model: a causal model.
      params: its parameters, with or without a method's.
      prompts: (length,) int32 tokens each, at least one.
      sampling: how tokens are chosen.
      seed: of the choice.
      batch_size: prompts at one time.
      done: told how many prompts were answered, after each batch.
      adapters: which of the parameters' mixed adapters each prompt has, -1 for the base alone; None where there are none.

    Raises:
      UserError: adapters that `params` don't hold, or not one a prompt; texts that would be longer than a table of positions.
    """
    if adapters is not None and len(adapters) != len(prompts):
        raise UserError(f"There are {len(prompts)} prompts and {len(adapters)} adapters; there must be one a prompt.")
    _check_positions(model, [len(prompt) for prompt in prompts], virtual_tokens(params), sampling.max_new_tokens)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    made: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for number, start in enumerate(range(0, len(order), batch_size)):
        chosen = order[start : start + batch_size]
        tokens, mask = _pad_left([prompts[i] for i in chosen], batch_size, sampling.pad_token_id)
        if adapters is not None:
            own = [adapters[i] for i in chosen]
            params = choose_adapters(params, own + [BASE_ALONE] * (batch_size - len(own)))
        key = jax.random.fold_in(jax.random.key(seed), number)
        new, lengths = jax.device_get(_program(model, sampling)(params, tokens, mask, key))
        for row, i in enumerate(chosen):
            made[i] = new[row, : lengths[row]]
        done(len(chosen))
    return made


def _check_positions(model: Any, lengths: Sequence[int], before: int, new: int) -> None:
    """Raises `UserError` where a model with a table of positions has too few for the longest prompt and its answer."""
    positions, longest = model.config.max_position_embeddings, max(lengths, default=0)
    if model.config.learned_positions and before + longest + new > positions:
        after = f" after {before} virtual tokens" if before else ""
        raise UserError(
            f"Prompt {lengths.index(longest) + 1} has {longest} tokens{after}, and its answer may have {new}; the model has {positions} "
            "positions. Shorten the prompt, or lower max_new_tokens."
        )


def _pad_left(prompts: Sequence[np.ndarray], rows: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    width = -(-max(len(prompt) for prompt in prompts) // _BUCKET) * _BUCKET
    tokens, mask = np.full((rows, width), pad, np.int32), np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


@functools.lru_cache(maxsize=8)
def _program(model: nn.Module, sampling: Sampling) -> Any:
    return jax.jit(functools.partial(_generate, model, sampling))


def _generate(
    model: nn.Module, sampling: Sampling, params: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens (batch, max_new_tokens) and how many each row has before its end, (batch,)."""
    batch, width = tokens.shape
    limit = sampling.max_new_tokens
    variables = {"params": prepared(params)}

    def forward(tokens: jax.Array, mask: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        out: Any = model.apply(variables, tokens, attention_mask=mask, cache=cache)
        last: Any = model.apply(variables, out.hidden_states[-1][:, -1], method="logits")
        return last.astype(jnp.float32), out.cache

    ends = jnp.asarray(sampling.eos_token_ids or (-1,), jnp.int32)
    cache: Any = model.apply(variables, batch, width + limit, method="new_cache")
    logits, cache = forward(tokens, mask, cache)

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, ended, _, _ = carry
        return (step < limit) & ~jnp.all(ended)

    def advance(carry: Any) -> Any:
        step, logits, cache, ended, new, lengths = carry
        token = jnp.where(ended, sampling.pad_token_id, choose(logits, jax.random.fold_in(key, step), sampling))
        ended |= jnp.isin(token, ends)
        new = new.at[:, step].set(token)
        lengths += (~ended).astype(jnp.int32)
        logits, cache = forward(token[:, None], jnp.ones((batch, 1), jnp.int32), cache)
        return step + 1, logits, cache, ended, new, lengths

    empty = jnp.full((batch, limit), sampling.pad_token_id, jnp.int32)
    ended = ~jnp.any(mask, axis=1)  # rows that only fill the batch
    start = (jnp.int32(0), logits, cache, ended, empty, jnp.zeros(batch, jnp.int32))
    _, _, _, _, new, lengths = jax.lax.while_loop(unfinished, advance, start)
    return new, lengths


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the next tokens, (batch,) int32, of logits (batch, vocabulary) float32."""
    if sampling.temperature < _GREEDY:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, _MASKED, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, _MASKED, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
