"""Methods that train what is there already: Full, Partial, BitFit, NormTuning."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from lenient_optax import lenient, make_optimizer
from method_checks import (
    ADAMW,
    IDS,
    base,
    check_bfloat16,
    check_cuts,
    check_merge,
    check_start,
    check_two_devices,
    check_what_moves,
    logits,
    pair,
    rows,
)
from reference_training import (
    CONFIG,
    LEARNING_RATE,
    STEPS,
    check_gradients,
    check_losses,
    our_gradients,
    our_losses,
    torch_gradients,
    torch_losses,
)
from tiny_models import largest_difference, moved, same_bits

import jaxft
from jaxft.config import OptimizerConfig
from jaxft.errors import UserError
from jaxft.hub.names import tensors_of
from jaxft.methods import BitFit, Full, NormTuning, Partial
from jaxft.models import segments
from jaxft.tasks import SFT
from jaxft.train.optimizer import make_schedule
from jaxft.train.state import new_state
from jaxft.train.step import make_step

EVERY = {
    "full": (Full(), "llama"),
    "full, embeddings left out": (Full(exclude=("embed", "lm_head"), layer_decay=0.8), "qwen2"),
    "last": (Partial(last=1), "llama"),
    "list and pattern": (Partial(layers=(0, 2), targets=("lm_head", "layers/1/mlp/up_proj")), "llama"),
    "biases": (BitFit(), "qwen2"),
    "norms": (NormTuning(), "llama"),
}


@pytest.mark.parametrize("name", EVERY)
def test_it_starts_as_the_base_and_differs_once_moved(name):
    check_start(*EVERY[name])


@pytest.mark.parametrize("name", EVERY)
def test_only_what_trains_moves(name):
    check_what_moves(*EVERY[name])


@pytest.mark.parametrize("name", EVERY)
def test_merged_is_unmerged(name):
    check_merge(*EVERY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "list and pattern"])
def test_what_trains_is_float32_on_a_bfloat16_base(name):
    check_bfloat16(*EVERY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "list and pattern", "norms"])
def test_how_a_batch_is_cut_changes_nothing(name):
    check_cuts(*EVERY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list and pattern", "norms"])
def test_two_devices_are_one(name):
    check_two_devices(*EVERY[name])


# What is chosen


def chosen(method, family="llama"):
    """Returns the names of what trains."""
    model, params = base(family)
    params = method.init(jax.random.key(0), model, params)
    return {name for leaf in segments.leaves(jaxft.partition(params, method.mask(params))[0]) for name in leaf.names}


def named(family, *parts):
    """Returns the names of leaves that hold one of `parts`."""
    _, params = base(family)
    return {name for leaf in segments.leaves(params) for name in leaf.names if any(part in name for part in parts)}


CHOICES = {
    "everything": (Full(), "llama", ("",)),
    "but embeddings": (Full(exclude=("embed",)), "llama", ("layers", "norm", "lm_head")),
    "last two": (Partial(last=2), "llama", ("layers/1/", "layers/2/")),
    "first": (Partial(first=1), "llama", ("layers/0/",)),
    "a list": (Partial(layers=(2, 0)), "llama", ("layers/0/", "layers/2/")),
    "head only": (Partial(targets=("lm_head",)), "llama", ("lm_head",)),
    "both ends and a pattern": (Partial(first=1, last=1, targets=("layers/1/mlp",)), "llama", ("layers/0/", "layers/2/", "layers/1/mlp")),
    "biases": (BitFit(), "qwen2", ("bias",)),
    "some biases": (BitFit(targets=("(q|v)_proj/bias",)), "qwen2", ("q_proj/bias", "v_proj/bias")),
    "biases and head": (BitFit(targets=("bias", "lm_head")), "qwen2", ("bias", "lm_head")),
    "norms": (NormTuning(), "llama", ("norm/scale",)),
    "some norms": (NormTuning(targets=("layers/[01]/input_norm",)), "llama", ("layers/0/input_norm", "layers/1/input_norm")),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_trains_is_what_was_chosen(name):
    method, family, parts = CHOICES[name]
    assert chosen(method, family) == named(family, *parts)


def test_unchosen_neighbours_stay_in_one_segment():
    model, params = base()
    assert list(Partial(last=1).init(jax.random.key(0), model, params)["layers"]) == ["0-1", "2-2"]
    assert list(Full().init(jax.random.key(0), model, params)["layers"]) == ["0-2"]
    assert list(NormTuning().init(jax.random.key(0), model, params)["layers"]) == ["0-2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "trains nothing: set method.last"),
        ({"last": -1}, "method.last is 0 or more, not -1"),
        ({"last": 4}, "method.last is 4; the model has 3 layers"),
        ({"layers": (3,)}, "there is no layer 3; the model's are numbered 0 to 2"),
        ({"targets": ("lm_heat",)}, "the pattern 'lm_heat' matches nothing. Did you mean 'lm_head'"),
    ],
)
def test_layers_that_are_not_there_are_named(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        Partial(**settings).init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Full(layer_decay=0.0), "method.layer_decay is a factor above 0"),
        (lambda: Full(layer_decay=1.1), "not 1.1"),
        (lambda: Full(exclude=("embd",)), "Did you mean 'embed'"),
        (lambda: BitFit(), "'bias' matches nothing"),
        (lambda: NormTuning(targets=("q_proj",)), "'q_proj' matches nothing"),
    ],
)
def test_values_that_make_no_sense_are_refused(make, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        make().init(jax.random.key(0), model, params)


# Rates and schedules


def steps_of(method, steps, family="llama"):
    """Returns the trainable leaves before, and after each step of AdamW with decay."""
    model, params = base(family)
    params = method.init(jax.random.key(0), model, params)
    trainable, frozen = jaxft.partition(jax.tree.map(jnp.array, params), method.mask(params))
    config = dataclasses.replace(ADAMW, weight_decay=0.1)
    optimizer = lenient(method.optimizer(make_optimizer(config, steps), steps))
    step = jax.jit(make_step(model, SFT(), optimizer, seed=0, penalty=method.penalty))
    state, found = new_state(trainable, optimizer), [trainable]
    for _ in range(steps):
        state, _ = step(state, frozen, rows())
        found.append(state.trainable)
    return found


def layer_of(tree, layer):
    return jax.tree.map(np.asarray, segments.one_layer(tree, layer))


def test_layers_thaw_one_by_one_from_the_top_and_keep_their_bits_till_then():
    every = 2
    found = steps_of(Partial(last=3, targets=("norm",), unfreeze_every=every), 6)
    for layer, joins in ((2, 0), (1, every), (0, 2 * every)):
        for step in range(6):
            before, after = layer_of(found[step], layer), layer_of(found[step + 1], layer)
            assert same_bits(before, after) == (step < joins), (layer, step)
    assert not same_bits(found[0]["norm"], found[1]["norm"])  # targets train from the start


def test_what_has_not_joined_has_no_part_in_the_clipped_norm():
    """With layers 1 and 0 still frozen, the first step of thawing is that of training layer 2 alone."""
    alone, thawing = (steps_of(method, 1) for method in (Partial(last=1), Partial(last=3, unfreeze_every=5)))
    assert largest_difference(layer_of(alone[1], 2), layer_of(thawing[1], 2)) <= 1e-7


def test_rates_fall_by_the_factor_from_layer_to_layer():
    """AdamW's first step has the size of the rate, whatever the gradient: the rates can be read off it."""
    model, params = base()
    method = Full(layer_decay=0.5)
    optimizer = method.optimizer(optax.scale(-1.0), 10)
    trainable = method.init(jax.random.key(0), model, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), trainable)
    for layer, rate in ((2, 1.0), (1, 0.5), (0, 0.25)):
        assert all((leaf == -rate).all() for leaf in jax.tree.leaves(layer_of(updates, layer)))
    assert (updates["embed"]["embedding"] == -0.125).all()
    assert (updates["norm"]["scale"] == -1.0).all()
    assert (updates["lm_head"]["kernel"] == -1.0).all()


