"""The reference's side of benchmarks/methods.py: `python benchmarks/methods_torch.py JOB.json OUT.json`, a process of its own.

A loop of torch with nothing in it but the model, its loss, and AdamW (fused), over the examples that jaxft's steps hold: each step's in
two halves by length, which is the fastest that benchmarks/sft.py finds for the same examples.
"""

import json
import pathlib
import sys
import time
from typing import Any

import machine
import numpy as np
import sft_job
import torch
import transformers

PARTS = 2  # of a step's examples, by length
LAST = 6  # layers that partial_llama2 trains
BOTTLENECK = "bottleneck_llama2"  # AdapterHub's library, which pins an older transformers: an environment of its own
WITHOUT_ADAPTER = ("full_llama2", "partial_llama2")  # transformers alone


def load(job: sft_job.Job) -> Any:
    """Returns the model with the job's method, whose trainable parameters alone ask for gradients."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job.path("model"), dtype=torch.float32, attn_implementation="sdpa")
    adapter = str(job.path("adapter"))
    if job.recipe == BOTTLENECK:
        import adapters

        adapters.init(model)
        model.train_adapter(model.load_adapter(adapter, with_head=False, use_safetensors=True))
        return model
    if job.recipe in WITHOUT_ADAPTER:
        for name, leaf in model.named_parameters():
            leaf.requires_grad_(job.recipe == "full_llama2" or "norm" in name or _in_last_layers(name, model.config.num_hidden_layers))
        return model

    import peft

    if job.recipe == "pissa_llama2":
        return peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM")
        )
    if job.recipe == "ptuning_llama2":
        return peft.get_peft_model(model, peft.PromptEncoderConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"))
    config = peft.PeftConfig.from_pretrained(adapter)
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    config.inference_mode = False  # PEFT itself goes on with no training of virtual tokens
    model = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(adapter))
    return model


def _in_last_layers(name: str, layers: int) -> bool:
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers - LAST


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


def run(job: sft_job.Job) -> dict[str, Any]:
    """Trains the job and returns what was measured."""
    plan, model = sft_job.Plan.read(job), load(job)
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


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    pathlib.Path(sys.argv[2]).write_text(json.dumps(run(sft_job.Job.read(sys.argv[1]))))
