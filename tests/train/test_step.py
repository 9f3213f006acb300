"""One optimizer step: what it computes, what it leaves alone, and that how a batch is cut changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_batches import evaluation_batches
from lenient_optax import lenient, make_optimizer
from program_shapes import shapes_of
from tiny_models import largest_difference, load, make_examples, make_reference, moved, same_bits

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.methods.partition import size
from jaxft.models.attention import Tokens
from jaxft.models.layers import embedding_noise
from jaxft.tasks import SFT
from jaxft.train.state import key_for, new_state
from jaxft.train.step import make_evaluation, make_step

EXAMPLES = make_examples([9, 14, 21, 12, 30, 7, 16, 11], prefix=4, answer=3)
METHOD = jaxft.methods.LoRA(rank=4, targets=("q_proj", "v_proj", "down_proj"))
# SGD's update is linear in the gradient: what differs by rounding stays different by rounding
SGD = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", warmup=0, clip_norm=0)
ADAMW = OptimizerConfig(schedule="constant", warmup=0, learning_rate=1e-3)
TOLERANCE = 1e-6  # float32 rounding of parameters of order 0.1 to 1 after steps of order 0.01


@functools.cache
def base(dtype="float32"):
    return load(make_reference("llama", num_hidden_layers=2), dtype=dtype)


def parts(method=METHOD, dtype="float32"):
    """Returns the trainable and the frozen leaves, on their own buffers."""
    model, params = base(dtype)
    params = moved(method, model, params, size=0.1)
    return jaxft.partition(jax.tree.map(jnp.array, params), method.mask(params))


@functools.cache
def program(config=SGD, dtype="float32", **options):
    """Returns optimizer and compiled step."""
    optimizer = make_optimizer(config, 20)
    return optimizer, jax.jit(make_step(base(dtype)[0], SFT(), optimizer, seed=0, **options), donate_argnums=0)


def rows(accumulation, packing=False, share_prefix=False):
    """Returns the eight examples as a step's batch."""
    count = 2 if packing else 8
    config = DataConfig(max_length=64, packing=packing, share_prefix=share_prefix)
    (batch,) = evaluation_batches(EXAMPLES, config, count, share_prefix)
    return {name: array.reshape(accumulation, count // accumulation, -1) for name, array in batch.items()}


def run(batch, steps=3, config=SGD, method=METHOD, dtype="float32", **options):
    """Returns losses and the last state."""
    optimizer, step = program(config, dtype, **options)
    trainable, frozen = parts(method, dtype)
    state, losses = new_state(trainable, optimizer), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    return losses, state


# How a step is cut

CUTS = {
    "4 x 2": {"accumulation": 4},
    "packed": {"accumulation": 1, "packing": True},
    "packed behind a shared prefix": {"accumulation": 1, "packing": True, "share_prefix": True},
}


@pytest.mark.parametrize("name", CUTS)
def test_how_a_batch_is_cut_changes_nothing_but_rounding(name):
    losses, state = run(rows(1))
    found_losses, found = run(rows(**CUTS[name]))
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.01
    assert largest_difference(found.trainable, state.trainable) <= TOLERANCE


def test_a_micro_batch_without_scored_tokens_changes_nothing():
    """Examples 4 and 5 are blank: a micro-batch of its own in one cut, two rows of the only one in the other."""
    found = []
    for accumulation in (1, 4):
        batch = {name: array.reshape(8, -1).copy() for name, array in rows(1).items()}
        batch["weights"][4:6] = batch["segment_ids"][4:6] = 0
        found.append(run({name: array.reshape(accumulation, 8 // accumulation, -1) for name, array in batch.items()}))
    (losses, state), (found_losses, other) = found
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    assert largest_difference(other.trainable, state.trainable) <= TOLERANCE


def test_a_step_without_any_scored_token_moves_nothing():
    batch = rows(4)
    batch["weights"] = np.zeros_like(batch["weights"])
    optimizer, step = program()
    trainable, frozen = parts()
    state, metrics = step(new_state(trainable, optimizer), frozen, batch)
    assert metrics["finite"]
    assert metrics["loss"] == metrics["gradient_norm"] == metrics["scored_tokens"] == 0
    assert same_bits(state.trainable, parts()[0])


def test_metrics_are_of_the_batch_before_the_update():
    optimizer, step = program()
    trainable, frozen = parts()
    _, metrics = step(new_state(trainable, optimizer), frozen, rows(1))
    model, trainable = base()[0], parts()[0]

    def mean(trainable):
        sums = SFT().sums(model, jaxft.combine(trainable, frozen), jax.tree.map(lambda leaf: leaf[0], rows(1)), {})
        return sums.loss / sums.weight, sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(trainable)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradients)))
    expected = {"loss": loss, "nll": loss, "accuracy": sums.correct / sums.weight}
    expected |= {"gradient_norm": norm, "scored_tokens": 24, "finite": True}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


# What a step leaves alone


@pytest.fixture(scope="module")
def twenty():
    """Returns frozen and trainable leaves before and after twenty steps on changing batches, and the step's program."""
    optimizer, step = program(ADAMW)
    trainable, frozen = parts()
    before = jax.tree.map(np.array, (trainable, frozen))
    state = new_state(trainable, optimizer)
    for index in range(20):
        batch = {name: np.roll(array, index, axis=1) for name, array in rows(2).items()}
        state, metrics = step(state, frozen, batch)
        assert metrics["finite"]
    return before, (state, frozen), step


def test_frozen_leaves_are_bit_identical_after_twenty_steps(twenty):
    (_, before), (_, frozen), _ = twenty
    assert same_bits(frozen, before)


def test_every_trainable_leaf_has_moved_after_twenty_steps(twenty):
    (before, _), (state, _), _ = twenty
    assert int(state.step) == 20
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(state.trainable), strict=True):
        assert (np.asarray(other) != one).mean() > 0.99


def test_twenty_steps_compile_once(twenty):
    assert twenty[2]._cache_size() == 1


def test_the_optimizers_state_is_of_the_trainable_leaves_alone(twenty):
    _, (state, frozen), _ = twenty
    counts = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.optimizer))
    assert size(state.optimizer) == 2 * size(state.trainable) + counts
    assert size(frozen) > 10 * size(state.trainable)


