"""jaxft's side of benchmarks that train a recipe: `python benchmarks/train_jaxft.py JOB.json OUT.json`, a process of its own."""

import json
import pathlib
import sys

import sft_jaxft
import sft_job

if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(json.dumps(sft_jaxft.train(sft_job.Job.read(sys.argv[1])).measured))
