"""Moments in 8 bits: bitsandbytes' own optimizers step by step, near float32 over many, a quarter of the bytes, and no trace of a stop."""

import dataclasses

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lenient_optax import make_optimizer

from jaxft.config import OptimizerConfig
from jaxft.errors import UserError
from jaxft.methods.partition import size, size_in_bytes
from jaxft.train import placement
from jaxft.train.checkpoint import Checkpoints, Progress
from jaxft.train.moments import Moments8bit, is_8bit
from jaxft.train.optimizer import check
from jaxft.train.state import new_state

CONFIG = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=0, clip_norm=0, weight_decay=0.1, moments="int8")
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((64, 64)).astype(np.float32)
Y = np.tanh(X @ RANDOM.standard_normal((64, 70)).astype(np.float32) / 8)
START = {
    "up": {"kernel": RANDOM.standard_normal((64, 256)).astype(np.float32) / 8, "bias": np.zeros(256, np.float32)},
    "down": {"kernel": RANDOM.standard_normal((256, 70)).astype(np.float32) / 16},
}


def loss(params):
    hidden = jnp.tanh(X @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["down"]["kernel"] - Y))


def run(optimizer, steps, params=START, state=None):
    """Returns the losses, parameters and state of some steps."""

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params) if state is None else state
    losses = []
    for _ in range(steps):
        value, params, state = step(params, state)
        losses.append(float(value))
    return losses, params, state


def _flat(params):
    return {f"{layer}.{name}": array for layer, parts in params.items() for name, array in parts.items()}


def held(state):
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=is_8bit) if is_8bit(leaf)]


MAKERS = {
    "adamw": lambda groups: bnb.optim.AdamW8bit(groups, lr=0.01),
    "lion": lambda groups: bnb.optim.Lion8bit(groups, lr=0.001, betas=(0.9, 0.99)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_twenty_steps_are_those_of_bitsandbytes(name):
    """On given gradients: in a loop each rounding would come back through the next gradient."""
    config = CONFIG if name == "adamw" else dataclasses.replace(CONFIG, name="lion", learning_rate=0.001, b2=0.99)
    optimizer = make_optimizer(config, 20)
    update = jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    tensors = {leaf: torch.tensor(array.copy(), requires_grad=True) for leaf, array in _flat(START).items()}
    theirs = MAKERS[name]([{"params": [t], "weight_decay": 0.0 if leaf.endswith("bias") else 0.1} for leaf, t in tensors.items()])
    for _ in range(20):
        gradients = jax.tree.map(lambda leaf: RANDOM.standard_normal(leaf.shape).astype(np.float32) ** 3, START)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for leaf, gradient in _flat(gradients).items():
            tensors[leaf].grad = torch.tensor(gradient)
        theirs.step()
    for leaf, array in _flat(params).items():
        moved = np.abs(tensors[leaf].detach().numpy() - _flat(START)[leaf]).mean()
        assert np.abs(array - tensors[leaf].detach().numpy()).mean() < 1e-4 * moved
        for field, codes, scales in (("mu", "state1", "absmax1"), ("nu", "state2", "absmax2"))[: 2 if name == "adamw" else 1]:
            ours, expected = _flat(getattr(state[0], field))[leaf], theirs.state[tensors[leaf]]
            assert is_8bit(ours) == (expected[codes].dtype == torch.uint8)
            if is_8bit(ours):
                # a moment at the border of two codes falls to either side by the last bit
                assert (np.asarray(ours.codes) == expected[codes].numpy()).mean() > 0.999
                np.testing.assert_allclose(ours.scales.reshape(-1), expected[scales], rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_hundreds_of_steps_stay_near_float32(name):
    config = dataclasses.replace(CONFIG, name=name, learning_rate=0.003 if name == "adamw" else 0.0003)
    ours, params, _ = run(make_optimizer(config, 300), 300)
    expected, whole, _ = run(make_optimizer(dataclasses.replace(config, moments="float32"), 300), 300)
    assert expected[-1] < 0.02 * expected[0]
    np.testing.assert_allclose(ours, expected, atol=0.02 * expected[0])
    if name == "adamw":  # Lion steps by signs: what has next to no gradient walks at random, in float32 too
        for layer in ("up", "down"):
            moved = np.linalg.norm(whole[layer]["kernel"] - START[layer]["kernel"])
            assert np.linalg.norm(params[layer]["kernel"] - whole[layer]["kernel"]) < 0.06 * moved


def test_moments_take_a_quarter_of_the_bytes():
    moments = make_optimizer(CONFIG, 10).init(jax.tree.map(jnp.asarray, START))[0]
    for field in (moments.mu, moments.nu):
        kernels = [field["up"]["kernel"], field["down"]["kernel"]]
        assert all(map(is_8bit, kernels))
        parameters = size(START) - START["up"]["bias"].size
        assert size_in_bytes(kernels) == pytest.approx(parameters * (1 + 4 / 256), rel=1e-3)
        assert field["up"]["bias"].dtype == jnp.float32  # too small to gain anything


def test_layers_have_blocks_of_their_own():
    """A stack's state is its layers' states: layers may be cut and joined, and small ones stay float32 however many there are."""
    layers = RANDOM.standard_normal((3, 70, 70)).astype(np.float32)
    params = {"layers": {"0-2": {"q_proj": {"kernel": layers, "bias": layers[:, 0]}}}}
    optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.0), 10)

    @jax.jit
    def second_moments(params):
        return optimizer.update(params, optimizer.init(params), params)[1][0].nu

    state = second_moments(params)["layers"]["0-2"]["q_proj"]
    assert state["bias"].dtype == jnp.float32
    for layer in range(3):
        expected = second_moments({"lm_head": {"kernel": layers[layer]}})["lm_head"]["kernel"]
        np.testing.assert_array_equal(state["kernel"].codes[layer], expected.codes)
        np.testing.assert_array_equal(state["kernel"].scales[layer], expected.scales)


def test_a_resumed_run_equals_one_that_went_on(tmp_path):
    optimizer = make_optimizer(CONFIG, 10)
    whole = run(optimizer, 10)
    _, params, state = run(optimizer, 4)
    stopped = dataclasses.replace(new_state(params, optimizer), step=jnp.int32(4), optimizer=state)
    everywhere = NamedSharding(Mesh(np.asarray(jax.devices()[:1]), ("data",)), P())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stopped, Progress(config={}, base={}, before={}))
    checkpoints.wait()
    again = checkpoints.restore(4, stopped, jax.tree.map(lambda _: everywhere, stopped))
    checkpoints.close()
    rest = run(optimizer, 6, again.trainable, again.optimizer)
    assert whole[0][4:] == rest[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1:], rest[1:])


