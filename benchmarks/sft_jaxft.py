"""jaxft's side of benchmarks/sft.py: `python benchmarks/sft_jaxft.py JOB.json OUT.json`, a process of its own."""

import dataclasses
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
from jaxft.hub.peft import adapter_format
from jaxft.methods.partition import size, size_in_bytes
from jaxft.train.optimizer import make_optimizer
from jaxft.train.state import new_state
from jaxft.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Trained:
    """A job after its last step, and what was measured."""

    measured: dict[str, Any]
    model: Any
    method: Any
    batches: Any
    compiled: Any
    state: Any
    frozen: Any


def train(job: sft_job.Job) -> Trained:
    """Trains the job as the trainer does; writes the adapter that it starts from, where the method has such."""
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    config, source = sft_job.experiment(job), str(job.path("model"))
    batches = sft_job.training_batches(job, source)
    model, params, method = sft_job.initial_parameters(job, source, batches)
    if adapter_format(method):
        jaxft.save_adapter(job.path("adapter"), model, params, method)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    counts = {"trainable_parameters": size(trainable), "total_parameters": size(params), "frozen_bytes": size_in_bytes(frozen)}
    del params
    optimizer = method.optimizer(make_optimizer(config.optimizer, config.train.steps), config.train.steps)
    state = new_state(trainable, optimizer)
    del trainable
    step = jax.jit(make_step(model, config.task, optimizer, job.seed, penalty=method.penalty), donate_argnums=0)
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
    measured = {
        "losses": losses,
        "seconds": seconds,
        "tokens": [batches.real_tokens(number) for number in range(job.steps)],
        "computed_tokens": [batches.computed_tokens(number) for number in range(job.steps)],
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "peak_memory_bytes_before_training": loaded,
        "memory_analysis": _memory(compiled),
        "remat": config.train.remat,
        "imported_torch": "torch" in sys.modules,
        **counts,
    }
    return Trained(measured, model, method, batches, compiled, state, frozen)


def run(job: sft_job.Job) -> dict[str, Any]:
    """Trains the job, then measures the floor of its step and where the step's time goes."""
    done = train(job)
    batch = jax.device_put(dict(done.batches.batch(0)))
    return done.measured | {
        "batch": {"rows": batch["tokens"].shape[1], "tokens_per_row": batch["tokens"].shape[2], "scored_slots": batch["scored"].shape[2]},
        "prefix_tokens": done.batches.layout.prefix,
        "packing_efficiency": done.batches.efficiency,
        "floor": sft_floor.floor(done.model.config, batch, done.method.rank),
        "profile": sft_floor.profile(done.compiled, done.state, done.frozen, batch),
    }


def _memory(compiled: Any) -> dict[str, int]:
    """What XLA says the step takes."""
    analysis = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    return {name: getattr(analysis, name) for name in names if hasattr(analysis, name)}


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(json.dumps(run(sft_job.Job.read(sys.argv[1]))))
