"""jaxft's side of benchmarks/sft.py: `python benchmarks/sft_jaxft.py JOB.json OUT.json`, a process of its own."""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import machine
import sft_floor
import sft_job

import jaxft
from jaxft.train.optimizer import make_optimizer
from jaxft.train.state import new_state
from jaxft.train.step import make_step


def run(job: sft_job.Job) -> dict[str, Any]:
    """Trains the job as the trainer does, then measures the floor of its step and where the step's time goes."""
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    config = sft_job.experiment(job)
    batches = sft_job.training_batches(job, str(job.path("model")))
    model, params, method = sft_job.initial_parameters(job, str(job.path("model")))
    trainable, frozen = jaxft.partition(params, method.mask(params))
    del params
    optimizer = make_optimizer(config.optimizer, job.steps)
    state = new_state(trainable, optimizer)
    del trainable
    step = jax.jit(make_step(model, config.task, optimizer, job.seed), donate_argnums=0)
    loaded = machine.peak_memory_bytes()
    started = time.perf_counter()
    compiled = step.lower(state, frozen, dict(batches.batch(0))).compile()
    compile_seconds = time.perf_counter() - started
    losses, seconds = [], []
    for number in range(job.steps):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, jax.device_put(dict(batches.batch(number))))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    peak = machine.peak_memory_bytes()
    batch = jax.device_put(dict(batches.batch(0)))
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens": [batches.real_tokens(number) for number in range(job.steps)],
        "computed_tokens": [batches.computed_tokens(number) for number in range(job.steps)],
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak,
        "peak_memory_bytes_before_training": loaded,
        "memory_analysis": _memory(compiled),
        "batch": {"rows": batch["tokens"].shape[1], "tokens_per_row": batch["tokens"].shape[2], "scored_slots": batch["scored"].shape[2]},
        "prefix_tokens": batches.layout.prefix,
        "packing_efficiency": batches.efficiency,
        "floor": sft_floor.floor(model.config, batch, job.rank),
        "profile": sft_floor.profile(compiled, state, frozen, batch),
        "remat": config.train.remat,
        "imported_torch": "torch" in sys.modules,
    }


def _memory(compiled: Any) -> dict[str, int]:
    """What XLA says the step takes."""
    analysis = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    return {name: getattr(analysis, name) for name in names if hasattr(analysis, name)}


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(json.dumps(run(sft_job.Job.read(sys.argv[1]))))
