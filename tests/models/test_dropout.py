"""Rates of dropout that a run sets: where they act, and what is left of the model's own."""

import functools
import json

import jax
import numpy as np
import pytest
from tiny_models import make_pair

import jaxft
from jaxft.errors import UserError
from jaxft.models.dropout import with_dropout

TASKS = {"bert": "sequence_classification", "gpt2": "token_classification", "llama": "token_classification"}
HELD = {  # the fields that config.json has of them
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0},
    "llama": {"attention_dropout": 0.0, "classifier_dropout": 0.0},
}
TOKENS = np.arange(1, 25, dtype=np.int32).reshape(2, 12)


@functools.cache
def model_of(family):
    """Returns a model that drops nothing by itself, and its parameters."""
    return make_pair(family, TASKS[family], num_hidden_layers=2, **HELD[family])[1:]


@functools.cache
def program(model):
    """Returns the head's outputs as a function of parameters, and of a key or of none."""
    return jax.jit(lambda params, rngs: model.apply({"params": params}, TOKENS, rngs=rngs).logits)


def outputs(model, params, key=None):
    """Returns a head's outputs, under dropout where a key is given."""
    return np.asarray(program(model)(params, {} if key is None else {"dropout": jax.random.key(key)}))


KINDS = [(family, kind) for family in TASKS for kind in ("hidden_dropout", "attention_dropout", "classifier_dropout")]


@pytest.mark.parametrize(("family", "kind"), [pair for pair in KINDS if pair != ("llama", "hidden_dropout")])
def test_each_rate_drops_in_training_alone(family, kind):
    model, params = model_of(family)
    plain = outputs(model, params)
    dropping = with_dropout(model, {kind: 0.5})
    one, other = outputs(dropping, params, 0), outputs(dropping, params, 1)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(outputs(dropping, params), plain)
    assert with_dropout(dropping, {kind: 0.0}) == model


def test_the_classifiers_rate_is_the_share_of_what_its_head_reads():
    model, params = model_of("gpt2")
    rows, dropping = np.ones((4000, 32), np.float32), with_dropout(model, {"classifier_dropout": 0.25})
    identity = params | {"classifier": {"kernel": np.eye(32, 3, dtype=np.float32), "bias": np.zeros(3, np.float32)}}
    found = dropping.apply({"params": identity}, rows, method="logits", rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(np.asarray(found)).tolist()) == {0.0, np.float32(1 / 0.75)}
    # 12000 draws: five deviations
    assert abs((np.asarray(found) == 0).mean() - 0.25) <= 5 * np.sqrt(0.25 * 0.75 / 12000)


def test_gpt2s_embeddings_drop_with_its_hidden_states():
    config = with_dropout(model_of("gpt2")[0], {"hidden_dropout": 0.3, "attention_dropout": -1.0}).config
    assert (config.embedding_dropout, config.hidden_dropout, config.attention_dropout) == (0.3, 0.3, 0.0)


def test_an_exported_folder_keeps_the_models_own_rates(tmp_path):
    model, params = model_of("bert")
    jaxft.save_pretrained(tmp_path / "saved", with_dropout(model, {"hidden_dropout": 0.3}), params)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["hidden_dropout_prob"] == 0.0


@pytest.mark.parametrize(
    ("family", "rates", "message"),
    [
        (
            "llama",
            {"hidden_dropout": 0.1},
            "config.model.hidden_dropout is set, but LlamaForTokenClassification has no such dropout.",
        ),
        (
            "bert",
            {"hidden_dropout": 1.0},
            "config.model.hidden_dropout is a rate from 0 up to, not including, 1, or -1 for",
        ),
        ("bert", {"attention_dropout": -0.5}, "config.model.attention_dropout is a rate from 0"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(family, rates, message):
    with pytest.raises(UserError) as caught:
        with_dropout(model_of(family)[0], rates)
    assert str(caught.value).startswith(message)
