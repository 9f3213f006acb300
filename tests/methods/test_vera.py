"""VeRA on a tiny model, and against peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
from jax.sharding import Mesh
from method_checks import base, check_bfloat16, check_cuts, check_merge, check_start, check_two_devices, check_what_moves, logits
from peft_checks import check_ours, check_theirs, check_training, config_of, tensors, their_logits, tuned_by_peft
from tiny_models import largest_difference

import jaxft
from jaxft.errors import UserError
from jaxft.methods import NormTuning, VeRA
from jaxft.methods.partition import size
from jaxft.methods.vera import VeRAKernel, projections
from jaxft.models import llama, segments
from jaxft.models.node import Shared
from jaxft.train import placement

METHOD = VeRA(rank=6, targets=("q_proj", "layers/[02]/mlp"), seed=3)
PEFT = {
    "plain": ({"r": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}, "qwen2"),
    "all linear": ({"r": 8, "target_modules": "all-linear", "d_initial": 0.5, "projection_prng_key": 7}, "llama"),
    "biases": ({"r": 5, "target_modules": ["q_proj", "o_proj"], "bias": "vera_only"}, "qwen2"),
    "all biases": ({"r": 5, "target_modules": ["v_proj"], "bias": "all"}, "qwen2"),
    "biases that aren't there": ({"r": 5, "target_modules": ["v_proj"], "bias": "all"}, "llama"),
    "layers": ({"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [0, 2], "vera_dropout": 0.25}, "llama"),
}


def tuned(name, **more):
    settings, family = PEFT[name]
    return tuned_by_peft(peft.VeraConfig(task_type="CAUSAL_LM", **settings, **more), "", 0.3, family), family


def test_it_starts_as_the_base_and_differs_once_moved():
    check_start(METHOD)


def test_only_the_vectors_move():
    check_what_moves(METHOD)


def test_merged_is_unmerged():
    check_merge(METHOD)


@pytest.mark.slow
def test_the_vectors_are_float32_on_a_bfloat16_base():
    check_bfloat16(METHOD)


@pytest.mark.slow
def test_how_a_batch_is_cut_changes_nothing():
    check_cuts(METHOD)


@pytest.mark.slow
def test_two_devices_are_one():
    check_two_devices(METHOD)


def test_only_the_branch_is_dropped():
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((500, 4), (4, 3)))
    first, second = (jnp.asarray(part) for part in projections(0, 5, 6, 7))
    made = VeRAKernel(kernel, Shared(first), Shared(second), jnp.ones(5), jnp.zeros(3), jnp.float32(0.5))
    assert np.array_equal(made.dot(x, jax.random.key(0)), x @ kernel)
    branch = VeRAKernel(jnp.zeros_like(kernel), Shared(first), Shared(second), jnp.ones(5), jnp.ones(3), jnp.float32(0.5))
    dropped = branch.dot(x, jax.random.key(0))
    assert not np.array_equal(dropped, branch.dot(x, None))
    assert np.array_equal(dropped, branch.dot(x, jax.random.key(0)))


# The two matrices


def held(params):
    """Returns the arrays that kernels have in common."""
    leaves = jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, Shared))
    return [leaf.value for leaf in leaves if isinstance(leaf, Shared)]


def test_the_matrices_are_held_once():
    model, params = base()
    made = METHOD.init(jax.random.key(0), model, params)
    assert len(held(made)) > 2
    assert len({id(array) for array in held(made)}) == 2
    trainable = jaxft.partition(made, METHOD.mask(made))[0]
    assert size(made) == size(params) + size(trainable) + 6 * (56 + 56)  # the widest of the targets, on either side


def test_the_matrices_stay_one_on_the_devices():
    model, params = base()
    made = METHOD.init(jax.random.key(0), model, params)
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 2, 1), placement.AXES)
    placed = placement.place(made, placement.shardings(made, llama.PLACEMENT, mesh))
    assert len({id(array) for array in held(placed)}) == 2
    assert all(array.sharding.is_fully_replicated for array in held(placed))
    assert jax.tree.all(jax.tree.map(np.array_equal, made, placed))


def test_grouping_layers_anew_leaves_the_matrices_alone():
    model, params = base()
    method = VeRA(rank=6, targets=("q_proj",))
    made = method.init(jax.random.key(0), model, params)
    split = segments.regroup(made, lambda layer: layer == 1)
    assert list(split["layers"]) == ["0-0", "1-1", "2-2"]
    assert {id(array) for array in held(split)} == {id(array) for array in held(made)}
    joined = segments.regroup(split, lambda layer: 0)
    assert list(joined["layers"]) == ["0-2"]
    assert jax.tree.all(jax.tree.map(np.array_equal, made, joined))
    one = segments.one_layer(made, 1)["attention"]["q_proj"]["kernel"]
    assert one.vera_a.value.shape == (32, 6)
    assert one.lambda_d.shape == (6,)


def test_layers_with_other_matrices_are_not_stacked_together():
    model, params = base()
    made = VeRA(rank=6, targets=("layers/0/attention/q_proj",), seed=1).init(jax.random.key(0), model, params)
    made = VeRA(rank=6, targets=("layers/[12]/attention/q_proj",), seed=2).init(jax.random.key(0), model, made)
    assert list(segments.regroup(made, lambda layer: 0)["layers"]) == ["0-0", "1-2"]


def test_a_sum_with_tuned_norms_of_one_layer():
    check_merge(METHOD + NormTuning(targets=("layers/1/input_norm",)))


def test_the_matrices_are_those_of_peft():
    for name in PEFT:
        model, _ = tuned(name)
        config = model.peft_config["default"]
        theirs = [model.vera_A["default"].numpy(), model.vera_B["default"].numpy()]
        ours = projections(config.projection_prng_key, config.r, theirs[0].shape[1], theirs[1].shape[0])
        assert all(np.array_equal(one, other.T) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "method.rank is at least 1, not 0"),
        ({"dropout": 1.0}, "method.dropout is a rate"),
        ({"seed": -1}, "method.seed is a whole number"),
        ({"d_initial": float("inf")}, "method.d_initial is a finite number, not inf"),
        ({"rank": 2.5}, "method.rank is a whole number, not 2.5"),
        ({"bias": "lora_only"}, "no method.bias 'lora_only'.*Known: all, none, vera_only"),
        ({"bias": "all"}, "method.bias is all, and the model has no such bias"),
        ({"targets": ("q_prj",)}, "matches nothing. Did you mean 'q_proj'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        VeRA(**settings).init(jax.random.key(0), model, params)


# Against peft


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    model, family = tuned(name)
    check_theirs(model, tmp_path, family)


def test_an_adapter_without_the_matrices_gives_their_logits(tmp_path):
    with pytest.warns(UserWarning, match="save_projection"):
        theirs, family = tuned("plain", save_projection=False)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not [name for name in tensors(tmp_path / "theirs") if "vera_A" in name]
    model, params = base(family)
    loaded, method = jaxft.load_adapter(tmp_path / "theirs", model, params)
    assert largest_difference(logits(loaded, family), their_logits(theirs)) <= 1e-4
    jaxft.save_adapter(tmp_path / "again", model, loaded, method)
    first, again = ({key: value.tobytes() for key, value in tensors(tmp_path / name).items()} for name in ("theirs", "again"))
    assert first == again
    assert config_of(tmp_path / "again")["save_projection"] is False


@pytest.mark.parametrize(("method", "family"), [(METHOD, "llama"), (VeRA(rank=4, targets=("lm_head", "k_proj")), "qwen2")])
def test_peft_gives_our_logits(method, family, tmp_path):
    check_ours(method, tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "biases"])
def test_training_is_that_of_peft(name):
    check_training(*tuned(name))


def test_matrices_that_the_seed_does_not_give_are_not_left_out(tmp_path):
    model, params = base()
    params, other = METHOD.init(jax.random.key(0), model, params), dataclasses.replace(METHOD, seed=4, save_projection=False)
    with pytest.raises(UserError, match="to be drawn by the seed 4; these aren't what it gives"):
        jaxft.save_adapter(tmp_path / "a", model, params, other)


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BROKEN = {
    "one matrix": ({}, lambda t: _without(t, "base_model.vera_A"), "lacks base_model.vera_A"),
    "its shape": ({}, lambda t: t | {"base_model.vera_B": np.ones((9, 6), np.float32)}, r"vera_B is \(9, 6\), where the targets take"),
    "bias": ({"bias": "lora_only"}, dict, "no method.bias 'lora_only'.*Known: all, none, vera_only"),
    "rank": ({"r": "4"}, dict, "r is '4'"),
    "other rank": ({"r": 4}, dict, "doesn't fit"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_gives_one_clear_message(fault, tmp_path):
    model, params = base()
    jaxft.save_adapter(tmp_path / "a", model, METHOD.init(jax.random.key(0), model, params), METHOD)
    config, change, message = BROKEN[fault]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config_of(tmp_path / "a") | config))
    safetensors.numpy.save_file(change(tensors(tmp_path / "a")), tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(tmp_path / "a", model, params)
