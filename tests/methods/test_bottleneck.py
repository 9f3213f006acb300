"""Bottleneck adapters on a tiny model: what they start as, what trains, what they go with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lenient_optax import lenient
from tiny_models import VOCABULARY, largest_difference, make_pair, moved, same_bits

import jaxft
from jaxft.errors import UserError
from jaxft.methods import Bottleneck, LoRA, Partial
from jaxft.methods.bottleneck import BottleneckAdapter
from jaxft.models import segments
from jaxft.models.node import is_site

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (1, 12)).astype(np.int32)
FIRST = np.array([[1] * 5 + [2] * 7], np.int32)  # two examples in a row
PRESETS = {
    "houlsby": Bottleneck(reduction=4.0, trained_scale="learned"),
    "pfeiffer": Bottleneck.seq_bn(reduction=4.0, leave_out=(1,)),
    "parallel": Bottleneck.par_bn(dropout=0.1),
}


@functools.cache
def base():
    _, model, params = make_pair("qwen2")
    return model, params


@functools.cache
def program(remat="none"):
    model = dataclasses.replace(base()[0], remat=remat)
    return jax.jit(lambda params, ids, ids_of: model.apply({"params": params}, ids, segment_ids=ids_of).logits)


def logits(params, remat="none"):
    return np.asarray(program(remat)(params, IDS, FIRST))


@functools.cache
def tuned(preset):
    return moved(PRESETS[preset], *base())


def without_adapters(params):
    layers = {name: {key: part for key, part in stack.items() if not is_site(part)} for name, stack in params[segments.LAYERS].items()}
    return segments.regroup(params | {segments.LAYERS: layers}, lambda layer: 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_starts_as_the_base_and_trained_it_differs(preset):
    model, params = base()
    started = PRESETS[preset].init(jax.random.key(0), model, params)
    assert largest_difference(logits(started), logits(params)) <= 1e-5
    assert largest_difference(logits(tuned(preset)), logits(params)) > 0.1
    assert same_bits(without_adapters(tuned(preset)), params)


@pytest.mark.parametrize("init_weights", ["bert", "houlsby"])
def test_adapterhubs_other_starts_are_near_the_base(init_weights):
    model, params = base()
    started = Bottleneck(init_weights=init_weights).init(jax.random.key(0), model, params)
    assert 0 < largest_difference(logits(started), logits(params)) < 0.1  # logits are of order 10


@pytest.mark.parametrize("preset", PRESETS)
def test_what_trains_moves_and_the_rest_stays(preset):
    model, _ = base()
    method = PRESETS[preset]
    params = tuned(preset)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    assert {leaf.path[3] for leaf in segments.leaves(trainable)} == {"down", "up"} | ({"scale"} if method.trained_scale else set())
    optimizer = lenient(optax.adam(1e-3))
    key = jax.random.key(2)

    def loss(trainable):
        out = model.apply({"params": jaxft.combine(trainable, frozen)}, IDS, rngs={"dropout": key}).logits
        return jax.nn.logsumexp(out, axis=-1).mean() - out[..., 0].mean()

    @jax.jit
    def train(trainable):
        def step(carry, _):
            leaves, state = carry
            updates, state = optimizer.update(jax.grad(loss)(leaves), state, leaves)
            return (optax.apply_updates(leaves, updates), state), None

        return jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, length=20)[0]

    after, state = train(trainable)
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(after), strict=True))
    sizes = [leaf.size for leaf in jax.tree.leaves(trainable)]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * sum(sizes) + 1
    assert same_bits(jaxft.partition(jaxft.combine(after, frozen), method.mask(params))[1], frozen)


def _padded(params, ids):
    padding = ((0, 0), (0, 12 - ids.shape[1]))
    return program()(params, np.pad(ids, padding), np.pad(np.ones_like(ids), padding))


def test_packed_rows_are_separate_rows_and_remat_changes_nothing():
    params = tuned("parallel")
    packed = logits(params)
    alone = [_padded(params, part) for part in (IDS[:, :5], IDS[:, 5:])]
    assert largest_difference(packed[:, :5], alone[0][:, :5]) <= 1e-4
    assert largest_difference(packed[:, 5:], alone[1][:, :7]) <= 1e-4
    assert largest_difference(logits(params, "full"), packed) <= 1e-5


def test_trainable_leaves_are_float32_on_a_bfloat16_base():
    model, params = base()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    method = Bottleneck()
    made = method.init(jax.random.key(0), model, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(jaxft.partition(made, method.mask(made))[0])} == {jnp.dtype("float32")}
    out = jax.eval_shape(dataclasses.replace(model, dtype=jnp.bfloat16).apply, {"params": made}, IDS)
    assert out.hidden_states[-1].dtype == jnp.bfloat16


def test_it_adds_up_with_other_methods():
    model, params = base()
    for other in (LoRA(rank=2, alpha=3.0), Partial(targets=("layers/2/mlp",))):  # whole layers would take the adapter in
        both = (other + Bottleneck(reduction=8.0)).init(jax.random.key(0), model, params)
        mask = (other + Bottleneck(reduction=8.0)).mask(both)
        assert {"attention_output", "mlp_output"} <= {leaf.path[2] for leaf in segments.leaves(jaxft.partition(both, mask)[0])}
        assert largest_difference(logits(both), logits(params)) <= 1e-5
    with pytest.raises(UserError, match="already"):
        (Bottleneck() + Bottleneck.par_bn()).init(jax.random.key(0), model, params)


def test_sizes_follow_the_layer():
    made = Bottleneck(layer_reductions=((1, 2.0),), leave_out=(2,), reduction=8.0).init(jax.random.key(0), *base())
    sizes = {
        layer: leaf.value.down.bias.shape[-1]
        for leaf in segments.leaves(made, is_leaf=is_site)
        if isinstance(leaf.value, BottleneckAdapter)
        for layer in leaf.layers
    }
    assert sizes == {0: 4, 1: 16}


def test_merging_is_refused_with_what_to_do():
    model, _ = base()
    with pytest.raises(UserError, match="save_adapter"):
        PRESETS["parallel"].merge(model, tuned("parallel"))


@pytest.mark.parametrize(
    "settings",
    [
        {"sites": ("mlp",)},
        {"sites": ()},
        {"input": "both"},
        {"activation": "rellu"},
        {"init_weights": "zero"},
        {"reduction": 0.0},
        {"size": -1},
        {"size": 2, "layer_reductions": ((0, 2.0),)},
        {"trained_scale": "learned", "scaling": 2.0},
        {"dropout": 1.0},
        {"leave_out": (3,)},
        {"leave_out": (0, 1, 2)},
        {"layer_reductions": ((7, 2.0),)},
    ],
    ids=str,
)
def test_mistakes_are_refused(settings):
    with pytest.raises(UserError, match="method"):
        Bottleneck(**settings).init(jax.random.key(0), *base())
