"""Schedules against their closed forms, optimizers against torch and their papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lenient_optax import make_optimizer

from jaxft.config import OptimizerConfig
from jaxft.errors import UserError
from jaxft.train.optimizer import OPTIMIZERS, SCHEDULES, check, decay_mask, make_schedule

PEAK = 2.0


def closed_form(name, step, steps, warmup, final_scale, decay):
    """The rate of a step, from the definition."""
    if step < warmup:
        return PEAK * (step + 1) / warmup
    rest = max(steps - warmup, 1)
    done = min((step - warmup) / rest, 1.0)
    end = PEAK * final_scale
    if name == "constant":
        return PEAK
    if name == "linear":
        return PEAK + (end - PEAK) * done
    if name == "cosine":
        return end + (PEAK - end) * (1 + np.cos(np.pi * done)) / 2
    length = min(max(round(decay * steps), 1), rest)
    return PEAK + (end - PEAK) * np.clip((step - (steps - length)) / length, 0, 1)


@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize("name", SCHEDULES)
@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 70),
    final_scale=st.sampled_from([0.0, 0.1, 1.0]),
    decay=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_a_schedule_is_its_closed_form(name, steps, warmup, final_scale, decay):
    warmup = min(warmup, steps - 1)
    config = OptimizerConfig(learning_rate=PEAK, schedule=name, warmup=warmup, final_scale=final_scale, decay=decay)
    schedule = make_schedule(config, steps)
    found = np.asarray(jax.vmap(schedule)(np.arange(steps, dtype=np.float32)))
    expected = [closed_form(name, step, steps, warmup, final_scale, decay) for step in range(steps)]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 of numbers up to 2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 0.1])
def test_every_step_trains(name, warmup):
    """Neither the first step nor the last has a rate of 0."""
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, schedule=name, warmup=warmup), steps=20)
    assert min(float(schedule(step)) for step in range(20)) > 0


def test_a_warmup_below_one_is_a_share_of_the_steps():
    rates = [make_schedule(OptimizerConfig(learning_rate=PEAK, schedule="linear", warmup=warmup), 40) for warmup in (0.25, 10)]
    assert [float(rates[0](step)) for step in range(40)] == [float(rates[1](step)) for step in range(40)]


def test_wsd_is_stable_between_warmup_and_decay():
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, schedule="wsd", warmup=4, decay=0.25), steps=40)
    rates = np.array([float(schedule(step)) for step in range(41)])
    assert (rates[3:31] == PEAK).all()
    assert (np.diff(rates[:4]) > 0).all()
    assert (np.diff(rates[30:]) < 0).all()
    assert rates[40] == 0


# A small problem: fit a matrix and a bias to data

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((30, 6)).astype(np.float32)
Y = (X @ RANDOM.standard_normal((6, 3)) + 1).astype(np.float32)
START = {
    "lm_head": {"kernel": RANDOM.standard_normal((6, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)},
    "norm": {"scale": np.ones(6, np.float32)},
}


def fit(params):
    made = (X * params["norm"]["scale"][None]) @ params["lm_head"]["kernel"] + params["lm_head"]["bias"][None]
    return jnp.mean(jnp.square(made - Y))


def train(config, steps=20, start=START):
    """Returns the losses before each step, and the parameters after the last."""
    optimizer = make_optimizer(config, steps)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(fit)(params)
        updates, state = optimizer.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), state

    params, losses = jax.tree.map(jnp.asarray, start), []
    state = optimizer.init(params)
    for _ in range(steps):
        loss, params, state = step(params, state)
        losses.append(float(loss))
    return losses, params


def train_torch(make, clip, decay, steps=20):
    """The same by torch: the kernel in a group of its own, which decays."""
    kernel, bias, scale = (torch.tensor(array.copy(), requires_grad=True) for array in (*START["lm_head"].values(), START["norm"]["scale"]))
    optimizer = make([{"params": [kernel], "weight_decay": decay}, {"params": [bias, scale], "weight_decay": 0.0}])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((torch.tensor(X) * scale) @ kernel + bias - torch.tensor(Y)).square().mean()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([kernel, bias, scale], clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {"lm_head": {"kernel": kernel, "bias": bias}, "norm": {"scale": scale}}


PLAIN = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup=0, clip_norm=0)
REFERENCES = {
    "adamw": (
        dataclasses.replace(PLAIN, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6),
        lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ),
    "adamw, clipped": (dataclasses.replace(PLAIN, clip_norm=0.3), lambda groups: torch.optim.AdamW(groups, lr=0.05)),
    "sgd": (
        dataclasses.replace(PLAIN, name="sgd", learning_rate=0.02, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    ),
    "sgd without momentum": (dataclasses.replace(PLAIN, name="sgd", b1=0.0), lambda groups: torch.optim.SGD(groups, lr=0.05)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_twenty_steps_are_those_of_torch(name):
    config, make = REFERENCES[name]
    losses, params = train(config)
    expected_losses, expected = train_torch(make, config.clip_norm, config.weight_decay)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)  # float32 rounding, carried through twenty steps
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-4)


def test_lion_steps_by_the_sign_of_its_interpolated_momentum():
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    config = dataclasses.replace(PLAIN, name="lion", learning_rate=0.01, b1=0.9, b2=0.99, weight_decay=0.1)
    params = jax.tree.map(np.copy, START)
    momentum = jax.tree.map(np.zeros_like, params)
    gradient = jax.jit(jax.grad(fit))
    for _ in range(10):
        found = jax.tree.map(np.asarray, gradient(params))
        signs = jax.tree.map(lambda m, g: np.sign(0.9 * m + 0.1 * g), momentum, found)
        decays = {"lm_head": {"kernel": 0.1, "bias": 0.0}, "norm": {"scale": 0.0}}
        params = jax.tree.map(lambda p, s, d: (p - 0.01 * (s + d * p)).astype(np.float32), params, signs, decays)
        momentum = jax.tree.map(lambda m, g: (0.99 * m + 0.01 * g).astype(np.float32), momentum, found)
    _, made = train(config, steps=10)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.001])
def test_every_optimizer_learns(name, decay):
    losses, _ = train(OptimizerConfig(name=name, learning_rate=0.05, warmup=2, weight_decay=decay), steps=60)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_kernels_and_leaves_norms_and_biases_alone(name):
    config = dataclasses.replace(PLAIN, name=name, learning_rate=0.01, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    params = jax.tree.map(lambda leaf: jnp.ones_like(leaf), START)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert (np.asarray(after["lm_head"]["kernel"]) < 1).all()
    assert (np.asarray(after["lm_head"]["bias"]) == 1).all()
    assert (np.asarray(after["norm"]["scale"]) == 1).all()


def test_the_decay_mask_goes_by_the_last_part_of_a_name():
    trainable = {"layers": {"0-1": {"q_proj": {"kernel": {"lora_a": X, "lora_b": X}, "bias": X}, "input_norm": {"scale": X}}}, "norm": None}
    assert decay_mask(trainable) == {
        "layers": {"0-1": {"q_proj": {"kernel": {"lora_a": True, "lora_b": True}, "bias": False}, "input_norm": {"scale": False}}},
        "norm": None,
    }


def test_clipping_is_by_the_norm_of_all_trainable_gradients():
    config = dataclasses.replace(PLAIN, name="sgd", b1=0.0, learning_rate=1.0, clip_norm=2.0)
    optimizer = make_optimizer(config, 10)
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2)), "frozen": None}
    for scale, norm in ((10.0, 2.0), (0.1, 0.1 * 7**0.5)):
        gradients = {"a": jnp.full(3, scale), "b": jnp.full((2, 2), scale), "frozen": None}
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose(np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(updates))), norm, rtol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "no optimizer 'adam'. Did you mean 'adamw'?"),
        ({"name": "adafator"}, "Did you mean 'adafactor'?"),
        ({"schedule": "cosin"}, "no schedule 'cosin'. Did you mean 'cosine'?"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate is a finite number, 0 or more, not -1.0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate is a finite number, 0 or more, not nan"),
        ({"learning_rate": float("inf")}, "optimizer.learning_rate is a finite number, 0 or more, not inf"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay is a finite number, 0 or more"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm is a finite number, 0 or more"),
        ({"warmup": -3}, "optimizer.warmup is a finite number, 0 or more"),
        ({"b1": 1.5}, "optimizer.b1 is from 0 to 1"),
        ({"b2": 1.0}, "optimizer.b2 is 1: an average that never moves"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate is 0: nothing would train"),
        ({"name": "adafactor", "b1": 0.5}, "optimizer.b1 is set, but adafactor has none"),
        ({"name": "sgd", "eps": 0.5}, "optimizer.eps is set, but sgd has none"),
        ({"schedule": "cosine", "decay": 0.5}, "optimizer.decay has no effect with optimizer.schedule=cosine"),
        ({"schedule": "constant", "final_scale": 0.5}, "optimizer.final_scale has no effect with optimizer.schedule=constant"),
        ({"decay": 2.0}, "optimizer.decay is from 0 to 1"),
        ({"final_scale": -0.5}, "optimizer.final_scale is from 0 to 1"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_named(fields, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        check(OptimizerConfig(**fields))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_name_is_taken(name, schedule):
    check(OptimizerConfig(name=name, schedule=schedule))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_follows_the_rate(name):
    """Twenty steps without a gradient take twenty times rate * decay off, by every optimizer."""
    config = OptimizerConfig(name=name, learning_rate=1e-3, schedule="constant", warmup=0, weight_decay=0.1)
    optimizer = make_optimizer(config, 20)
    params = {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    for _ in range(20):
        updates, state = optimizer.update({"kernel": jnp.zeros((2, 2))}, state, params)
        params = optax.apply_updates(params, updates)
    # sgd's decay passes through its momentum, which sums to more of it
    assert 1 - 20 * 1e-4 * 10 < float(params["kernel"][0, 0]) < 1 - 1e-4
    if name != "sgd":
        np.testing.assert_allclose(params["kernel"], (1 - 1e-4) ** 20, rtol=1e-6)
