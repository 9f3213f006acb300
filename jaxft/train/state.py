"""The state of a run: all that a step changes. The frozen base is an argument of the step, not a part of the state."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes, sized by the trainable leaves."""

    step: jax.Array  # () int32, optimizer steps done; with the seed, it is the state of the data and of everything random
    trainable: Any  # float32 leaves, None where the leaf is frozen
    optimizer: Any  # optax state
    average: Any = None  # of the trainable leaves over the steps, as they; None where the run has none
    objective: Any = None  # arrays of the objective's own; None where it has none

    @property
    def weights(self) -> Any:
        """What is measured and exported: the average where there is one, else the trainable leaves."""
        return self.trainable if self.average is None else self.average


def new_state(trainable: Any, optimizer: optax.GradientTransformation, averaged: bool = False) -> State:
    """Returns the state before the first step, trainable leaves in float32, with their average where it is `averaged`."""
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    average = jax.tree.map(jnp.copy, trainable) if averaged else None  # on its own buffers: a step donates both
    return State(jnp.int32(0), trainable, optimizer.init(trainable), average)


def key_for(seed: int | jax.Array, purpose: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the key of (seed, purpose, step): the only source of randomness on devices."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(key, step)
