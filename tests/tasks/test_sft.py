"""Supervised fine-tuning: the loss of transformers, at scored tokens only."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from evaluation_batches import evaluation_batches
from lenient_optax import make_optimizer
from program_shapes import shapes_of
from tiny_models import SMALL, VOCABULARY, make_examples, make_pair, moved

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.errors import UserError
from jaxft.tasks import SFT
from jaxft.train.state import new_state
from jaxft.train.step import make_evaluation, make_step

EXAMPLES = make_examples([21, 9, 14, 30, 12], prefix=4, answer=6)


@functools.cache
def pair():
    return make_pair("llama")


def rows(packing, share_prefix):
    config = DataConfig(max_length=64, packing=packing, share_prefix=share_prefix)
    (batch,) = evaluation_batches(EXAMPLES, config, 2 if packing else 5, share_prefix)
    return batch


def reference_loss():
    """Returns the mean negative log-likelihood of the scored tokens, example by example, by transformers."""
    total, count = 0.0, 0
    for i in range(len(EXAMPLES)):
        tokens, scored = EXAMPLES[i]
        labels = torch.tensor(np.where(scored, tokens, -100)).long()[None]
        with torch.no_grad():
            total += float(pair()[0](torch.tensor(tokens)[None], labels=labels).loss) * scored.sum()
        count += scored.sum()
    return total / count


@pytest.mark.parametrize(("packing", "share_prefix"), [(False, False), (True, False), (True, True)])
def test_the_loss_is_that_of_transformers(packing, share_prefix):
    _, model, params = pair()
    sums, _ = jax.jit(make_evaluation(model, SFT()))(params, jax.tree.map(lambda _: None, params), rows(packing, share_prefix))
    assert float(sums.weight) == EXAMPLES.scored.sum()
    np.testing.assert_allclose(sums.nll / sums.weight, reference_loss(), rtol=1e-5)  # float32 rounding of a mean
    assert sums.loss == sums.nll


def logits_rows(shape):
    """Returns how many tokens' logits an array of this shape could hold."""
    return int(np.prod(shape)) // VOCABULARY if VOCABULARY in shape else 0


@pytest.fixture(scope="module")
def program():
    """Returns the training step's program, as traced and as compiled, on 2 rows of 128 tokens."""
    _, model, base = pair()
    method = jaxft.methods.LoRA(rank=2)
    params = moved(method, model, base)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    examples = make_examples([60] * 4, answer=25)
    (batch,) = evaluation_batches(examples, DataConfig(max_length=128), 2, False)
    step = make_step(model, SFT(head_chunk=CHUNK, label_smoothing=0.1, z_loss=0.01), optimizer, seed=0)
    arguments = (new_state(trainable, optimizer), frozen, {name: array[None] for name, array in batch.items()})
    assert batch["tokens"].shape == (2, 128)
    return jax.make_jaxpr(step)(*arguments), jax.jit(step).lower(*arguments).compile().as_text()


CHUNK = 40  # tokens; more than the hidden size, so that the head's kernel, (32, vocabulary), isn't taken for logits


def test_logits_of_no_more_than_a_chunk_are_made(program):
    assert SMALL["hidden_size"] < CHUNK < 100
    traced, compiled = program
    rows = [logits_rows(shape) for shape in shapes_of(traced.jaxpr)]
    assert max(rows) == CHUNK
    shapes = [tuple(map(int, dimensions.split(","))) for dimensions in re.findall(r"\w+\[([\d,]+)\]", compiled)]
    assert max(logits_rows(shape) for shape in shapes) == CHUNK


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "task.label_smoothing .* not 1.0"),
        ({"label_smoothing": -0.1}, "task.label_smoothing .* not -0.1"),
        ({"z_loss": -1.0}, "task.z_loss .* not -1.0"),
        ({"head_chunk": 0}, "task.head_chunk .* not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SFT(**settings)
