"""The average of the weights: its own arithmetic, beside a training that it doesn't touch, and nothing where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import largest_difference, same_bits

from jaxft.config import TrainConfig
from jaxft.errors import UserError
from jaxft.tasks.head import Sums
from jaxft.train import average, placement
from jaxft.train.average import make_average
from jaxft.train.checkpoint import Checkpoints, Progress
from jaxft.train.state import new_state
from jaxft.train.step import make_step

STEPS = 12
SGD = optax.sgd(0.1)


class Quadratic:
    """A task whose loss is the squared distance of the parameters to the batch."""

    def sums(self, model, params, batch, rngs, **_):
        loss = jnp.sum((params["kernel"] - batch["points"]) ** 2)
        return Sums(loss, loss, None, jnp.float32(batch["points"].shape[0]))


def start():
    return {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(5), jnp.float32), "base": None}


def batch(step):
    return {"points": np.random.default_rng((1, step)).standard_normal((2, 3, 5)).astype(np.float32)}


@functools.cache
def run(**options):
    """Returns the state after each step of a run of STEPS, and its program."""
    config = TrainConfig(**options)
    function = make_step(None, Quadratic(), SGD, seed=0, average=make_average(config, STEPS))
    step, state, found = jax.jit(function), new_state(start(), SGD, config.average != average.NONE), []
    for number in range(STEPS):
        state, metrics = step(state, {"kernel": None, "base": jnp.ones(2)}, batch(number))
        assert metrics["finite"]
        found.append(state)
    return found, step


EMA = {"average": "ema", "ema_decay": 0.5}
SWA = {"average": "swa", "swa_start": 0.5}


def test_the_exponential_average_follows_with_its_decay_and_a_warmup():
    found, mean = run(**EMA)[0], np.asarray(start()["kernel"], np.float64)
    for done, state in enumerate(found, start=1):
        decay = min(0.5, (1 + done) / (10 + done))
        mean = decay * mean + (1 - decay) * np.asarray(state.trainable["kernel"], np.float64)
        assert largest_difference(state.average["kernel"], mean) <= 1e-6  # float32 of numbers of order 1
    assert (1 + 5) / (10 + 5) < 0.5 <= (1 + STEPS) / (10 + STEPS)  # both rules were at work


def test_the_mean_is_of_every_step_after_its_start():
    found = run(**SWA)[0]
    for done, state in enumerate(found, start=1):
        taken = found[6:done] or found[done - 1 : done]
        mean = np.mean([np.asarray(one.trainable["kernel"], np.float64) for one in taken], axis=0)
        assert largest_difference(state.average["kernel"], mean) <= 1e-6


@pytest.mark.parametrize("options", [EMA, SWA])
def test_training_is_as_without_an_average_and_compiles_once(options):
    found, step = run(**options)
    plain, _ = run()
    assert same_bits(found[-1].trainable, plain[-1].trainable)
    assert found[-1].weights is found[-1].average
    assert step._cache_size() == 1


def test_without_an_average_the_state_is_what_it_was():
    state = run()[0][-1]
    assert state.weights is state.trainable
    assert len(jax.tree.leaves(state)) == 2  # the step and the kernel: SGD holds nothing


def test_a_pruned_weight_stays_pruned_in_the_average():
    follow = make_average(TrainConfig(average="ema"), STEPS)
    found = follow({"e": jnp.ones(3)}, {"e": jnp.asarray([0.0, 2.0, 0.0])}, jnp.int32(900))
    assert np.asarray(found["e"])[[0, 2]].tolist() == [0.0, 0.0]
    assert 1.0 < float(found["e"][1]) < 1.01


def test_a_checkpoint_holds_the_average(tmp_path):
    state = run(**EMA)[0][3]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, Progress(config={}, base="", before={}))
    checkpoints.wait()
    sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    found = checkpoints.restore(4, jax.tree.map(jnp.zeros_like, state), sharding)
    checkpoints.close()
    used = Checkpoints(tmp_path / "checkpoints").restore_trained(4, state.trainable, averaged=True)
    assert same_bits(found, state)
    assert same_bits(used.weights, state.average)
    assert not same_bits(found.average, found.trainable)


def test_the_average_lies_where_the_weights_do():
    mesh = placement.make_mesh(TrainConfig(fsdp_parallel=2, batch_size=2, data_parallel=1))
    places = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp")), "base": None}
    state = new_state({"kernel": jnp.ones(6), "base": None}, SGD, averaged=True)
    found = placement.state_shardings(state, places, mesh, SGD)
    assert found.average == found.trainable == places
    assert jax.tree.structure(found) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "mean"}, "There is no train.average 'mean'."),
        ({"ema_decay": 0.9}, "train.ema_decay has no effect without train.average=ema."),
        ({"average": "ema", "swa_start": 0.9}, "train.swa_start has no effect without train.average=swa."),
        ({"average": "ema", "ema_decay": 1.0}, "train.ema_decay is a share from 0 up to, not including, 1, not 1.0."),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        average.check(TrainConfig(**options))
    assert str(caught.value).startswith(message)
