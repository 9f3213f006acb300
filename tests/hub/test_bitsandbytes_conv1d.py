"""GPT-2 in 4 bits: transformers makes its Conv1D, (in, out), linear layers of bitsandbytes, (out, in)."""

import functools
import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from four_bit_models import FORMATS, by_transformers, dense, our_logits, ready_made, their_logits
from tiny_models import moved, with_adapter

import jaxft
from jaxft.hub.load import describe_pretrained
from jaxft.methods import LoRA
from jaxft.models import segments
from jaxft.models.node import is_node, is_quantized

TOLERANCE = 1e-4  # float32 on both sides, logits of order 5
FAMILY, KIND = "gpt2", "nf4, double"


@functools.cache
def base():
    return jaxft.load_pretrained(ready_made(KIND, FAMILY))


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(jax.tree.map(np.array_equal, one, other))


def tensors(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in safetensors.numpy.load_file(file).items()}


def test_theirs_has_their_logits_here():
    expected = their_logits(by_transformers(ready_made(KIND, FAMILY)))
    assert np.abs(expected - their_logits(by_transformers(dense(FAMILY)))).max() > 0.1
    model, params = base()
    assert np.abs(our_logits(model, params) - expected).max() <= TOLERANCE
    held = {name for leaf in segments.leaves(params, is_leaf=is_node) if is_quantized(leaf.value) for name in leaf.names}
    layers = ("attention/c_attn", "attention/c_proj", "mlp/c_fc", "mlp/c_proj")
    assert held == {f"layers/{number}/{name}/kernel" for number in (0, 1) for name in layers}
    _, shapes = describe_pretrained(ready_made(KIND, FAMILY))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


@pytest.mark.parametrize("kind", FORMATS)
def test_quantizing_the_original_gives_their_bits_and_their_folder(kind, tmp_path):
    _, theirs = jaxft.load_pretrained(ready_made(kind, FAMILY))
    model, ours = jaxft.load_pretrained(dense(FAMILY), quantization=FORMATS[kind])
    assert same(ours, theirs)
    jaxft.save_pretrained(tmp_path / "ours", model, ours, format="bitsandbytes")
    expected, found = tensors(ready_made(kind, FAMILY)), tensors(tmp_path / "ours")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if "quant_state" in name:
            assert json.loads(array.tobytes()) == json.loads(found[name].tobytes())
        else:
            assert (array.dtype, array.shape, array.tobytes()) == (found[name].dtype, found[name].shape, found[name].tobytes())
    assert np.abs(their_logits(by_transformers(tmp_path / "ours")) - our_logits(model, ours)).max() <= TOLERANCE


def test_a_lora_on_four_bits_has_its_logits_on_both_sides_and_is_merged_into_a_dense_folder(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], use_dora=True)
    tuned = peft.get_peft_model(by_transformers(ready_made(KIND, FAMILY)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model, plain = base()
    params, _ = with_adapter(tuned.eval(), model, plain)
    assert np.abs(our_logits(model, params) - their_logits(tuned)).max() <= TOLERANCE
    method = LoRA(rank=3, alpha=6.0)
    params = moved(method, model, plain, size=0.05)
    jaxft.save_adapter(tmp_path / "ours", model, params, method)
    theirs = peft.PeftModel.from_pretrained(by_transformers(ready_made(KIND, FAMILY)), tmp_path / "ours").eval()
    assert np.abs(our_logits(model, params) - their_logits(theirs)).max() <= TOLERANCE
    jaxft.save_pretrained(tmp_path / "merged", model, method.merge(model, params))
    assert np.abs(their_logits(by_transformers(tmp_path / "merged")) - our_logits(model, params)).max() <= TOLERANCE
