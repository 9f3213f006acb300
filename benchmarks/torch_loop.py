"""A training loop of torch with nothing in it but the model, its loss, and AdamW (fused), over the examples that jaxft's steps hold.

Each step's examples come in two halves by length, which is the fastest that benchmarks/sft.py finds for the same examples.
"""

import time
from typing import Any

import machine
import numpy as np
import sft_job
import torch
import transformers

PARTS = 2  # of a step's examples, by length


def batch(plan: sft_job.Plan, examples: list[int]) -> dict[str, torch.Tensor]:
    """Returns these examples as rows, padded on the right to the longest."""
    length = max(len(plan.tokens[i]) for i in examples)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    rows = {name: np.full((len(examples), length), fill, np.int64) for name, fill in fills.items()}
    for row, i in enumerate(examples):
        size = len(plan.tokens[i])
        rows["input_ids"][row, :size] = plan.tokens[i]
        rows["attention_mask"][row, :size] = 1
        rows["labels"][row, :size] = np.where(plan.scored[i], plan.tokens[i], -100)
    return {name: torch.from_numpy(array) for name, array in rows.items()}


def train(job: sft_job.Job, model: Any) -> dict[str, Any]:
    """Trains the parameters of `model` that ask for gradients, and returns what was measured."""
    plan = sft_job.Plan.read(job)
    model.train()
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    rates = plan.optimizer
    optimizer = torch.optim.AdamW(
        leaves, lr=rates["learning_rate"], betas=(rates["b1"], rates["b2"]), eps=rates["eps"], weight_decay=0.0, fused=True
    )
    budget = getattr(model, "update_and_allocate", None) or getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    losses, seconds, tokens = [], [], []
    for number, rows in enumerate(plan.rows[: job.steps]):
        started = time.perf_counter()
        examples = sorted((i for row in rows for i in row), key=lambda i: len(plan.tokens[i]))
        cuts = [part.tolist() for part in np.array_split(examples, PARTS)]
        scored = sum(int(plan.scored[i][1:].sum()) for i in examples)
        losses.append(0.0)
        for cut in cuts:
            loss = model(**batch(plan, cut), num_items_in_batch=scored).loss
            loss.backward()
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(leaves, rates["clip_norm"])
        optimizer.step()
        if budget:
            budget(number)
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        tokens.append(plan.own_tokens(examples))
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens": tokens,
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "trainable_parameters": sum(leaf.numel() for leaf in leaves),
        "transformers": transformers.__version__,
    }
