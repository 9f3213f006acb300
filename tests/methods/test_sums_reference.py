"""Sums of a prefix with another method, against peft's prefix around a model that has the other one: loss, gradients, twenty steps."""

import functools

import numpy as np
import peft
import pytest
import torch
from reference_training import check_gradients, check_losses, our_gradients, our_losses, torch_loss, torch_losses
from tiny_models import make_pair, moved

import jaxft
from jaxft.methods import Bottleneck, LoRA, Prefix
from jaxft.models import segments

TOKENS = 5
MODULES = {"attention/q_proj": "self_attn.q_proj", "mlp/up_proj": "mlp.up_proj"}
SUMS = {
    "lora": LoRA(rank=4, alpha=6.0, targets=tuple(MODULES)) + Prefix(TOKENS),
    "bottleneck": Prefix(TOKENS) + Bottleneck.par_bn(reduction=4.0),  # He et al. 2021's mix-and-match adapter
}


class Parallel(torch.nn.Module):
    """A scaled parallel adapter beside a layer's MLP, which reads what its sum goes to."""

    def __init__(self, layer, size, scale):
        super().__init__()
        width = layer.mlp.down_proj.out_features
        self.down, self.up, self.scale = torch.nn.Linear(width, size), torch.nn.Linear(size, width), scale
        layer.post_attention_layernorm.register_forward_pre_hook(self.keep)
        layer.mlp.register_forward_hook(self.add)

    def keep(self, norm, inputs):
        self.residual = inputs[0]

    def add(self, mlp, inputs, output):
        return output + self.scale * self.up(torch.relu(self.down(self.residual)))


def with_lora(reference):
    """Puts peft's LoRA in the model; returns its parameters by our names."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[name.split(".")[1] for name in MODULES.values()])
    peft.inject_adapter_in_model(config, reference)
    found = {}
    for number, layer in enumerate(reference.model.layers):
        for ours, theirs in MODULES.items():
            module = layer.get_submodule(theirs)
            found[f"layers/{number}/{ours}/kernel/lora_a"] = module.lora_A["default"].weight
            found[f"layers/{number}/{ours}/kernel/lora_b"] = module.lora_B["default"].weight
    return found


def with_bottleneck(reference):
    """Puts adapters in the model; returns their parameters by our names."""
    found = {}
    for number, layer in enumerate(reference.model.layers):
        adapter = Parallel(layer, size=8, scale=4.0)
        for side in ("down", "up"):
            found[f"layers/{number}/mlp_output/{side}/kernel"] = getattr(adapter, side).weight
            found[f"layers/{number}/mlp_output/{side}/bias"] = getattr(adapter, side).bias
        layer.adapter = adapter
    return found


def by_name(tree):
    """Returns every layer's part of each leaf by its name."""
    return {
        name: np.asarray(leaf.value if leaf.layers is None else leaf.value[place])
        for leaf in segments.leaves(tree)
        for place, name in enumerate(leaf.names)
    }


def turned(array):
    """A linear layer's kernel as torch has it, or back; a bias as it is."""
    return array.T if array.ndim == 2 else array


@functools.cache
def pair_of(name):
    """The same sum in peft and here, where it trains on packed rows: model, parameters, method, theirs, their leaves by our names."""
    reference, model, base = make_pair("llama")
    method = SUMS[name]
    params = moved(method, model, base, 0.1)
    leaves = {"lora": with_lora, "bottleneck": with_bottleneck}[name](reference)
    tuned = peft.get_peft_model(reference, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)).eval()
    leaves["prefix/embedding"] = tuned.prompt_encoder["default"].embedding.weight
    ours = by_name(jaxft.partition(params, method.mask(params))[0])
    assert ours.keys() == leaves.keys()
    for key, leaf in leaves.items():
        leaf.requires_grad_(True)  # peft froze what it takes for the base
        leaf.data = torch.tensor(turned(ours[key])).reshape(leaf.shape).clone()
    return model, params, method, tuned, leaves


@pytest.mark.parametrize("name", SUMS)
def test_loss_and_gradients_of_every_leaf_are_those_of_both_in_torch(name):
    model, params, method, tuned, leaves = pair_of(name)
    expected = torch_loss(tuned)
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    loss, found = our_gradients(model, params, method)
    assert abs(loss - expected.item()) <= 1e-5 * expected.item()  # float32 rounding of a mean
    found = by_name(found)
    theirs = {key: turned(gradient.numpy()) for key, gradient in zip(leaves, gradients, strict=True)}
    theirs["prefix/embedding"] = theirs["prefix/embedding"].T.reshape(found["prefix/embedding"].shape)
    check_gradients(found, theirs)


@pytest.mark.parametrize("name", SUMS)
def test_twenty_steps_have_the_losses_of_torch(name):
    model, params, method, tuned, leaves = pair_of(name)
    assert {id(leaf) for leaf in leaves.values()} == {id(leaf) for leaf in tuned.parameters() if leaf.requires_grad}
    kept = [leaf.detach().clone() for leaf in leaves.values()]
    check_losses(our_losses(model, params, method), torch_losses(tuned))
    for leaf, value in zip(leaves.values(), kept, strict=True):
        leaf.data.copy_(value)
