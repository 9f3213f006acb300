"""PEFT's side of benchmarks/qlora.py, on a base that bitsandbytes holds in 4 bits: `python benchmarks/qlora_torch.py JOB.json OUT.json`."""

import json
import pathlib
import sys

import peft
import sft_job
import torch
import torch_loop
import transformers

FOLDER = "model_in_4_bits"  # what qlora_write.py wrote


def load(job: sft_job.Job) -> peft.PeftModel:
    """Returns the 4-bit model with the adapter that jaxft starts from, which alone trains."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job.path(FOLDER), dtype=torch.float32, attn_implementation="sdpa")
    return peft.PeftModel.from_pretrained(model, str(job.path("adapter")), is_trainable=True)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    job = sft_job.Job.read(sys.argv[1])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(torch_loop.train(job, load(job))))
