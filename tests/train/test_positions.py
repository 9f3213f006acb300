"""Rows and virtual tokens against a model's positions."""

import dataclasses
import types

import jax.numpy as jnp
import pytest
from tiny_models import make_examples

import experiments
from jaxft.config import ModelConfig
from jaxft.errors import UserError
from jaxft.methods.prefix import KeysValues
from jaxft.methods.prompt import Embeddings
from jaxft.models.node import virtual_tokens
from jaxft.train.data import check_tokens

MODEL = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=20, vocab_size=1000))
EXPERIMENT = dataclasses.replace(experiments.load("lora_llama2"), model=ModelConfig(source="owner/model"))


def check(longest, before):
    check_tokens({"train": make_examples([5, 7]), "test": make_examples([longest])}, EXPERIMENT, MODEL, before)


def test_what_fits_passes():
    check(20, 0)
    check(12, 8)


def test_a_token_beyond_the_embedding_is_refused():
    small = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=20, vocab_size=3))
    with pytest.raises(UserError, match=r"makes token \d+ of the train rows; owner/model has embeddings of 3 alone"):
        check_tokens({"train": make_examples([5, 7])}, EXPERIMENT, small)


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(UserError, match=r"has 21 tokens; owner/model has 20 positions\. Lower config\.data\.max_length\.$"):
        check(21, 0)


def test_virtual_tokens_count():
    with pytest.raises(UserError, match=r"12 tokens after 9 virtual tokens; owner/model has 20 positions.*method's virtual_tokens"):
        check(12, 9)


def test_prefix_and_prompt_are_counted_together():
    sites = {"prefix": KeysValues(jnp.zeros((3, 2, 2, 1, 4))), "prompt": Embeddings(jnp.zeros((4, 8)))}
    assert virtual_tokens({"layers": {}, **sites}) == 7
    assert virtual_tokens({"layers": {}}) == 0
