"""Packed rows against each example in a row of its own."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import ROTARY, VOCABULARY, make_pair

from jaxft.models.attention import QUERY_BLOCK

# of the largest logit: the same float32 sums in rows of another length
TOLERANCE = 1e-5

MODELS = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 4}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {}),
    **{name: ("llama", settings) for name, settings in ROTARY.items()},
    "dynamic": ("qwen3", {"head_dim": 16} | ROTARY["dynamic"]),
}


@functools.cache
def program(name):
    family, settings = MODELS[name]
    _, model, params = make_pair(family, max_position_embeddings=1024, **settings)
    return jax.jit(lambda ids, segments, positions: model.apply({"params": params}, ids, segment_ids=segments, positions=positions).logits)


def pack(prefix, parts, length):
    """Returns ids, segments and positions (1, length) of examples behind a shared prefix, the rest padding."""
    ids, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = len(prefix)
    ids[0, :start], segments[0, :start], positions[0, :start] = prefix, -1, np.arange(start)
    spans = []
    for number, part in enumerate(parts, start=1):
        stop = start + len(part)
        ids[0, start:stop], segments[0, start:stop] = part, number
        positions[0, start:stop] = np.arange(len(prefix), len(prefix) + len(part))
        spans.append(slice(start, stop))
        start = stop
    return (ids, segments, positions), spans


def compare(name, prefix_length, lengths, row):
    random = np.random.default_rng(2)
    prefix = random.integers(1, VOCABULARY, prefix_length).astype(np.int32)
    parts = [random.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]
    run = program(name)
    packed, spans = pack(prefix, parts, row)
    together = np.asarray(run(*packed))[0]
    for part, place in zip(parts, spans, strict=True):
        whole = np.concatenate([prefix, part])
        alone = np.zeros((1, row), np.int32)
        alone[0, : len(whole)] = whole
        segments = (np.arange(row) < len(whole)).astype(np.int32)[None]
        expected = np.asarray(run(alone, segments, np.arange(row, dtype=np.int32)[None] * segments))[0]
        scale = max(1.0, np.abs(expected[: len(whole)]).max())
        assert np.abs(together[place] - expected[prefix_length : len(whole)]).max() <= TOLERANCE * scale
        assert np.abs(together[:prefix_length] - expected[:prefix_length]).max(initial=0) <= TOLERANCE * scale


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_have_the_logits_of_separate_rows(name):
    compare(name, 0, (11, 3, 17, 1), 36)


@pytest.mark.parametrize("name", MODELS)
def test_examples_behind_a_shared_prefix_have_the_logits_of_whole_ones(name):
    compare(name, 7, (9, 2, 13), 36)


@pytest.mark.parametrize("name", ["window"])
def test_rows_longer_than_a_block_of_queries(name):
    compare(name, 21, (QUERY_BLOCK - 30, 70, 90), QUERY_BLOCK + 160)
