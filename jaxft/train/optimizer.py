"""The update: optax's optimizers and schedules, on the trainable leaves only."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.config import OptimizerConfig
from jaxft.errors import UserError, unknown
from jaxft.models import segments
from jaxft.train.moments import in_8_bits

NO_DECAY = ("bias", "lora_bias", "scale")  # leaves that weight decay leaves alone, by the last part of their name
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
MOMENTS = {"float32": OPTIMIZERS, "int8": ("adamw", "lion")}  # and which optimizers can hold them so
SCHEDULES = ("constant", "linear", "cosine", "wsd")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step: a linear warmup to the peak, then what `config.schedule` names.

    The first step already trains: warmup starts at peak / warmup steps, not at 0.

    >>> schedule = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant", warmup=4), steps=10)
    >>> [round(float(schedule(step)), 2) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    peak, end = config.learning_rate, config.learning_rate * config.final_scale
    warmup = round(config.warmup if config.warmup >= 1 else config.warmup * steps)
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_scale)
    else:
        decay = min(max(round(config.decay * steps), 1), rest)
        after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup])


def decay_mask(trainable: Any) -> Any:
    """Returns which trainable leaves decay: all but biases, norms and scales."""
    return segments.map_leaves(lambda leaf: leaf.path[-1] not in NO_DECAY, trainable)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by the trainable gradient's global norm, then the optimizer with its schedule and decay mask.

    Where `learning_rate` and `weight_decay` are arrays, () float32, one program serves all their values.
    """
    schedule = make_schedule(config, steps)
    decay = config.weight_decay
    if config.name == "adamw":
        update = _decayed(_held(config, _scale_by_adam(config.b1, config.b2, config.eps)), schedule, decay)
    elif config.name == "lion":
        update = _decayed(_held(config, optax.scale_by_lion(config.b1, config.b2)), schedule, decay)
    elif config.name == "adafactor":
        update = optax.adafactor(schedule)
        update = _with_decay(update, schedule, decay) if _is_on(decay) else update
    elif config.name == "sgd":
        update = optax.sgd(schedule, momentum=config.b1 or None)
        update = optax.chain(optax.add_decayed_weights(decay, mask=decay_mask), update) if _is_on(decay) else update
    else:
        raise unknown("optimizer", config.name, OPTIMIZERS)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def _scale_by_adam(b1: Any, b2: Any, eps: float) -> optax.GradientTransformationExtraArgs:
    """Returns optax's scale_by_adam, which corrects the moments of leaves that are `late`, int32 for each, by so many steps fewer."""
    inner = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Any, state: Any, params: Any = None, late: Any = None, **_: Any) -> tuple[Any, Any]:
        moved, state = inner.update(updates, state, params)
        if late is None:
            return moved, state

        def scaled(mean: jax.Array, square: jax.Array, missed: jax.Array) -> jax.Array:
            own = jnp.maximum(state.count - missed, 1).astype(jnp.float32)
            return mean / (1 - b1**own) / (jnp.sqrt(square / (1 - b2**own)) + eps)

        return jax.tree.map(scaled, state.mu, state.nu, late), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_on(number: float | jax.Array) -> bool:
    """Whether a number is another than 0; an array, which a program takes as an argument, is."""
    return isinstance(number, jax.Array) or bool(number)


def _held(config: OptimizerConfig, scaling: optax.GradientTransformation) -> optax.GradientTransformation:
    return in_8_bits(scaling) if config.moments == "int8" else scaling


def _decayed(scaling: optax.GradientTransformation, schedule: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    """Returns the update of AdamW and Lion: what `scaling` makes of the gradient and the decay, times the rate."""
    return optax.chain(scaling, optax.add_decayed_weights(decay, decay_mask), optax.scale_by_learning_rate(schedule))


def _with_decay(inner: optax.GradientTransformation, schedule: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    """Takes rate * decay * parameter off too, as AdamW does: Adafactor's own decay in optax knows no rate."""
    decayed = optax.chain(optax.set_to_zero(), optax.add_decayed_weights(decay, decay_mask), optax.scale_by_learning_rate(schedule))

    def init(params: Any) -> Any:
        return inner.init(params), decayed.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, first = inner.update(updates, state[0], params)
        lost, second = decayed.update(updates, state[1], params)
        return jax.tree.map(jnp.add, moved, lost), (first, second)

    return optax.GradientTransformation(init, update)


_FOLLOWED = {"decay": ("wsd",), "final_scale": ("linear", "cosine", "wsd")}  # of the fields, the schedules that they are of
_USED = {"adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2"), "sgd": ("b1",), "adafactor": ()}  # of the fields that not all optimizers have


def check(config: OptimizerConfig) -> None:
    """Raises `UserError` for values that make no sense, and for fields that the optimizer has no use for."""
    make_optimizer(config, steps=10)
    for name in ("b1", "b2", "eps"):
        if name not in _USED[config.name] and getattr(config, name) != getattr(OptimizerConfig, name):
            raise UserError(f"optimizer.{name} is set, but {config.name} has none. Leave it out, or take another optimizer.name.")
    if config.moments not in MOMENTS:
        raise unknown("type of optimizer.moments", config.moments, MOMENTS)
    if config.name not in MOMENTS[config.moments]:
        raise UserError(
            f"optimizer.moments: {config.moments} is for {' and '.join(MOMENTS[config.moments])}, not for {config.name}. "
            "Leave it out, or take one of them as optimizer.name."
        )
    if config.learning_rate == 0:
        raise UserError("optimizer.learning_rate is 0: nothing would train.")
    for name in ("b1", "b2"):
        if getattr(config, name) == 1:
            raise UserError(f"optimizer.{name} is 1: an average that never moves. It is below 1.")
    for name in ("learning_rate", "weight_decay", "clip_norm", "warmup", "eps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"optimizer.{name} is a finite number, 0 or more, not {getattr(config, name)}.")
    for name in ("b1", "b2", "decay", "final_scale"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"optimizer.{name} is from 0 to 1, not {getattr(config, name)}.")
    for name, schedules in _FOLLOWED.items():
        if config.schedule not in schedules and getattr(config, name) != getattr(OptimizerConfig, name):
            raise UserError(
                f"optimizer.{name} has no effect with optimizer.schedule={config.schedule}. Leave it out, or set that to "
                f"{' or '.join(schedules)}."
            )
