"""How much attention tokens get: transformers' own weights, summed; nothing else changes where it is asked for."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, largest_difference, make_pair

from jaxft.methods import Prefix, Prompt
from jaxft.models.layers import RECEIVED, received

LENGTHS = (11, 7)
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11)).astype(np.int32)
MASK = (np.arange(11) < np.asarray(LENGTHS)[:, None]).astype(np.int32)


def asked(model, params):
    def features(params):
        found, noted = model.apply({"params": params}, TOKENS, attention_mask=MASK, method="features", mutable=[RECEIVED])
        return found, received(noted, TOKENS.shape[1])

    return jax.jit(features)(params)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("gpt2", "causal_lm"), ("llama", "causal_lm")])
def test_it_is_the_sum_of_transformers_weights(family, task):
    reference, model, params = make_pair(family, task)
    hidden, found = asked(model, params)
    with torch.no_grad():
        weights = reference(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(MASK), output_attentions=True).attentions
    every = np.mean([layer.numpy().mean(axis=1) for layer in weights], axis=0)  # (rows, queries, keys)
    for row, length in enumerate(LENGTHS):
        assert largest_difference(found[row, :length], every[row, :length, :length].sum(axis=0)) <= 1e-5
    plain = jax.jit(lambda params: model.apply({"params": params}, TOKENS, attention_mask=MASK, method="features"))(params)
    assert largest_difference(hidden, plain) <= 1e-5  # float32 of numbers of order 1


def test_virtual_tokens_take_their_part_of_it():
    _, model, params = make_pair("llama")
    alone = np.asarray(asked(model, params)[1])[MASK > 0].sum()
    np.testing.assert_allclose(alone, sum(LENGTHS), rtol=1e-5)  # each token gives one
    for method in (Prefix(virtual_tokens=3), Prompt(virtual_tokens=3)):
        found = asked(model, method.init(jax.random.key(0), model, params))[1]
        assert found.shape == TOKENS.shape
        assert np.asarray(found)[MASK > 0].sum() < alone - 1
