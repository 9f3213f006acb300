"""One optimizer step: partitioned gradient, accumulated, divided once, clipped, applied; compiled once a run."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxft.methods.partition import combine
from jaxft.objectives.base import Logged, Objective, Step, Supervised, divided
from jaxft.tasks.head import Sums
from jaxft.train.average import Average
from jaxft.train.mixout import mixed
from jaxft.train.state import State, key_for

Batch = Mapping[str, Any]  # of arrays, or of batches by their names
Metrics = dict[str, jax.Array]


def make_step(
    model: nn.Module,
    task: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    neftune_alpha: float = 0.0,
    r_drop: float = 0.0,
    penalty: Callable[[Any], jax.Array] | None = None,
    average: Average | None = None,
    mixout: float = 0.0,
    objective: Objective | None = None,
    steps: int = 0,
) -> Callable[..., tuple[State, Metrics]]:
    """Returns step(state, frozen, batch, start=None) -> (state, metrics), to be jitted with the state donated.

    A batch's leaves have leading axes (accumulation, batch). The loss is the sum over every scored token of the step divided by their
    weight, so how a step is cut into micro-batches, rows and devices changes rounding, and what is drawn for each part: dropout, noise,
    mixout and masking; without these nothing but rounding. `penalty`, a function of the whole parameters, is added to that mean once.
    `average` follows the weights where the state has one. With `mixout`, `start` is the trainable leaves before the first step.
    `objective` is the loss around the task's, in a run of so many `steps`. Where the loss, the gradient or the update isn't finite, the
    state comes back as it was, and metrics["finite"] is False.
    """
    around = objective or Supervised()

    def gradient(state: State, frozen: Any, batch: Batch, key: jax.Array, start: Any, shared: Any) -> tuple[Any, Sums, Logged]:
        rngs = {"dropout": jax.random.fold_in(key, 0), "mask": jax.random.fold_in(key, 2), "objective": jax.random.fold_in(key, 4)}
        rngs["run"] = key_for(seed, "run")
        options: dict[str, float] = {}
        if neftune_alpha:
            rngs["noise"] = jax.random.fold_in(key, 1)
            options["neftune_alpha"] = neftune_alpha
        if r_drop:
            options["r_drop"] = r_drop

        given = Step(task, model, frozen, rngs, options, state.step, steps, shared)

        def loss(trainable: Any) -> tuple[jax.Array, tuple[Sums, Logged]]:
            used = mixed(trainable, start, mixout, jax.random.fold_in(key, 3)) if mixout else trainable
            sums, logged = around.sums(given, used, batch, state.objective)
            return sums.loss, (sums, logged)

        gradients, (sums, logged) = jax.grad(loss, has_aux=True)(state.trainable)
        return gradients, sums, logged

    def step(state: State, frozen: Any, batch: Batch, start: Any = None) -> tuple[State, Metrics]:
        key = key_for(seed, "train", state.step)
        count = jax.tree.leaves(batch)[0].shape[0]
        shared = around.shared(batch, state.objective, state.step, steps)

        def add(total: Any, indexed: Any) -> tuple[Any, None]:
            index, micro = indexed
            found = gradient(state, frozen, micro, jax.random.fold_in(key, index), start, shared)
            return jax.tree.map(jnp.add, total, found), None

        if count == 1:
            total = gradient(state, frozen, jax.tree.map(lambda leaf: leaf[0], batch), jax.random.fold_in(key, 0), start, shared)
        else:
            first = jax.tree.map(lambda leaf: leaf[0], batch)
            shapes = jax.eval_shape(gradient, state, frozen, first, key, start, shared)
            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total = jax.lax.scan(add, zero, (jnp.arange(count), batch))[0]
        gradients, sums, logged = total
        weight = jnp.maximum(sums.weight, 1e-9)  # a batch without a scored token has no gradient either
        gradients = jax.tree.map(lambda leaf: leaf / weight, gradients)
        if penalty is not None:
            more = jax.grad(lambda trainable: penalty(combine(trainable, frozen)))(state.trainable)
            gradients = jax.tree.map(jnp.add, gradients, more)
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        trainable, done = optax.apply_updates(state.trainable, updates), state.step + 1
        followed = None if average is None else average(state.average, trainable, done)
        new = State(done, trainable, optimizer_state, followed, around.update(state.objective, trainable, logged, done))
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        metrics = {"loss": sums.loss / weight, "nll": sums.nll / weight} | divided(logged)
        if sums.correct is not None:
            metrics["accuracy"] = sums.correct / weight
        return new, metrics | {"gradient_norm": norm, "scored_tokens": sums.weight, "finite": finite}

    return step


def make_evaluation(model: nn.Module, task: Any) -> Callable[[Any, Any, Batch], tuple[Sums, Any]]:
    """Returns evaluate(trainable, frozen, batch) -> the sums over one (batch, length) batch, without dropout or noise, and the outputs
    that the task's metrics need.
    """

    def evaluate(trainable: Any, frozen: Any, batch: Batch) -> tuple[Sums, Any]:
        found: tuple[Sums, Any] = task.measure(model, combine(trainable, frozen), batch)
        return found

    return evaluate
