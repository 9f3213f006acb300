"""Prefix tuning, prompt tuning and P-tuning: how they start, what trains, what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import largest_difference, make_pair, moved, same_bits

import experiments
from jaxft import overrides
from jaxft.config import TrainConfig
from jaxft.errors import UserError
from jaxft.methods import BitFit, LoRA, Prefix, Prompt, PTuning
from jaxft.models.llama import PLACEMENT
from jaxft.train import placement

METHODS = {
    "prefix": Prefix(5),
    "zero prefix": Prefix(5, start="zero"),
    "projected prefix": Prefix(5, projection=True),
    "prompt": Prompt(5),
    "random prompt": Prompt(5, start="random"),
    "mlp": PTuning(5),
    "lstm": PTuning(5, encoder="lstm", hidden_size=6),
}


@functools.cache
def base():
    _, model, params = make_pair("llama")
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids):
    return model.apply({"params": params}, ids).logits


IDS = np.random.default_rng(0).integers(1, 97, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("name", METHODS)
def test_it_adds_a_site_in_float32_and_leaves_the_base_as_it_is(name):
    model, params = base()
    made = METHODS[name].init(jax.random.key(0), model, params)
    (site,) = set(made) - set(params)
    assert all(made[key] is params[key] for key in params)
    assert {leaf.dtype for leaf in jax.tree.leaves(made[site])} == {jnp.dtype("float32")}
    assert made[site].virtual_tokens == 5
    mask = METHODS[name].mask(made)
    assert all(jax.tree.leaves(mask[site]))
    assert not any(jax.tree.leaves({key: mask[key] for key in params}))
    assert same_bits(made, METHODS[name].init(jax.random.key(0), model, params))


def test_a_bfloat16_model_has_virtual_tokens_in_float32():
    model, params = base()
    model = model.clone(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    method = Prefix(3, start="text", tokens=(4, 5, 6)) + PTuning(2, encoder="lstm", hidden_size=6)
    made = method.init(jax.random.key(0), model, params)
    assert {leaf.dtype for site in ("prefix", "prompt") for leaf in jax.tree.leaves(made[site])} == {jnp.dtype("float32")}
    out = logits(model, made, IDS)
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_a_prompt_of_the_vocabulary_holds_the_models_embeddings():
    model, params = base()
    made = np.asarray(Prompt(5).init(jax.random.key(2), model, params)["prompt"].embedding)
    table = np.asarray(params["embed"]["embedding"])
    assert all((row == table).all(axis=1).any() for row in made)


def test_a_text_is_trimmed_or_repeated():
    model, params = base()
    table = np.asarray(params["embed"]["embedding"])
    for count, expected in ((2, [7, 8]), (5, [7, 8, 9, 7, 8])):
        made = Prompt(count, start="text", tokens=(7, 8, 9)).init(jax.random.key(0), model, params)
        assert np.array_equal(made["prompt"].embedding, table[expected])


def test_a_text_needs_the_tokenizer():
    model, params = base()
    tokenizer = lambda text: {"input_ids": [ord(letter) - 90 for letter in text]}  # noqa: E731
    for kind in (Prefix, Prompt):
        method = kind(3, start="text", text="abc")
        with pytest.raises(UserError, match="isn't tokenized yet"):
            method.init(jax.random.key(0), model, params)
        assert method.tokenized(tokenizer).tokens == (7, 8, 9)
        assert (method + LoRA()).tokenized(tokenizer).methods[0].tokens == (7, 8, 9)
        with pytest.raises(UserError, match="has no tokens"):
            method.tokenized(lambda text: {"input_ids": []})
        with pytest.raises(UserError, match="the model's tokens are 0 to 96"):
            kind(3, start="text", tokens=(500,)).init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Prefix, {"virtual_tokens": 0}, "1 or more"),
        (Prompt, {"virtual_tokens": -1}, "1 or more"),
        (PTuning, {"virtual_tokens": 0}, "1 or more"),
        (Prefix, {"start": "txt"}, "Did you mean 'text'"),
        (Prompt, {"start": "text"}, "needs the text"),
        (Prompt, {"text": "Hello"}, "are for method.start='text'"),
        (Prefix, {"start": "text", "text": "Hello", "projection": True}, "no projection can be found"),
        (Prefix, {"folded": True}, "projection=True"),
        (Prefix, {"projection_hidden": -1}, "0 or more"),
        (PTuning, {"encoder": "lstn"}, "Did you mean 'lstm'"),
        (PTuning, {"hidden_size": -2}, "0 or more"),
        (PTuning, {"layers": 0}, "1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings)


@pytest.mark.parametrize("name", ["prefix", "prompt", "mlp"])
def test_it_cant_be_merged_which_is_said(name):
    model, params = base()
    made = METHODS[name].init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match=r"can't be merged.*jaxft\.save_adapter"):
        METHODS[name].merge(model, made)
    with pytest.raises(UserError, match="can't be merged"):
        (LoRA() + METHODS[name]).merge(model, made)


def test_two_prompts_are_refused():
    model, params = base()
    with pytest.raises(UserError, match="have a prompt already"):
        (Prompt(5) + PTuning(5)).init(jax.random.key(0), model, params)


def test_sums_with_a_lora_train_both():
    model, params = base()
    method = LoRA(rank=2, targets=("q_proj",)) + Prefix(3) + Prompt(4)
    made = moved(method, model, params)
    mask = method.mask(made)
    assert sum(jax.tree.leaves(mask)) == 2 + 1 + 1
    assert largest_difference(logits(model, made, IDS), logits(model, params, IDS)) > 0.01
    without = {key: value for key, value in made.items() if key not in ("prefix", "prompt")}
    assert same_bits(LoRA(rank=2, targets=("q_proj",)).merge(model, without)["norm"], params["norm"])


def test_biases_of_an_encoder_are_no_targets_of_bitfit_by_layer():
    _, model, params = make_pair("qwen2")
    made = (PTuning(3) + BitFit(targets=("attention/.*/bias",))).init(jax.random.key(0), model, params)
    assert made["prompt"].virtual_tokens == 3


def test_two_devices_give_the_same_logits():
    model, params = base()
    made = moved(Prefix(3, projection=True) + Prompt(4), model, params)
    mesh = placement.make_mesh(TrainConfig(batch_size=2, data_parallel=1, fsdp_parallel=1, tensor_parallel=2))
    placed = jax.device_put(made, placement.shardings(made, PLACEMENT, mesh))
    assert largest_difference(logits(model, placed, IDS), logits(model, made, IDS)) <= 1e-5


@pytest.mark.parametrize("method", [Prefix(4, start="text", tokens=(1, 2)), Prompt(3), PTuning(encoder="lstm") + LoRA()])
def test_it_goes_through_json(method):
    experiment = dataclasses.replace(experiments.load("lora_llama2"), method=method)
    assert overrides.from_dict(overrides.to_dict(experiment)) == experiment
