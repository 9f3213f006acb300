"""The key-value cache: token by token gives what the whole row gives."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import VOCABULARY, make_pair, moved

import jaxft
from jaxft.models import segments

# the same float32 sums over keys of another padding, logits of order 10
TOLERANCE = 5e-5

MODELS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen3": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}
LENGTH, PREFILL, SIZE = 15, 8, 20


@functools.cache
def programs(name):
    family, settings = MODELS[name]
    _, model, params = make_pair(family, **settings)
    full = jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask).logits)

    def extend(params, ids, mask, cache):
        out = model.apply({"params": params}, ids, attention_mask=mask, cache=cache)
        return out.logits, out.cache

    return model, params, full, jax.jit(extend)


def rows():
    """Returns ids and mask (3, LENGTH), padded on the left by 0, 3 and 6 tokens."""
    ids = np.random.default_rng(5).integers(1, VOCABULARY, (3, LENGTH)).astype(np.int32)
    return ids, (np.arange(LENGTH) >= np.array([0, 3, 6])[:, None]).astype(np.int32)


def check(name, params, pieces):
    """Compares the logits of `pieces` tokens at a time with those of the whole rows."""
    model, _, full, extend = programs(name)
    ids, mask = rows()
    expected = np.asarray(full(params, ids, mask))
    cache = model.apply({"params": params}, len(ids), SIZE, method="new_cache")
    start, made = 0, []
    for piece in pieces:
        part = slice(start, start + piece)
        logits, cache = extend(params, ids[:, part], mask[:, part], cache)
        made.append(np.asarray(logits))
        start += piece
    assert start == LENGTH == int(cache.index)
    assert np.abs(np.concatenate(made, axis=1) - expected)[mask == 1].max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_one_token_at_a_time_is_the_whole_row(name):
    check(name, programs(name)[1], [PREFILL] + [1] * (LENGTH - PREFILL))


def test_several_tokens_at_a_time_is_the_whole_row():
    check("mistral", programs("mistral")[1], [PREFILL, 3, 3, 1])


def test_the_cache_follows_the_segments_that_a_method_makes():
    model, base, _, _ = programs("llama")
    params = moved(jaxft.methods.LoRA(rank=2, targets=("layers/2/mlp",)), model, base)
    assert [len(layers) for layers in segments.spans(params)] == [2, 1]
    check("llama", params, [PREFILL] + [1] * (LENGTH - PREFILL))
