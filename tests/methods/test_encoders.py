"""Every method that fits on an encoder, by what all methods promise; a prefix against transformers with the same keys and values."""

import jax
import numpy as np
import pytest
import torch
import transformers
from method_checks import (
    IDS,
    TOLERANCE,
    base,
    check_bfloat16,
    check_cuts,
    check_merge,
    check_start,
    check_two_devices,
    check_what_moves,
    logits,
    pair,
)
from tiny_models import largest_difference, moved, same_bits

from jaxft.errors import UserError
from jaxft.methods import IA3, BitFit, Bottleneck, LoRA, NormTuning, Partial, Prefix, Prompt, PTuning, SparseMask, VeRA

FAMILY = "bert masked_lm"
OUTPUT = "layers/[0-9]+/output"
METHODS = {
    "lora": LoRA(rank=2, alpha=3.0, targets=("query", "value")),
    "biases": BitFit(),
    "norms": NormTuning(),
    "partial": Partial(last=1, targets=("lm_head",)),
    "ia3": IA3(("key", "value", OUTPUT), (OUTPUT,)),
    "sparse": SparseMask(rank=1, targets=("query", "intermediate")),
    "vera": VeRA(rank=4, targets=("query", "value")),
}
BESIDE = {  # what can't be merged
    "bottleneck": Bottleneck(reduction=4.0),
    "pfeiffer": Bottleneck.seq_bn(reduction=4.0),
}
BEFORE = {  # tokens before each text, which every token of it sees
    "prefix": Prefix(virtual_tokens=3),
    "prompt": Prompt(virtual_tokens=3),
    "ptuning": PTuning(virtual_tokens=3, hidden_size=8),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base_and_differs_once_moved(name):
    check_start(METHODS[name], FAMILY)


@pytest.mark.parametrize("name", BESIDE)
def test_adapters_at_sites_start_as_the_base_and_differ_once_moved(name):
    model, params = base(FAMILY)
    started = BESIDE[name].init(jax.random.key(0), model, params)
    assert largest_difference(logits(started, FAMILY), logits(params, FAMILY)) <= TOLERANCE
    assert largest_difference(logits(moved(BESIDE[name], model, params), FAMILY), logits(params, FAMILY)) > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_merged_is_unmerged(name):
    check_merge(METHODS[name], FAMILY)


@pytest.mark.parametrize("name", ["lora", "pfeiffer", *BEFORE])
def test_only_what_trains_moves(name):
    check_what_moves((METHODS | BESIDE | BEFORE)[name], FAMILY)


@pytest.mark.parametrize("name", BEFORE)
def test_virtual_tokens_are_seen_and_go_without_a_trace(name):
    model, params = base(FAMILY)
    method = BEFORE[name]
    kept = jax.tree.map(np.array, params)
    tuned = moved(method, model, params)
    assert same_bits(params, kept), "init changed its argument"
    assert largest_difference(logits(tuned, FAMILY), logits(params, FAMILY)) > 0.01
    off = {branch: leaves for branch, leaves in tuned.items() if branch in params}
    assert same_bits(logits(off, FAMILY), logits(params, FAMILY))
    with pytest.raises(UserError, match="can't be merged"):
        method.merge(model, tuned)


def test_what_trains_is_float32_on_a_bfloat16_base():
    check_bfloat16(METHODS["lora"], FAMILY)


@pytest.mark.parametrize("method", [METHODS["lora"] + BESIDE["pfeiffer"], *BEFORE.values()], ids=["lora + bottleneck", *BEFORE])
def test_how_a_batch_is_cut_changes_nothing(method):
    check_cuts(method, FAMILY)


def test_two_devices_are_one():
    check_two_devices(METHODS["lora"] + Partial(targets=("lm_head",)), FAMILY, {"data_parallel": 1, "tensor_parallel": 2})


@pytest.mark.parametrize("name", BEFORE)
def test_two_devices_are_one_before_each_text(name):
    check_two_devices(BEFORE[name], FAMILY)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_prefix_is_seen_by_every_token_and_moves_the_texts_positions(family, monkeypatch):
    """The reference gets the prefix's keys and values where its attention has its own."""
    count, name = 3, f"{family} sequence_classification"
    reference, model, params = pair(name)
    tuned = moved(Prefix(virtual_tokens=count), model, params)
    keys, values = (torch.tensor(np.asarray(part)).transpose(1, 2) for part in tuned["prefix"].keys_values())  # (layers, heads, count, ...)
    module = getattr(transformers.models, family)
    module = getattr(module, f"modeling_{family}")
    plain, layers = module.eager_attention_forward, iter(range(len(keys)))

    def prefixed(attention, query, key, value, mask, **settings):
        layer, batch = next(layers), len(query)
        key = torch.cat([keys[layer].expand(batch, *keys[layer].shape), key], dim=2)
        value = torch.cat([values[layer].expand(batch, *values[layer].shape), value], dim=2)
        return plain(attention, query, key, value, None, **settings)

    monkeypatch.setattr(module, "eager_attention_forward", prefixed)
    first = count + (reference.config.pad_token_id + 1 if family == "roberta" else 0)
    with torch.no_grad():
        expected = reference(torch.tensor(IDS), position_ids=torch.arange(first, first + IDS.shape[1])[None]).logits.numpy()
    assert largest_difference(logits(tuned, name), expected) <= 1e-4
    assert largest_difference(logits(tuned, name), logits(params, name)) > 0.01


@pytest.mark.parametrize("method", [Prefix(2, start="text", tokens=(3, 4))], ids=lambda method: method.title)
def test_what_needs_a_causal_model_is_refused(method):
    with pytest.raises(UserError, match="is for causal models: the virtual tokens of a bert would look at the text too"):
        method.init(jax.random.key(0), *base(FAMILY))