# Frozen lower layers


def gradient_program(method):
    """Returns the program of one gradient."""
    model, params = base()
    params = method.init(jax.random.key(0), model, params)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    batch = {name: array[0] for name, array in rows().items()}

    def loss(trainable, frozen):
        return SFT().sums(model, jaxft.combine(trainable, frozen), batch, {}).loss

    return jax.make_jaxpr(jax.grad(loss))(trainable, frozen)


def products(jaxpr, times=1):
    """Returns how often a program multiplies matrices, scans counted by their length."""
    found = 0
    for equation in jaxpr.eqns:
        found += times * (equation.primitive.name == "dot_general")
        inner = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "jaxpr"):
                found += products(value.jaxpr, times * inner)
            elif hasattr(value, "eqns"):
                found += products(value, times * inner)
    return found


def test_frozen_lower_layers_take_no_backward_pass():
    counts = {last: products(gradient_program(Partial(last=last)).jaxpr) for last in (1, 2, 3)}
    added = counts[2] - counts[1]
    assert counts[3] - counts[2] == added > 0
    # a layer's backward pass: both gradients of 7 kernels and of attention's 2 products, whose scores are made again
    assert added == 2 * 7 + 2 * 2 + 1


# Against transformers


def by_their_names(model, tree):
    """Returns leaves by their names and in their layout in transformers."""
    found = {}
    for entry in tensors_of(model, tree):
        value = entry.leaf.value if entry.index is None else entry.leaf.value[entry.index]
        found[entry.name] = entry.swap(np.asarray(value))
    return found


def freeze(model, trains):
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(trains(name))


