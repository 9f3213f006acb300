"""Training virtual tokens against peft and torch: gradients of every leaf, twenty steps of AdamW, greedy text."""

import functools

import jax
import numpy as np
import peft
import pytest
import torch
from evaluation_batches import evaluation_batches
from lenient_optax import make_optimizer
from tiny_models import make_examples, make_pair, moved, same_bits
from torch_loss import torch_loss

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.generation import Sampling, generate
from jaxft.methods import Prefix, PTuning
from jaxft.methods import Prompt as PromptTuning
from jaxft.tasks import SFT
from jaxft.train.state import new_state
from jaxft.train.step import make_step

STEPS, LEARNING_RATE, TOKENS = 20, 3e-3, 5
EXAMPLES = make_examples([21, 9, 14, 30], answer=6)
PAIRS = {  # our method, its counterpart in peft, the family
    "prefix": (Prefix(TOKENS), peft.PrefixTuningConfig, {}, "mistral"),
    "projected prefix": (
        Prefix(TOKENS, projection=True, projection_hidden=7),
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 7},
        "llama",
    ),
    "prompt": (PromptTuning(TOKENS), peft.PromptTuningConfig, {}, "qwen2"),
    "mlp": (PTuning(TOKENS, hidden_size=12), peft.PromptEncoderConfig, {"encoder_hidden_size": 12}, "llama"),
    "lstm": (
        PTuning(TOKENS, encoder="lstm", hidden_size=6),
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6},
        "llama",
    ),
}


def dense(layer, name):
    kernel = np.asarray(layer.kernel)
    return {f"{name}.weight": kernel.reshape(len(kernel), -1).T, f"{name}.bias": np.asarray(layer.bias).reshape(-1)}


def as_torch(node):
    """Returns the node's leaves under the names of peft's encoder."""
    found = {"embedding.weight": np.asarray(node.embedding).reshape(TOKENS, -1)}
    if hasattr(node, "hidden"):
        found |= dense(node.hidden, "transform.0") | dense(node.output, "transform.2")
    for number, layer in enumerate(getattr(node, "mlp", ())):
        found |= dense(layer, f"mlp_head.{2 * number}")
    for number, both in enumerate(getattr(node, "lstm", ())):
        for way, lstm in (("", both.forward), ("_reverse", both.backward)):
            for field in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                found[f"lstm_head.{field}_l{number}{way}"] = np.asarray(getattr(lstm, field)).T
    return found


class Pair:
    """The same virtual tokens on the same base in peft and in jaxft, which sees the examples in packed rows."""

    def __init__(self, name):
        self.method, kind, settings, family = PAIRS[name]
        reference, self.model, base = make_pair(family, **({"sliding_window": 9} if family == "mistral" else {}))
        self.params = moved(self.method, self.model, base, 0.1)
        self.tuned = peft.get_peft_model(reference, kind(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **settings)).eval()
        (self.site,) = set(self.params) - set(base)
        encoder = self.tuned.prompt_encoder["default"]
        encoder.load_state_dict({name: torch.tensor(value.copy()) for name, value in as_torch(self.params[self.site]).items()})
        self.leaves = dict(encoder.named_parameters())
        self.trainable, self.frozen = jaxft.partition(self.params, self.method.mask(self.params))
        (self.rows,) = evaluation_batches(EXAMPLES, DataConfig(max_length=64), 2, False)


@functools.cache
def pair_of(name):
    return Pair(name)


@functools.cache
def trained(name):
    """Returns losses of twenty steps, of peft and of jaxft, and jaxft's first and last state."""
    pair = Pair(name)
    config = OptimizerConfig(schedule="constant", warmup=0, learning_rate=LEARNING_RATE, weight_decay=0.0, clip_norm=1.0)
    ours = make_optimizer(config, STEPS)
    first = state = new_state(pair.trainable, ours)
    step = jax.jit(make_step(pair.model, SFT(), ours, seed=0))
    theirs = torch.optim.AdamW(pair.leaves.values(), lr=LEARNING_RATE, weight_decay=0.0)
    losses, their_losses = [], []
    for _ in range(STEPS):
        state, metrics = step(state, pair.frozen, {key: array[None] for key, array in pair.rows.items()})
        losses.append(float(metrics["loss"]))
        theirs.zero_grad()
        loss = torch_loss(pair.tuned, EXAMPLES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.leaves.values(), 1.0)
        theirs.step()
        their_losses.append(float(loss.detach()))
    return their_losses, losses, first, state, pair


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients_of_every_leaf_are_those_of_peft(name):
    pair = pair_of(name)
    expected = torch_loss(pair.tuned, EXAMPLES)
    gradients = dict(zip(pair.leaves, torch.autograd.grad(expected, list(pair.leaves.values())), strict=True))

    def mean(trainable):
        sums = SFT().sums(pair.model, jaxft.combine(trainable, pair.frozen), pair.rows, {})
        return sums.loss / sums.weight

    loss, found = jax.jit(jax.value_and_grad(mean))(pair.trainable)
    found = as_torch(found[pair.site])
    assert abs(float(loss) - float(expected)) <= 1e-5 * float(expected)  # float32 rounding of a mean
    assert found.keys() == gradients.keys()
    for leaf, gradient in gradients.items():
        assert np.linalg.norm(gradient) > 0, leaf
        relative = np.linalg.norm(found[leaf] - gradient.numpy()) / np.linalg.norm(gradient)
        assert relative <= 1e-4, (leaf, relative)


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_steps_have_the_losses_of_torch(name):
    expected, found, *_ = trained(name)
    assert expected[-1] < expected[0] - 0.01  # it learns
    assert np.abs(np.subtract(found, expected)).max() <= 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_training_moves_the_virtual_tokens_and_nothing_else(name):
    *_, first, last, pair = trained(name)
    after = jaxft.combine(last.trainable, pair.frozen)
    assert same_bits(jaxft.partition(after, pair.method.mask(after))[1], jaxft.partition(pair.params, pair.method.mask(pair.params))[1])
    for before, now in zip(jax.tree.leaves(first.trainable), jax.tree.leaves(last.trainable), strict=True):
        assert now.dtype == np.float32
        assert np.any(np.asarray(before) != np.asarray(now))
    size = sum(leaf.size for leaf in jax.tree.leaves(first.trainable))
    assert size == sum(leaf.size for leaf in jax.tree.leaves(pair.params[pair.site]))
    assert sum(leaf.size for leaf in jax.tree.leaves(last.optimizer) if leaf.ndim) == 2 * size  # AdamW's two moments


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_greedy_text_is_that_of_peft(name):
    pair = pair_of(name)
    prompt = np.random.default_rng(4).integers(1, 97, 8).astype(np.int32)
    (found,) = generate(pair.model, pair.params, [prompt], Sampling(max_new_tokens=8), batch_size=1)
    ids = torch.tensor(prompt[None].astype(np.int64))
    with torch.no_grad():  # without peft's generate, which loses the virtual tokens from transformers 5.24 on
        for _ in range(8):
            logits = pair.tuned(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], axis=1)
    assert found.tolist() == ids[0, -8:].tolist()
