"""Runs of benchmarks/population.py, one or all: `python benchmarks/population_jaxft.py JOB.json OUT.json`, a process of its own."""

import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

import experiments
from jaxft.config import Experiment
from jaxft.methods import LoRA
from jaxft.sweep import population, sizing
from jaxft.train import run
from jaxft.train.logs import peak_memory_bytes

RATES, ALPHAS = (3e-4, 1e-3, 3e-3, 1e-2), (16.0, 32.0)  # of runs 0, 1, ...; the seed is 0 for the first four, 1 for the next
MODELS = {"encoder": ("ablation_methods", ("attention/(query|value)",)), "decoder": ("lora_llama2", ("q_proj", "v_proj"))}


def experiment(job: dict[str, Any], number: int) -> Experiment:
    """Returns one of the runs."""
    name, targets = MODELS[job["model"]]
    found = experiments.load(name)
    train = dataclasses.replace(found.train, batch_size=job["batch_size"], seed=number // 4)
    if job["steps"]:
        train = dataclasses.replace(train, steps=job["steps"], eval_every=0)
    method = LoRA(rank=8, alpha=ALPHAS[number // 2 % 2], targets=targets)
    optimizer = dataclasses.replace(found.optimizer, learning_rate=RATES[number % 4])
    evaluation = dataclasses.replace(found.eval, generate=False, limit=8 if job["steps"] else found.eval.limit)
    return dataclasses.replace(found, method=method, train=train, optimizer=optimizer, eval=evaluation)


def main(job_file: str, out_file: str) -> None:
    """Trains, and writes what it took."""
    job = json.loads(pathlib.Path(job_file).read_text())
    numbers = range(job["runs"]) if job["only"] is None else [job["only"]]
    runs = [experiment(job, number) for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        folders = [pathlib.Path(folder) / str(number) for number in numbers]
        if job["only"] is None:
            found = population.train_population(runs, folders, places=job["places"])
        else:
            found = [run.train(runs[0], folders[0])]
        tokens = 64 * -(-runs[0].data.max_length // 64) * job["batch_size"]
    if any("steps" not in one for one in found):
        sys.exit(f"A run came to no end: {found}")
    figures = {"compile_seconds": sum(one["compile_seconds"] for one in found), "peak_memory_bytes": peak_memory_bytes()}
    figures |= {"steps": found[0]["steps"], "losses": [one["train_loss"] for one in found]}
    figures |= {"places": min(job["places"] or sizing.side_by_side(tokens), len(runs))}
    pathlib.Path(out_file).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
