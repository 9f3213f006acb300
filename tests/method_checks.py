"""What every method promises, checked on tiny random models: where it starts, what moves, and that how a batch is cut changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from evaluation_batches import evaluation_batches
from jax.sharding import Mesh
from lenient_optax import lenient, make_optimizer
from tiny_models import VOCABULARY, largest_difference, make_examples, make_pair, moved, same_bits

import jaxft
from jaxft.config import DataConfig, OptimizerConfig, TrainConfig
from jaxft.data.batches import NO_ROOM
from jaxft.methods.partition import size
from jaxft.models import segments
from jaxft.models.node import is_node
from jaxft.models.registry import family_of
from jaxft.tasks import SFT
from jaxft.train import placement
from jaxft.train.data import room_of
from jaxft.train.state import new_state
from jaxft.train.step import make_step

TOLERANCE = 1e-5  # float32, logits of order 10: a product split in two is rounded otherwise
STEPS = 20
EXAMPLES = make_examples([9, 14, 21, 12], answer=4)
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 13)).astype(np.int32)
ADAMW = OptimizerConfig(schedule="constant", warmup=0, learning_rate=1e-3)
# SGD's update is linear in the gradient: what differs by rounding stays different by rounding
SGD = OptimizerConfig(name="sgd", learning_rate=0.02, schedule="constant", warmup=0, clip_norm=0)

# what is dropped hangs on how a batch is cut
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)


@functools.cache
def pair(family="llama"):
    """Returns the reference, jaxft's model, and its parameters, of a family, or of a family and a task: "bert masked_lm"."""
    family, task = (*family.split(), "causal_lm")[:2]
    return make_pair(family, task, num_hidden_layers=3, **NO_DROPOUT)


def base(family="llama"):
    """Returns jaxft's model and parameters."""
    return pair(family)[1:]


@functools.cache
def program(family):
    model = base(family)[0]
    return jax.jit(lambda params: outputs(model.apply({"params": params}, IDS)))


def outputs(out):
    """Returns what a head gave: its logits, or those of starts and ends."""
    return [out.start_logits, out.end_logits] if getattr(out, "logits", None) is None else out.logits


def logits(params, family="llama"):
    """Returns the outputs of two rows, (2, 13, vocabulary) of a language model."""
    return np.asarray(program(family)(params))


def without_nodes(params):
    """Returns the parameters with the method's nodes taken out."""
    return jax.tree.map(lambda value: value.base if is_node(value) else value, params, is_leaf=is_node)


