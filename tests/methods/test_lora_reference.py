"""LoRA's training against peft and torch: losses, gradients, and twenty steps of AdamW."""

import functools
import tempfile

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from evaluation_batches import evaluation_batches
from lenient_optax import make_optimizer
from reference_training import check_losses, our_losses, torch_losses
from tiny_models import make_examples, make_pair, with_adapter
from torch_loss import torch_loss

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.tasks import SFT
from jaxft.train.state import new_state
from jaxft.train.step import make_step

STEPS, LEARNING_RATE, DECAY, CLIP = 20, 3e-3, 0.05, 1.0
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora and patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"v_proj": 2.5},
    },
}
OPTIONS = {  # the family, its settings, peft's settings
    "some layers, whole modules, all biases": (
        "llama",
        {"attention_bias": True},
        {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"},
    ),
    "tied embeddings, biases of targets": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"use_rslora": True, "target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"v_proj": 2}, "bias": "lora_only"},
    ),
}
EXAMPLES = make_examples([21, 9, 14, 30], answer=6)


def make_tuned(reference, **settings):
    """Returns a model of peft, both sides of its adapter random."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return tuned.eval()


class Pair:
    """The same adapter on the same base in peft and in jaxft, which sees the examples in packed rows."""

    def __init__(self, name):
        reference, self.model, base = make_pair("llama")
        self.tuned = make_tuned(reference, **ADAPTERS[name])
        self.leaves = {n.replace(".default", ""): leaf for n, leaf in self.tuned.named_parameters() if leaf.requires_grad}
        params, self.method = with_adapter(self.tuned, self.model, base)
        self.trainable, self.frozen = jaxft.partition(params, self.method.mask(params))
        (batch,) = evaluation_batches(EXAMPLES, DataConfig(max_length=64), 2, False)
        self.rows = batch

    def named(self, trainable):
        """Returns jaxft's leaves by their names in an adapter's file."""
        with tempfile.TemporaryDirectory() as folder:
            jaxft.save_adapter(f"{folder}/adapter", self.model, jaxft.combine(trainable, self.frozen), self.method)
            found = safetensors.numpy.load_file(f"{folder}/adapter/adapter_model.safetensors")
        return {name: leaf for name, leaf in found.items() if name in self.leaves}  # without the base's own weight of a targeted head


@functools.cache
def first_gradients(name):
    """Returns (loss, gradients by name) of peft and of jaxft."""
    pair = Pair(name)
    theirs = torch_loss(pair.tuned, EXAMPLES)
    theirs.backward()

    def mean(trainable):
        sums = SFT().sums(pair.model, jaxft.combine(trainable, pair.frozen), pair.rows, {})
        return sums.loss / sums.weight

    ours, gradients = jax.jit(jax.value_and_grad(mean))(pair.trainable)
    return (float(theirs.detach()), {n: leaf.grad.numpy() for n, leaf in pair.leaves.items()}), (float(ours), pair.named(gradients))


@functools.cache
def trained():
    """Returns (losses of twenty steps, leaves after them by name) of peft and of jaxft."""
    pair = Pair("rslora and patterns")
    config = OptimizerConfig(schedule="constant", warmup=0, learning_rate=LEARNING_RATE, weight_decay=DECAY, clip_norm=CLIP)
    ours = make_optimizer(config, STEPS)
    state, step = new_state(pair.trainable, ours), jax.jit(make_step(pair.model, SFT(), ours, seed=0))
    theirs = torch.optim.AdamW(pair.leaves.values(), lr=LEARNING_RATE, weight_decay=DECAY)
    losses, their_losses = [], []
    for _ in range(STEPS):
        state, metrics = step(state, pair.frozen, {key: array[None] for key, array in pair.rows.items()})
        losses.append(float(metrics["loss"]))
        theirs.zero_grad()
        loss = torch_loss(pair.tuned, EXAMPLES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.leaves.values(), CLIP)
        theirs.step()
        their_losses.append(float(loss.detach()))
    return (their_losses, {n: leaf.detach().numpy() for n, leaf in pair.leaves.items()}), (losses, pair.named(state.trainable))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_loss_is_that_of_peft(name):
    (expected, _), (found, _) = first_gradients(name)
    assert abs(found - expected) <= 1e-5 * expected  # float32 rounding of a mean


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_every_leaf_are_those_of_peft(name):
    (_, expected), (_, found) = first_gradients(name)
    assert expected.keys() == found.keys()
    for leaf, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, leaf
        relative = np.linalg.norm(found[leaf] - gradient) / np.linalg.norm(gradient)
        assert relative <= 1e-4, (leaf, relative)  # the bound everywhere


def test_twenty_steps_have_the_losses_of_torch():
    (expected, _), (found, _) = trained()
    assert expected[-1] < expected[0] - 0.5  # it learns
    assert np.abs(np.subtract(found, expected)).max() <= 1e-4  # the bound everywhere


def test_twenty_steps_end_at_the_adapter_of_torch():
    (_, expected), (_, found) = trained()
    for leaf, value in expected.items():
        # AdamW divides by the gradient's size: where that is near rounding a leaf may move by a part of a step, 3e-3
        assert np.abs(found[leaf] - value).max() <= LEARNING_RATE / 10, leaf


@pytest.mark.parametrize("name", OPTIONS)
def test_twenty_steps_with_options_have_the_losses_of_torch(name):
    family, shape, settings = OPTIONS[name]
    reference, model, base = make_pair(family, **shape)
    tuned = make_tuned(reference, r=4, lora_alpha=6, **settings)
    params, method = with_adapter(tuned, model, base)
    ours = sum(leaf.size for leaf in jax.tree.leaves(jaxft.partition(params, method.mask(params))[0]))
    assert ours == sum(leaf.numel() for leaf in tuned.parameters() if leaf.requires_grad)
    check_losses(our_losses(model, params, method), torch_losses(tuned))
