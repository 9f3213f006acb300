"""The same training in torch and in jaxft: first gradients, and twenty steps of AdamW."""

import jax
import numpy as np
import torch
from evaluation_batches import evaluation_batches
from lenient_optax import lenient, make_optimizer
from tiny_models import make_examples
from torch_loss import torch_loss as reference_loss

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.tasks import SFT
from jaxft.train.state import new_state
from jaxft.train.step import make_step

STEPS, LEARNING_RATE, CLIP = 20, 3e-3, 1.0
EXAMPLES = make_examples([21, 9, 14, 30], answer=6)
CONFIG = OptimizerConfig(schedule="constant", warmup=0, learning_rate=LEARNING_RATE, weight_decay=0.0, clip_norm=CLIP)


def torch_loss(model):
    """The mean over all scored tokens of four padded rows, by torch."""
    return reference_loss(model, EXAMPLES)


def packed_rows():
    """Returns the same examples in two packed rows."""
    (batch,) = evaluation_batches(EXAMPLES, DataConfig(max_length=64), 2, False)
    return batch


def torch_gradients(model):
    """Returns the loss, and the gradient of each parameter that trains, by name."""
    loss = torch_loss(model)
    loss.backward()
    found = {name.replace(".default", ""): leaf.grad.numpy().copy() for name, leaf in model.named_parameters() if leaf.requires_grad}
    model.zero_grad()
    return float(loss.detach()), found


def our_gradients(model, params, method):
    """Returns the loss, and the gradients in the places of the trainable leaves, None in those of the frozen."""
    trainable, frozen = jaxft.partition(params, method.mask(params))
    batch = packed_rows()

    def mean(trainable, frozen):
        sums = SFT().sums(model, jaxft.combine(trainable, frozen), batch, {})
        return sums.loss / sums.weight

    loss, gradients = jax.jit(jax.value_and_grad(mean))(trainable, frozen)
    return float(loss), gradients


def torch_losses(model, groups=None, make=torch.optim.AdamW, before=lambda optimizer, step: None):
    """Returns the losses of twenty steps of torch's AdamW, or another, on the model, which it changes.

    `groups` are parameters with rates; without them all train that can at the start. `before` is called before each step.
    """
    leaves = list(model.parameters())
    optimizer = make(groups or [leaf for leaf in leaves if leaf.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        before(optimizer, step)
        optimizer.zero_grad()
        loss = torch_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def our_losses(model, params, method, config=CONFIG):
    """Returns the losses of the same twenty steps by jaxft."""
    trainable, frozen = jaxft.partition(params, method.mask(params))
    optimizer = lenient(method.optimizer(make_optimizer(config, STEPS), STEPS))
    state, losses = new_state(trainable, optimizer), []
    step = jax.jit(make_step(model, SFT(), optimizer, seed=0, penalty=method.penalty))
    batch = {name: array[None] for name, array in packed_rows().items()}
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


def check_losses(found, expected):
    """Raises unless both learn and every step's loss is the same to 1e-4."""
    assert expected[-1] < expected[0] - 0.02
    assert np.abs(np.subtract(found, expected)).max() <= 1e-4


def check_gradients(found, expected):
    """Raises unless each named gradient agrees to a relative 1e-4."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, name
        relative = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert relative <= 1e-4, (name, relative)
