"""The reference's side of benchmarks/methods.py: `python benchmarks/methods_torch.py JOB.json OUT.json`, a process of its own."""

import json
import pathlib
import sys
from typing import Any

import sft_job
import torch
import torch_loop
import transformers

LAST, FINAL_NORM = 6, "model.norm.weight"  # layers that partial_llama2 trains, and what stands above them
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
            leaf.requires_grad_(job.recipe == "full_llama2" or name == FINAL_NORM or _in_last_layers(name, model.config.num_hidden_layers))
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


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    job = sft_job.Job.read(sys.argv[1])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(torch_loop.train(job, load(job))))
