"""Averages of the trainable weights over the steps, evaluated and exported in the place of the last ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.config import TrainConfig
from jaxft.errors import UserError, unknown

NONE, EMA, SWA = "none", "ema", "swa"
KINDS = (NONE, EMA, SWA)
_WARMUP = 10  # steps: of t steps the average remembers (1 + t) / (10 + t), as tf.train.ExponentialMovingAverage with num_updates

Average = Callable[[Any, Any, jax.Array], Any]  # (average, trainable, steps done) -> average


def make_average(config: TrainConfig, steps: int) -> Average | None:
    """Returns how a run's average follows the weights, leaf by leaf in float32; None for no average.

    ema: average = d * average + (1 - d) * weights after each step, d = `ema_decay`, less in the first steps, so that a short run isn't
    held to its start. swa: the mean of the weights after each step from the share `swa_start` of `steps` on, until then the last weights
    (Izmailov et al. 2018, arXiv:1803.05407, at every step). A weight that is zero after a step is zero in the average: pruned ones stay so.

    >>> average = make_average(TrainConfig(average="swa", swa_start=0.5), steps=4)
    >>> found = jnp.zeros(())
    >>> for step, weight in enumerate([1.0, 2.0, 3.0, 5.0], start=1):
    ...     found = average(found, jnp.asarray(weight), jnp.asarray(step))
    >>> float(found)
    4.0
    """
    if config.average == NONE:
        return None
    start = int(config.swa_start * steps)

    def moved(step: jax.Array) -> jax.Array:
        """How far the average goes towards the weights, () float32."""
        done = step.astype(jnp.float32)
        if config.average == EMA:
            return 1 - jnp.minimum(config.ema_decay, (1 + done) / (_WARMUP + done))
        return 1 / jnp.maximum(done - start, 1)

    def follow(average: Any, trainable: Any, step: jax.Array) -> Any:
        share = moved(step)

        def one(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where((new == 0) | (share == 1), new, old + share * (new - old))

        return jax.tree.map(one, average, trainable)

    return follow


def check(config: TrainConfig) -> None:
    """Raises `UserError` for values that make no sense, or that this kind of average has no use for."""
    if config.average not in KINDS:
        raise unknown("train.average", config.average, KINDS)
    for name, kind in {"ema_decay": EMA, "swa_start": SWA}.items():
        value = getattr(config, name)
        if value != getattr(TrainConfig, name) and config.average != kind:
            raise UserError(f"train.{name} has no effect without train.average={kind}. Set that, or leave this out.")
        if not 0.0 <= value < 1.0:
            raise UserError(f"train.{name} is a share from 0 up to, not including, 1, not {value}.")
