"""TRL's side of benchmarks/sft.py: `python benchmarks/sft_trl.py JOB.json OUT.json VARIANT.json`, a process of its own."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import datasets
import machine
import numpy as np
import peft
import sft_job
import torch
import transformers
import trl

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of running TRL. Where `order` is ours, its steps hold exactly our steps' examples."""

    name: str
    dtype: str = "float32"  # bfloat16: TRL's `bf16=True`, autocast over parameters of `parameters`
    parameters: str = "float32"  # the type that the base model is held in
    attention: str = "sdpa"
    padding_free: bool = False  # examples one after the other in one row, attention within each: exact
    micro_batches: str = "step"  # the examples of a step at once; row: a packed row of ours at a time; length: two halves by length
    order: str = "ours"  # random, group_by_length: TRL's own sampling of batches of exactly 8
    compile: bool = False  # torch.compile, with lengths padded to a multiple of 64
    gradient_checkpointing: bool = False
    warmup: int = 1  # steps that aren't timed


class RecordedTrainer(trl.SFTTrainer):
    """SFTTrainer with a given plan of micro-batches, and a record of each step's loss and example tokens."""

    plan: list[list[int]] | None = None

    def get_train_dataloader(self) -> Any:
        if self.plan is None:
            return super().get_train_dataloader()
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=self.plan, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.recorder.tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self.recorder.slots[-1] += int(inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.recorder.losses[-1] += float(loss)
        return loss


class Recorder(transformers.TrainerCallback):
    """Times each step from the end of the one before: reading the batch and all that the trainer does are part of it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []  # that are not padding
        self.slots: list[int] = []  # padding included
        self.last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.losses.append(0.0)
        self.tokens.append(0)
        self.slots.append(0)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def run(job: sft_job.Job, variant: Variant) -> dict[str, Any]:
    """Trains the job and returns what was measured."""
    plan = sft_job.Plan.read(job)
    micro, accumulation = _micro_batches(plan, variant, job.steps)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.path("model"), dtype=_DTYPES[variant.parameters], attn_implementation=variant.attention
    )
    model = peft.PeftModel.from_pretrained(model, job.path("adapter"), is_trainable=True)
    recorder = Recorder()
    trainer = RecordedTrainer(
        model=model,
        args=_arguments(job, variant, accumulation, plan.optimizer),
        train_dataset=_dataset(plan),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.path("model")),
        callbacks=[recorder],
    )
    trainer.plan, trainer.recorder = micro, recorder
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return {
        "variant": dataclasses.asdict(variant),
        "losses": recorder.losses,
        "seconds": recorder.seconds,
        "tokens": recorder.tokens,
        "slots": recorder.slots,
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "threads": torch.get_num_threads(),
        "imported_jax": "jax" in sys.modules,
    }


def _dataset(plan: sft_job.Plan) -> datasets.Dataset:
    """The examples as TRL holds them once it has tokenized: -100 stands for a token that isn't scored."""
    labels = [np.where(scored, tokens, -100).tolist() for tokens, scored in zip(plan.tokens, plan.scored, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": [tokens.tolist() for tokens in plan.tokens], "labels": labels})


def _micro_batches(plan: sft_job.Plan, variant: Variant, steps: int) -> tuple[list[list[int]] | None, int]:
    """The examples of every micro-batch, or None for TRL's own sampling, and the micro-batches a step."""
    if variant.order != "ours":
        return None, 1
    micro = [_CUTS[variant.micro_batches](plan, rows) for rows in plan.rows[:steps]]
    counts = {len(cut) for cut in micro}
    if len(counts) != 1:
        raise ValueError(f"Every step must have the same number of micro-batches, not {sorted(counts)}.")
    return [batch for cut in micro for batch in cut], counts.pop()


def _whole(plan: sft_job.Plan, rows: list[list[int]]) -> list[list[int]]:
    return [[i for row in rows for i in row]]


def _by_row(plan: sft_job.Plan, rows: list[list[int]]) -> list[list[int]]:
    return rows


def _by_length(plan: sft_job.Plan, rows: list[list[int]]) -> list[list[int]]:
    examples = sorted((i for row in rows for i in row), key=lambda i: len(plan.tokens[i]))
    half = len(examples) // 2
    return [examples[:half], examples[half:]]


_CUTS: dict[str, Callable[[sft_job.Plan, list[list[int]]], list[list[int]]]] = {"step": _whole, "row": _by_row, "length": _by_length}


def _arguments(job: sft_job.Job, variant: Variant, accumulation: int, optimizer: dict[str, Any]) -> trl.SFTConfig:
    return trl.SFTConfig(
        output_dir=str(job.path("trl")),
        max_steps=job.steps,
        per_device_train_batch_size=job.examples_per_step if variant.order != "ours" else 1,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy=variant.order if variant.order != "ours" else "sequential",
        learning_rate=optimizer["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=optimizer["b1"],
        adam_beta2=optimizer["b2"],
        adam_epsilon=optimizer["eps"],
        weight_decay=0.0,
        max_grad_norm=optimizer["clip_norm"],
        bf16=variant.dtype == "bfloat16",
        use_cpu=True,
        max_length=None,  # no example is longer than a row of ours
        padding_free=variant.padding_free,
        pad_to_multiple_of=64 if variant.compile else None,
        gradient_checkpointing=variant.gradient_checkpointing,
        torch_compile=variant.compile,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    result = run(sft_job.Job.read(sys.argv[1]), Variant(**json.loads(pathlib.Path(sys.argv[3]).read_text())))
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result))