def test_the_state_is_donated_and_the_frozen_base_is_not():
    optimizer, step = program()
    trainable, frozen = parts()
    state = new_state(trainable, optimizer)
    step(state, frozen, rows(4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_gradients_are_taken_of_the_trainable_leaves_alone():
    """The program makes an array of the shape of lora_a, (layers, 32, 4), and none of a frozen kernel's, (layers, 32, 56)."""
    optimizer, _ = program()
    trainable, frozen = parts(jaxft.methods.LoRA(rank=4, targets=("q_proj",)))
    step = make_step(base()[0], SFT(), optimizer, seed=0)
    traced = jax.make_jaxpr(step)(new_state(trainable, optimizer), frozen, rows(4))
    made = set(shapes_of(traced.jaxpr))
    assert (2, 32, 4) in made
    assert (2, 32, 56) not in made


# What isn't finite


def spoiled(trainable):
    """Returns the leaves with one number that isn't one."""
    leaves, form = jax.tree.flatten(trainable)
    leaves[1] = leaves[1].at[(0,) * leaves[1].ndim].set(jnp.nan)
    return jax.tree.unflatten(form, leaves)


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    optimizer, step = program(ADAMW)
    trainable, frozen = parts()
    state = dataclasses.replace(new_state(spoiled(trainable), optimizer), step=jnp.int32(7))
    before = jax.tree.map(np.array, state)
    after, metrics = step(state, frozen, rows(2))
    assert not metrics["finite"]
    assert not np.isfinite(metrics["loss"])
    assert same_bits(after, before)


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_leaves_the_state_as_it_was(rate):
    trainable, frozen = parts()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    state = new_state(trainable, optimizer)
    before = jax.tree.map(np.array, state)
    after, metrics = _with_injected_rate()(state, frozen, rows(1))
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"])
    assert same_bits(after, before)


@functools.cache
def _with_injected_rate():
    return jax.jit(make_step(base()[0], SFT(), lenient(optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)), seed=0))


# What is random

DROPPING = dataclasses.replace(METHOD, dropout=0.3)


def losses_at(steps, seed_config=SGD, method=METHOD, **options):
    """Returns the loss of the same parameters and batch at each of these steps."""
    optimizer, step = program(seed_config, **options)
    found = []
    for number in steps:
        trainable, frozen = parts(method)
        state = dataclasses.replace(new_state(trainable, optimizer), step=jnp.int32(number))
        found.append(float(step(state, frozen, rows(1))[1]["loss"]))
    return found


def test_dropout_is_keyed_by_the_step():
    one, again, other = losses_at([3, 3, 4], method=DROPPING)
    assert one == again
    assert one != other


def test_each_micro_batch_drops_its_own():
    """The same four examples in both micro-batches: with one key, scoring the first alone would give the loss of both."""
    twice = {name: np.concatenate([array[:, :4]] * 2) for name, array in rows(1).items()}
    alone = twice | {"weights": twice["weights"] * np.array([1, 0], np.float32)[:, None, None]}
    optimizer, step = program()
    _, frozen = parts(DROPPING)
    one, both = (step(new_state(parts(DROPPING)[0], optimizer), frozen, batch)[1]["loss"] for batch in (alone, twice))
    assert abs(one - both) > 1e-4


def test_evaluation_drops_nothing():
    batch = jax.tree.map(lambda leaf: leaf[0], rows(1))
    evaluate = jax.jit(make_evaluation(base()[0], SFT()))
    dropping, plain = (evaluate(*parts(method), batch) for method in (DROPPING, METHOD))
    assert same_bits(dropping, plain)


def test_the_key_is_of_seed_purpose_and_step():
    keys = [key_for(*place) for place in ((0, "train", 0), (1, "train", 0), (0, "method", 0), (0, "train", 1), (0, "train", 0))]
    data = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]
    assert len(set(data[:4])) == 4
    assert data[4] == data[0]


