"""Dropout (Srivastava et al. 2014): what is dropped, and how a run sets other rates than the model came with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.models.hashing import STRIDE, mixed, places

KINDS = ("hidden_dropout", "attention_dropout", "classifier_dropout")
OWN = -1.0  # stands for the rate that the model's config.json has
_BITS = 24  # of a draw, all that a float32 holds exactly


def dropped(x: jax.Array, rate: float | jax.Array | None, rng: jax.Array | None) -> jax.Array:
    """Returns x with a share `rate` of its numbers set to 0 and the others divided by 1 - rate; x itself without a rate or a key.

    Args:
      x: (..., features).
      rate: from 0 up to, not including, 1; an array () float32 may change without another compilation.
      rng: the key; the same numbers are dropped at each call with it.
    """
    if rng is None or rate is None or not drops(rate):
        return x
    share = 1.0 - rate
    return jnp.where(kept(rng, share, x.shape), x / jnp.asarray(share, x.dtype), jnp.zeros((), x.dtype))


def drops(rate: float | jax.Array) -> bool:
    """Returns whether anything may be dropped: the number 0 drops nothing, an array may hold any rate.

    >>> drops(0.0), drops(0.1), drops(jnp.float32(0.0))
    (False, True, True)
    """
    return isinstance(rate, jax.Array) or rate > 0


def as_array(rate: float) -> np.float32:
    """Returns a rate, () float32, such that `dropped` keeps the same numbers by it as by the Python number, up to a rate of a half."""
    return np.float32(1.0) - np.float32(1.0 - rate)


def kept(rng: jax.Array, share: float | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns which numbers stay, `shape` bool, each with probability `share` and by itself.

    A number's draw is a hash of the key and of its place, by two rounds of a mixer of 32 bits, which fuses with what it multiplies. The
    twenty rounds of `jax.random` take twenty times as long on CPU, where attention's weights alone were a quarter of an encoder's step.
    """
    words = jax.random.key_data(rng).reshape(-1)
    first = mixed((places((*shape[:-1], 1)) + 1) * jnp.uint32(STRIDE) + words[0])  # + 1: a mixer makes 0 of 0
    second = mixed(mixed(first) ^ words[-1])  # twice: no column of any row has it
    column = jax.lax.broadcasted_iota(jnp.uint32, (1,) * (len(shape) - 1) + shape[-1:], len(shape) - 1)
    drawn = mixed(mixed(column * jnp.uint32(STRIDE) + first) ^ second)
    return (drawn >> (32 - _BITS)).astype(jnp.float32) < share * 2.0**_BITS


def with_dropout(model: Any, rates: Mapping[str, float]) -> Any:
    """Returns the model with these rates in the place of its own; what its config.json says stays as it is.

    Args:
      model: its configuration's `dropouts` says which kinds it has, and in which of its fields.
      rates: by kind, as KINDS; `OWN` leaves one as it is.

    Raises:
      UserError: a rate that isn't one, or of a kind that the model hasn't.
    """
    given = {kind: rate for kind, rate in rates.items() if rate != OWN}
    check(given)
    known = model.config.dropouts
    for kind in given:
        if kind not in known:
            name = model.config.architecture
            raise UserError(f"config.model.{kind} is set, but {name} has no such dropout. It has: {', '.join(known)}. Leave it out.")
    fields = {field: rate for kind, rate in given.items() for field in known[kind]}
    return model.clone(config=dataclasses.replace(model.config, **fields))


def check(rates: Mapping[str, float]) -> None:
    """Raises `UserError` for a rate that isn't one."""
    for kind, rate in rates.items():
        if rate != OWN and not 0.0 <= rate < 1.0:
            raise UserError(f"config.model.{kind} is a rate from 0 up to, not including, 1, or -1 for the model's own, not {rate}.")
