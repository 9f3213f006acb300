"""R-Drop: what it leaves as it is, and where it would compare equal passes; its sum is tested with sequence classification."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import make_examples, make_pair

import jaxft
from jaxft.config import DataConfig, Experiment, ModelConfig, TrainConfig
from jaxft.data.batches import Batches
from jaxft.errors import UserError
from jaxft.models.dropout import with_dropout
from jaxft.tasks import SFT, SequenceClassification
from jaxft.train.data import check_r_drop

WEIGHT = 0.7
PLAIN = SFT()
EXAMPLES = make_examples([9, 14, 21, 12], answer=3)


@functools.cache
def classifier():
    """Returns an encoder that drops, and its parameters."""
    _, model, params = make_pair("bert", "sequence_classification", problem_type="single_label_classification", num_hidden_layers=1)
    return with_dropout(model, {"hidden_dropout": 0.2, "attention_dropout": 0.2, "classifier_dropout": 0.2}), params


def texts():
    """Returns four texts with a class each."""
    random = np.random.default_rng(0)
    batch = {"tokens": random.integers(1, 90, (4, 12)), "segment_ids": np.ones((4, 12)), "positions": np.tile(np.arange(12), (4, 1))}
    batch |= {"scored": np.zeros((4, 1)), "targets": np.array([[0], [2], [1], [2]])}
    return {name: array.astype(np.int32) for name, array in batch.items()} | {"weights": np.array([[1], [1], [1], [0.5]], np.float32)}


def test_a_weight_of_zero_is_one_plain_pass():
    model, params = classifier()
    key, task = jax.random.key(3), SequenceClassification()

    def program(**options):
        return str(jax.make_jaxpr(lambda params, key: task.sums(model, params, texts(), {"dropout": key}, **options))(params, key))

    assert program(r_drop=0.0) == program()
    assert program(r_drop=WEIGHT) != program()


def test_chunks_of_the_head_change_nothing_but_rounding():
    _, model, params = make_pair("gpt2", num_hidden_layers=1)
    batch = jax.tree.map(lambda leaf: leaf[0], Batches(EXAMPLES, DataConfig(max_length=64), 1, 1, 0, False).batch(0))

    def loss(chunk):
        sums = SFT(head_chunk=chunk).sums(model, params, batch, {"dropout": jax.random.key(0)}, r_drop=WEIGHT)
        return [float(part) for part in (sums.loss, sums.nll, sums.weight)]

    whole = loss(100)
    np.testing.assert_allclose(loss(5), whole, rtol=1e-5)
    assert whole[0] > whole[1] + 1e-3


# Where nothing drops


def fit(model, params, method, task=PLAIN, **train):
    """Checks R-Drop on a method on a model."""
    experiment = Experiment("r_drop", ModelConfig(), DataConfig(), method, task, TrainConfig(r_drop=WEIGHT, **train))
    shapes = jax.eval_shape(lambda params: method.init(jax.random.key(0), model, params), params)
    check_r_drop(experiment, model, shapes, Batches(EXAMPLES, DataConfig(max_length=64), 2, 1, 0, False))


class Drawing(SFT):
    """A task that draws something of its own."""

    def sums(self, model, params, batch, rngs, **options):
        noise = 1 + jax.random.uniform(jax.random.key(0), batch["weights"].shape)
        return super().sums(model, params, batch | {"weights": batch["weights"] * noise}, rngs, **options)


@functools.cache
def llama():
    return make_pair("llama", num_hidden_layers=1)[1:]


@pytest.mark.parametrize("task", [PLAIN, Drawing()], ids=lambda task: type(task).__name__)
def test_two_equal_passes_are_refused(task):
    with pytest.raises(UserError) as caught:
        fit(*llama(), jaxft.methods.LoRA(rank=2), task)
    assert "nothing drops here: both would be equal. Set config.model.attention_dropout, or a method's dropout" in str(caught.value)


@pytest.mark.parametrize("dropping", ["model", "method", "noise"])
def test_two_passes_that_differ_are_not(dropping):
    model, params = llama()
    method = jaxft.methods.LoRA(rank=2)
    if dropping == "model":
        model = with_dropout(model, {"attention_dropout": 0.1})
    if dropping == "method":
        method = dataclasses.replace(method, dropout=0.1)
    fit(model, params, method, **({"neftune_alpha": 5.0} if dropping == "noise" else {}))
