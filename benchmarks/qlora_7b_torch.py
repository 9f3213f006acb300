"""PEFT's side of benchmarks/qlora_7b.py, on a base that bitsandbytes quantizes as it is read: `python qlora_7b_torch.py JOB.json`.

Trains on the job's rows, one example a row, with gradient checkpointing, and prints seconds and bytes as JSON: in bfloat16 on a GPU, in
float32 on CPU.
"""

import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import bitsandbytes
import machine
import numpy as np
import peft
import torch
import transformers

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def load(job: dict[str, Any]) -> peft.PeftModel:
    """Returns the model, its linear layers but the head in double-quantized NF4, with a new LoRA beside each, in float32."""
    held = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=DTYPE, quantization_config=held, device_map={"": DEVICE}, attn_implementation="sdpa"
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = peft.LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Loads, trains and exports; returns seconds and bytes of each."""
    started = time.perf_counter()
    model = load(job).train()
    seconds = {"load": time.perf_counter() - started}
    loaded = machine.peak_memory_bytes()
    ids = torch.tensor(job["ids"], device=DEVICE)
    labels = torch.where(torch.tensor(job["scored"], device=DEVICE), ids, -100)
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(leaves, betas=job["betas"], eps=job["eps"], weight_decay=0.0, fused=True)
    losses, times = [], []
    for rate in job["rates"]:
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, job["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    seconds["step"] = float(np.median(times[1:] or times))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        model.save_pretrained(output)
    seconds["export"] = time.perf_counter() - started
    found = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "tokens": ids.numel(),
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds["step"],
        "peak_host_bytes": machine.peak_memory_bytes(),
        "peak_host_bytes_after_loading": loaded,
        "trainable_parameters": sum(leaf.numel() for leaf in leaves),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft, bitsandbytes)},
    }
    return found | ({"device": torch.cuda.get_device_name(), "peak_device_bytes": torch.cuda.max_memory_allocated()} if CUDA else {})


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    print(json.dumps(train(json.loads(pathlib.Path(sys.argv[1]).read_text()))))
