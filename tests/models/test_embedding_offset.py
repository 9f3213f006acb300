"""What is added to the tokens' embeddings: the difference of two texts' makes one of the other."""

import jax
import numpy as np
import pytest
from tiny_models import VOCABULARY, largest_difference, make_pair


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("electra", "token_classification")])
def test_the_difference_of_two_texts_makes_one_of_the_other(family, task):
    _, model, params = make_pair(family, task)
    one, other = np.random.default_rng(0).integers(1, VOCABULARY, (2, 2, 9)).astype(np.int32)
    table = params["embed"]["embedding"]

    def features(tokens, offset=None):
        return model.apply({"params": params}, tokens, embedding_offset=offset, method="features")

    found, expected = jax.jit(features)(one, table[other] - table[one]), jax.jit(features)(other)
    assert largest_difference(found, expected) <= 1e-5  # float32 of numbers of order 1