def rows(packed=False, accumulation=1, room=NO_ROOM):
    """Returns the examples as a step's batch: four rows, or two packed ones."""
    (batch,) = evaluation_batches(EXAMPLES, DataConfig(max_length=36, packing=packed), 2 if packed else 4, False, room=room)
    return {name: array.reshape(accumulation, len(array) // accumulation, -1) for name, array in batch.items()}


@functools.cache
def train(method, family="llama", steps=STEPS, config=ADAMW, remat="none", packed=False, accumulation=1):
    """Returns losses, the trainable leaves before and after, the frozen ones before and after, and the optimizer's state."""
    model, params = base(family)
    params = jax.tree.map(jnp.array, moved(method, model, params, size=0.1))
    trainable, frozen = jaxft.partition(params, method.mask(params))
    optimizer = lenient(method.optimizer(make_optimizer(config, steps), steps))
    state = new_state(jax.tree.map(jnp.array, trainable), optimizer)
    before = jax.tree.map(np.array, (trainable, frozen))
    step = jax.jit(make_step(model.clone(remat=remat), SFT(), optimizer, seed=0, penalty=method.penalty), donate_argnums=0)
    batch, losses = rows(packed, accumulation, room_of(model, params)), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    return losses, before[0], state.trainable, before[1], frozen, state.optimizer


def check_start(method, family="llama"):
    """At the start the model is the base, and with the method's leaves taken out it is the base to the bit."""
    model, params = base(family)
    kept = jax.tree.map(np.array, params)
    fresh = method.init(jax.random.key(0), model, params)
    assert same_bits(params, kept), "init changed its argument"
    plain = logits(params, family)
    assert largest_difference(logits(fresh, family), plain) <= TOLERANCE
    tuned = moved(method, model, params)
    assert largest_difference(logits(tuned, family), plain) > 0.1
    mask = method.mask(tuned)
    assert jax.tree.structure(mask) == jax.tree.structure(tuned)
    if any(map(is_node, jax.tree.leaves(tuned, is_leaf=is_node))):
        off = jax.tree.map(lambda value, start: value if is_node(value) else start, tuned, fresh, is_leaf=is_node)
        assert largest_difference(logits(without_nodes(off), family), plain) <= 1e-6


def check_what_moves(method, family="llama"):
    """Frozen leaves are bit-identical after twenty steps, every trainable one has moved, and moments are of their size."""
    losses, before, after, frozen_before, frozen, optimizer = train(method, family)
    assert losses[-1] < losses[0]
    assert same_bits(frozen_before, frozen)
    for old, new in zip(segments.leaves(before), segments.leaves(after), strict=True):
        assert new.value.dtype == jnp.float32
        changed = (np.asarray(old.value) != np.asarray(new.value)).reshape(1 if old.layers is None else len(old.layers), -1)
        assert changed.any(axis=1).all(), old.title  # in each of its layers
    counts = [leaf for leaf in jax.tree.leaves(optimizer) if leaf.ndim == 0]
    assert size(optimizer) - len(counts) == 2 * size(after)


def check_merge(method, family="llama"):
    """Merged equals unmerged, and merging has no side effect."""
    model, params = base(family)
    tuned = moved(method, model, params, size=0.1)
    kept = jax.tree.map(np.array, tuned)
    merged, again = method.merge(model, tuned), method.merge(model, tuned)
    assert same_bits(tuned, kept)
    assert same_bits(merged, again)
    assert not any(map(is_node, jax.tree.leaves(merged, is_leaf=is_node)))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    found = logits(tuned, family)
    assert largest_difference(found, logits(merged, family)) <= TOLERANCE * max(1.0, np.abs(found).max())


def check_bfloat16(method, family="llama"):
    """On a bfloat16 base what trains is float32, and the merged model is all bfloat16."""
    model, params = base(family)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = model.clone(dtype=jnp.bfloat16)
    tuned = method.init(jax.random.key(0), model, half)
    trainable, frozen = jaxft.partition(tuned, method.mask(tuned))
    (batch,) = evaluation_batches(EXAMPLES, DataConfig(max_length=32), 4, False)
    state = new_state(trainable, make_optimizer(SGD, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}

    def loss(trainable):
        return SFT().sums(model, jaxft.combine(trainable, frozen), batch, {}).loss

    gradients = jax.jit(jax.grad(loss))(state.trainable)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    merged = method.merge(model, jaxft.combine(state.trainable, frozen))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def check_cuts(method, family="llama", remat="full"):
    """Packed rows, accumulated, with layers computed again, give the losses and leaves of separate rows at once."""
    expected, _, state, *_ = train(method, family, 3, SGD)
    found, _, other, *_ = train(method, family, 3, SGD, remat=remat, packed=True, accumulation=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1] < expected[0]
    assert largest_difference(other, state) <= TOLERANCE


def check_two_devices(method, family="llama", sides=None):
    """Two devices that share the weights give the losses and leaves of one."""
    expected, _, state, *_ = train(method, family, 3, SGD)
    config = TrainConfig(batch_size=4, **(sides or {"data_parallel": 1, "fsdp_parallel": 2}))
    mesh = placement.make_mesh(config)
    assert isinstance(mesh, Mesh)
    model, params = base(family)
    params = moved(method, model, params, size=0.1)
    mask = method.mask(params)
    places = placement.shardings(params, family_of(model.config.architecture).module.PLACEMENT, mesh)
    trainable, frozen = jaxft.partition(jax.device_put(jax.tree.map(jnp.array, params), places), mask)
    optimizer = lenient(method.optimizer(make_optimizer(SGD, 3), 3))
    began = new_state(trainable, optimizer)
    sharding = placement.state_shardings(began, jaxft.partition(places, mask)[0], mesh, optimizer)
    began = jax.device_put(began, sharding)
    step = jax.jit(make_step(model, SFT(), optimizer, seed=0, penalty=method.penalty), donate_argnums=0, out_shardings=(sharding, None))
    batch = placement.place_batch(rows(room=room_of(model, params)), mesh, placement.BATCH)
    losses = []
    for _ in range(3):
        began, metrics = step(began, frozen, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert largest_difference(began.trainable, state) <= TOLERANCE
