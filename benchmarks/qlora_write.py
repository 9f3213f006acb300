"""The 4-bit base of benchmarks/qlora.py for the side that isn't jaxft: `python benchmarks/qlora_write.py JOB.json`.

Writes the job's model as bitsandbytes holds it, with the very codes that jaxft trains beside.
"""

import sys

import sft_job

import jaxft
from jaxft.hub.tokenizer import load_tokenizer

FOLDER = "model_in_4_bits"

if __name__ == "__main__":
    job = sft_job.Job.read(sys.argv[1])
    source = str(job.path("model"))
    model, params = sft_job.base_model(job, source)
    jaxft.save_pretrained(job.path(FOLDER), model, params, load_tokenizer(source), format="bitsandbytes")
