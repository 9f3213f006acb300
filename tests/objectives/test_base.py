"""What a step does around an objective, with one that has a part of every kind: a second batch, a denominator, a teacher, a figure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import largest_difference, same_bits

from jaxft import overrides
from jaxft.config import DataConfig, Experiment, ModelConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA
from jaxft.objectives.base import Objective
from jaxft.tasks import SFT
from jaxft.tasks.head import Sums
from jaxft.train.state import new_state
from jaxft.train.step import make_step

RATE, SGD = 0.5, optax.sgd(0.1)
ROWS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
OTHERS = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)


class Linear:
    """A task whose loss is a weighted sum of products of the rows with the weights."""

    def sums(self, model, params, batch, rngs, **_):
        loss = jnp.sum(batch["rows"] @ (params["a"] + params["b"]) * batch["weights"])
        return Sums(loss, loss, None, jnp.sum(batch["weights"]))


@dataclasses.dataclass(frozen=True)
class Teacher(Objective):
    """The squared distance to a teacher on other rows, their mean; the teacher follows."""

    def init(self, task, model, trainable):
        return {"teacher": jax.tree.map(lambda leaf: leaf + 1, trainable), "seen": jnp.float32(0)}

    def shared(self, batch, state, number, steps):
        return jnp.sum(batch["weights"]) / batch["others"]["rows"][..., 0].size

    def sums(self, step, trainable, batch, state):
        sums = step.supervised(trainable, batch)
        far = jnp.square(batch["others"]["rows"] @ (step.params(trainable)["a"] - step.params(state["teacher"])["a"]))
        logged = {"far": (jnp.sum((far > 0.5).astype(jnp.float32)), jnp.float32(far.size))}
        return dataclasses.replace(sums, loss=sums.loss + step.shared * jnp.sum(far)), logged

    def update(self, state, trainable, logged, number):
        teacher = jax.tree.map(lambda old, new: old + RATE * (new - old), state["teacher"], trainable)
        return {"teacher": teacher, "seen": state["seen"] + logged["far"][1]}


def taken(accumulation, weights=(1, 0, 2, 1), objective=None):
    """Returns the state and the metrics after a step from the same start."""
    shape = (accumulation, -1)
    batch = {
        "rows": ROWS.reshape(*shape, 3),
        "weights": np.float32(weights).reshape(shape),
        "others": {"rows": OTHERS.reshape(*shape, 3)},
    }
    objective = Teacher() if objective is None else objective
    trainable, frozen = {"a": jnp.ones(3), "b": None}, {"a": None, "b": jnp.full(3, 2.0)}
    state = new_state(trainable, SGD)
    state = dataclasses.replace(state, objective=objective.init(Linear(), None, state.trainable))
    step = jax.jit(make_step(None, Linear(), SGD, seed=0, objective=objective, steps=5), donate_argnums=0)
    return step(state, frozen, batch)


@pytest.fixture(scope="module")
def after():
    return taken(1)


def test_the_gradient_is_that_of_both_means(after):
    state, metrics = after
    task = (ROWS * np.float32([1, 0, 2, 1])[:, None]).sum(axis=0) / 4
    distance = np.full(3, -1.0)
    other = 2 * OTHERS.T @ (OTHERS @ distance) / len(OTHERS)  # of the trained weights; the teacher's own has none
    np.testing.assert_allclose(state.trainable["a"], 1 - 0.1 * (task + other), rtol=1e-5)
    np.testing.assert_allclose(metrics["far"], ((OTHERS @ distance) ** 2 > 0.5).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"] - metrics["nll"], ((OTHERS @ distance) ** 2).mean(), rtol=1e-5)


def test_how_a_step_is_cut_changes_nothing(after):
    assert largest_difference(after, taken(4)) <= 1e-5  # float32 of numbers of order 1


def test_its_arrays_follow_the_update(after):
    state, _ = after
    np.testing.assert_allclose(state.objective["teacher"]["a"], 2 + RATE * (np.asarray(state.trainable["a"]) - 2), rtol=1e-6)
    assert state.objective["teacher"]["b"] is None
    assert float(state.objective["seen"]) == len(OTHERS)


def test_a_step_that_is_not_finite_leaves_them_as_they_were():
    state, metrics = taken(1, weights=(np.nan, 0, 0, 0))
    assert not metrics["finite"]
    assert same_bits(state.objective, {"teacher": {"a": jnp.full(3, 2.0), "b": None}, "seen": jnp.float32(0)})


def test_an_objective_is_named_on_the_command_line():
    experiment = Experiment("example", ModelConfig(), DataConfig(), LoRA(), SFT())
    found = overrides.parse_flags(experiment, ["--config.objective=none"])
    assert found.objective is None
    assert overrides.from_dict(overrides.to_dict(found)) == found
    for text, message in {"Nothing()": "no objective 'Nothing'", "3": "'3' is no objective"}.items():
        with pytest.raises(UserError, match=message):
            overrides.parse_flags(experiment, [f"--config.objective={text}"])
    with pytest.raises(UserError, match="no field 'config.objective.rate'"):
        overrides.parse_flags(experiment, ["--config.objective.rate=1"])