REFERENCES = {
    "full": (Full(), "llama", lambda name: True),
    "partial": (Partial(last=1, targets=("lm_head",)), "llama", lambda name: "layers.2." in name or "lm_head" in name),
    "biases": (BitFit(), "qwen2", lambda name: name.endswith("bias")),
    "norms": (NormTuning(), "llama", lambda name: "norm" in name),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_are_those_of_torch(name):
    method, family, trains = REFERENCES[name]
    reference, model, params = pair(family)
    reference = copy.deepcopy(reference)
    freeze(reference, trains)
    expected_loss, expected = torch_gradients(reference)
    loss, gradients = our_gradients(model, method.init(jax.random.key(0), model, params), method)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    check_gradients(by_their_names(model, gradients), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_twenty_steps_have_the_losses_of_torch(name):
    method, family, trains = REFERENCES[name]
    reference, model, params = pair(family)
    reference = copy.deepcopy(reference)
    freeze(reference, trains)
    check_losses(our_losses(model, method.init(jax.random.key(0), model, params), method), torch_losses(reference))


@pytest.mark.slow
def test_decayed_rates_are_those_of_torchs_parameter_groups():
    method = Full(layer_decay=0.7)
    reference, model, params = pair("llama")
    reference = copy.deepcopy(reference)
    top = LEARNING_RATE / 3  # at the rate of the others, all of a model's weights move so far that float32 is off float64 by 1e-4 too

    def rate(name):
        depth = int(name.split(".")[2]) if ".layers." in name else (-1 if "embed" in name else 2)
        return top * 0.7 ** (2 - depth)

    groups = [{"params": [leaf], "lr": rate(name)} for name, leaf in reference.named_parameters()]
    config = dataclasses.replace(CONFIG, learning_rate=top)
    check_losses(our_losses(model, method.init(jax.random.key(0), model, params), method, config), torch_losses(reference, groups))


SGD = functools.partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(("name", "make", "rate"), [("adamw", torch.optim.AdamW, LEARNING_RATE), ("sgd", SGD, 0.2)])
def test_a_layer_that_joins_late_steps_as_torch_has_it_step(name, make, rate):
    """Torch counts a parameter's steps from its first gradient; by the run's count a late layer would step at up to 6.5 times the rate."""
    method, decay = Partial(last=3, unfreeze_every=4), 0.1
    config = dataclasses.replace(CONFIG, name=name, learning_rate=rate, schedule="linear", warmup=6, weight_decay=decay)
    schedule = make_schedule(config, STEPS)
    reference, model, params = pair("llama")
    reference = copy.deepcopy(reference)
    named = dict(reference.named_parameters())

    def before(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        for leaf_name, leaf in named.items():
            leaf.requires_grad = any(f".layers.{2 - place}." in leaf_name for place in range(step // 4 + 1))

    matrices = [leaf for leaf in named.values() if leaf.ndim > 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": [leaf for leaf in named.values() if leaf.ndim == 1]}]
    ours = our_losses(model, method.init(jax.random.key(0), model, params), method, config)
    check_losses(ours, torch_losses(reference, groups, make, before))


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "int8"])
def test_a_layer_that_joins_late_steps_as_if_the_run_began_there(name):
    """With one gradient at every step, a layer's n-th update is the same whenever it joins."""

    def size(tree):
        return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))

    every, steps = 3, 12
    config = OptimizerConfig(**({"moments": "int8"} if name == "int8" else {"name": name}), schedule="constant", warmup=0, clip_norm=0.0)
    model, params = base("llama")

    def updates(method):
        made = method.init(jax.random.key(0), model, params)
        trainable, _ = jaxft.partition(made, method.mask(made))
        optimizer = lenient(method.optimizer(make_optimizer(config, steps), steps))
        gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), trainable)
        update, state, found = jax.jit(optimizer.update), optimizer.init(trainable), []
        for _ in range(steps):
            moved, state = update(gradient, state, trainable)
            found.append(moved)
        return found

    at_once, late = updates(Partial(last=3)), updates(Partial(last=3, unfreeze_every=every))
    for place in range(3):
        for step in range(steps - every * place):
            expected, found = (layer_of(tree, 2 - place) for tree in (at_once[step], late[step + every * place]))
            assert largest_difference(expected, found) <= 1e-6 * size(expected), (place, step)


@pytest.mark.parametrize(("method", "family"), [EVERY["full"], EVERY["list and pattern"], EVERY["biases"]], ids=["full", "partial", "bias"])
def test_the_saved_folder_in_transformers_gives_the_same_logits(tmp_path, method, family):
    model, params = base(family)
    tuned = moved(method, model, params, size=0.05)
    jaxft.save_pretrained(tmp_path / "model", model, method.merge(model, tuned))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        found = theirs(torch.tensor(IDS)).logits.numpy()
    assert np.abs(found - logits(tuned, family)).max() <= 1e-4