@pytest.mark.parametrize("spec", [P("tensor", None), P(None, "tensor")])
def test_moments_lie_where_their_parameters_do(spec):
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 1, 2), placement.AXES)
    params = {"kernel": jnp.asarray(RANDOM.standard_normal((32, 1024)), jnp.float32)}
    optimizer = make_optimizer(CONFIG, 10)
    state = new_state(params, optimizer)
    places = placement.state_shardings(state, {"kernel": NamedSharding(mesh, spec)}, mesh, optimizer)
    placed = placement.place(state, places)
    update = jax.jit(lambda state: optimizer.update(state.trainable, state.optimizer, state.trainable), out_shardings=None)
    ours, expected = update(placed), update(state)
    for moments in held(placed.optimizer):
        assert isinstance(moments, Moments8bit)
        assert {shard.data.size for shard in moments.codes.addressable_shards} == {32 * 1024 // 2}
        assert {shard.data.size for shard in moments.scales.addressable_shards} == {32 * 4 // 2}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), ours, expected)


def test_other_optimizers_and_types_are_refused():
    with pytest.raises(UserError, match="optimizer.moments: int8 is for adamw and lion, not for sgd"):
        check(dataclasses.replace(CONFIG, name="sgd"))
    with pytest.raises(UserError, match="There is no type of optimizer.moments 'int4'. Did you mean 'int8'"):
        check(dataclasses.replace(CONFIG, moments="int4"))


def test_the_start_never_holds_the_moments_whole():
    """XLA's own count of what the start takes beside its codes is less than a moment in float32."""
    params = {"kernel": jnp.zeros((1024, 1024))}
    optimizer = make_optimizer(CONFIG, 10)
    program = jax.jit(optimizer.init).lower(params).compile().memory_analysis()
    assert program.temp_size_in_bytes < params["kernel"].nbytes
    assert program.output_size_in_bytes < 0.6 * params["kernel"].nbytes
