"""jaxft's side of benchmarks/encoders.py: `python benchmarks/encoders_jaxft.py JOB.json OUT.json`, a process of its own."""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

import experiments
from jaxft.methods import Full, LoRA
from jaxft.train.checkpoint import Checkpoints, Progress
from jaxft.train.evaluate import Evaluator
from jaxft.train.logs import Logs, peak_memory_bytes
from jaxft.train.loop import Loop
from jaxft.train.setup import set_up

METHODS = {"full": Full(), "lora": LoRA(rank=8, alpha=16.0, targets=("attention/(query|value)",))}
RATES = {"full": 5e-5, "lora": 1e-3}
WARMUP = 5  # steps that aren't timed


def main(job_file: str, out_file: str) -> None:
    """Trains, measures on the test set, and writes the figures."""
    job = json.loads(pathlib.Path(job_file).read_text())
    found = experiments.load("full_bert_sentiment")
    experiment = dataclasses.replace(
        found,
        method=METHODS[job["method"]],
        train=dataclasses.replace(found.train, epochs=job["epochs"], seed=job["seed"], eval_every=0, checkpoint_every=10**6),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=RATES[job["method"]]),
    )
    setup = set_up(experiment)
    evaluator, ends = Evaluator(setup), step_ends()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        checkpoints = Checkpoints(workdir / "checkpoints", 1)
        outcome = Loop(setup, workdir, checkpoints, evaluator, 0.0).run(setup.state, Progress({}, "", {}))
        checkpoints.close()
    seconds, timed = ends[-1] - ends[WARMUP - 1], range(WARMUP, setup.steps)
    examples, tokens = (sum(map(count, timed)) for count in (lambda step: len(setup.batches.examples_of(step)), setup.batches.real_tokens))
    metrics = evaluator.measure(outcome.state, setup.examples["test"]).metrics
    figures = {"examples_per_second": examples / seconds, "tokens_per_second": tokens / seconds, "steps": setup.steps}
    figures |= {"examples_a_step": float(np.mean([len(setup.batches.examples_of(step)) for step in range(setup.steps)]))}
    figures |= {"compile_seconds": outcome.compile_seconds, "peak_memory_bytes": peak_memory_bytes(), "device": jax.devices()[0].platform}
    pathlib.Path(out_file).write_text(json.dumps(figures | {name: metrics[name] for name in ("accuracy", "macro_f1", "loss")}))


def step_ends() -> list[float]:
    """Returns a list that gets the time of each step's end from now on, as the Trainer's callback gives it."""
    ends, advance = [], Logs.advance

    def noted(logs: Logs, loss: float, rate: float) -> None:
        ends.append(time.perf_counter())
        advance(logs, loss, rate)

    Logs.advance = noted
    return ends


if __name__ == "__main__":
    main(*sys.argv[1:])