# NEFTune


def test_noise_moves_the_loss_keyed_by_the_step():
    (plain,) = losses_at([3])
    one, again, other = losses_at([3, 3, 4], neftune_alpha=5.0)
    assert one == again
    assert len({plain, one, other}) == 3


def places(segments):
    segments = np.asarray(segments, np.int32)
    return Tokens(segments, np.zeros_like(segments), np.arange(segments.shape[1], dtype=np.int32))


def test_noise_is_uniform_with_a_bound_of_alpha_over_the_root_of_length_times_features():
    lengths, alpha, features = (5, 40), 7.0, 512
    tokens = places([[1] * 5 + [0] * 35, [1] * 40])
    noise = np.asarray(embedding_noise(jax.random.key(0), alpha, tokens, features), np.float64)
    for row, length in enumerate(lengths):
        drawn = noise[row, :length] / (alpha / np.sqrt(length * features))
        count = drawn.size  # 2560 and 20480
        assert 0.99 < np.abs(drawn).max() <= 1 + 1e-6
        # a mean of uniform draws has 1/sqrt(3 n), their mean square sqrt(4/45 n) as deviation; 5 of each
        assert abs(drawn.mean()) <= 5 / np.sqrt(3 * count)
        assert abs(np.square(drawn).mean() - 1 / 3) <= 5 * np.sqrt(4 / 45 / count)


def test_packing_and_padding_leave_the_noises_bound_as_it_is():
    key, features = jax.random.key(0), 64
    alone = places([[1] * 12 + [0] * 8])
    packed = places([[3] * 12 + [4] * 6 + [0] * 2])  # the same tokens at the same places, so the same draws
    behind = places([[-1] * 4 + [1] * 8 + [2] * 8])
    one, other, third = (np.asarray(embedding_noise(key, 5.0, tokens, features))[0] for tokens in (alone, packed, behind))
    np.testing.assert_array_equal(one[:12], other[:12])
    np.testing.assert_array_equal(one[4:12], third[4:12])  # eight tokens of an example of twelve


# Types


def test_bfloat16_compute_trains_float32_leaves_near_float32():
    losses, _ = run(rows(1))
    half_losses, state = run(rows(1), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(parts(dtype="bfloat16")[1]) if leaf.ndim > 1} == {jnp.dtype("bfloat16")}
    # 8 bits of mantissa through two layers: a few hundredths of a loss of order 5
    np.testing.assert_allclose(half_losses, losses, atol=0.05)
    assert half_losses[-1] < half_losses[0] - 0.01
