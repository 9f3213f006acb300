"""LoRA's training against peft and torch: losses, gradients, and twenty steps of AdamW."""

import functools
import tempfile

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from lenient_optax import make_optimizer
from tiny_models import make_examples, make_pair, with_adapter

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.data.batches import evaluation_batches
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
EXAMPLES = make_examples([21, 9, 14, 30], answer=6)


def batch(packing):
    """Returns all examples, (1, batch, length)."""
    (found,) = evaluation_batches(EXAMPLES, DataConfig(max_length=64, packing=packing), 2 if packing else 4, False)
    return {name: array[None] for name, array in found.items()}


def torch_loss(tuned):
    """The mean over all scored tokens of four padded rows, by torch."""
    longest = int(EXAMPLES.lengths.max())
    ids, mask, labels = (np.full((len(EXAMPLES), longest), fill) for fill in (0, 0, -100))
    for i in range(len(EXAMPLES)):
        tokens, scored = EXAMPLES[i]
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, : len(tokens)] = np.where(scored, tokens, -100)
    ids, mask, labels = (torch.tensor(array) for array in (ids, mask, labels))
    return tuned(ids, attention_mask=mask, labels=labels).loss  # transformers shifts the labels


def make_tuned(reference, **settings):
    """Returns a model of peft, both sides of its adapter random."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return tuned.eval()


@functools.cache
def trained(name):
    """Trains both for STEPS; returns what each saw on the way.

    (losses, first gradients, final leaves) of peft, and the same of jaxft for packed rows; leaves by their names in adapter files.
    """
    reference, model, base = make_pair("llama")
    tuned = make_tuned(reference, **ADAPTERS[name])
    params, method = with_adapter(tuned, model, base)
    names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    theirs = _train_peft(tuned, names)
    ours = _train_jaxft(model, params, method)
    return theirs, ours


def _train_peft(tuned, names):
    leaves = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=LEARNING_RATE, weight_decay=DECAY)
    losses, first = [], None
    for _ in range(STEPS):
        loss = torch_loss(tuned)
        optimizer.zero_grad()
        loss.backward()
        first = first or _by_name(names, [leaf.grad for leaf in leaves])
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, first, _by_name(names, leaves)


def _by_name(names, tensors):
    return {name.replace(".default", ""): tensor.detach().numpy().copy() for name, tensor in zip(names, tensors, strict=True)}


def _train_jaxft(model, params, method):
    trainable, frozen = jaxft.partition(params, method.mask(params))

    def named(leaves):
        with tempfile.TemporaryDirectory() as folder:
            jaxft.save_adapter(f"{folder}/a", model, jaxft.combine(leaves, frozen), method)
            return safetensors.numpy.load_file(f"{folder}/a/adapter_model.safetensors")

    rows = batch(packing=True)

    def loss(trainable):
        sums = SFT().sums(model, jaxft.combine(trainable, frozen), {key: value[0] for key, value in rows.items()}, {})
        return sums.loss / sums.weight

    first = named(jax.jit(jax.grad(loss))(trainable))
    config = OptimizerConfig(schedule="constant", warmup=0, learning_rate=LEARNING_RATE, weight_decay=DECAY, clip_norm=CLIP)
    optimizer = make_optimizer(config, STEPS)
    state, step = new_state(trainable, optimizer), jax.jit(make_step(model, SFT(), optimizer, seed=0))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics["loss"]))
    return losses, first, named(state.trainable)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_first_loss_is_that_of_peft(name):
    theirs, ours = trained(name)
    assert abs(ours[0][0] - theirs[0][0]) <= 1e-5 * theirs[0][0]  # float32 rounding of a mean


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_every_leaf_are_those_of_peft(name):
    theirs, ours = trained(name)
    assert theirs[1].keys() == ours[1].keys()
    for leaf, expected in theirs[1].items():
        assert np.linalg.norm(expected) > 0, leaf
        relative = np.linalg.norm(ours[1][leaf] - expected) / np.linalg.norm(expected)
        assert relative <= 1e-4, (leaf, relative)  # the bound


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps_have_the_losses_of_torch(name):
    theirs, ours = trained(name)
    assert theirs[0][-1] < theirs[0][0] - 0.5  # it learns
    assert np.abs(np.subtract(ours[0], theirs[0])).max() <= 1e-4  # the bound


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps_end_at_the_adapter_of_torch(name):
    theirs, ours = trained(name)
    for leaf, expected in theirs[2].items():
        # AdamW divides by the gradient's size: where that is near rounding a leaf may move by a part of a step, 3e-3
        assert np.abs(ours[2][leaf] - expected).max() <= LEARNING_RATE / 10, leaf
