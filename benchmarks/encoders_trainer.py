"""The Trainer's side of benchmarks/encoders.py: `python benchmarks/encoders_trainer.py JOB.json OUT.json`, a process of its own."""

import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import datasets
import machine
import numpy as np
import peft
import sklearn.metrics
import torch
import transformers

import experiments
from jaxft.data.sources import load_splits
from jaxft.hub.sources import find

RATES = {"full": 5e-5, "lora": 1e-3}
BATCH = 9  # examples a step: jaxft's four packed rows hold 9 on average
WARMUP = 5  # steps that aren't timed


class Recorder(transformers.TrainerCallback):
    """The time at each step's end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())


def main(job_file: str, out_file: str) -> None:
    """Trains, measures on the test set, and writes the figures."""
    job = json.loads(pathlib.Path(job_file).read_text())
    transformers.set_seed(job["seed"])
    data = experiments.load("full_bert_sentiment").data
    rows, folder = load_splits(data, job["seed"]), str(find("bundled:minilm-l6", "", ()).folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    labels = sorted(set(rows["train"].dataset["rating"]))
    sets = {name: encoded(rows[name].dataset, tokenizer, labels, data.max_length) for name in ("train", "test")}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    if job["method"] == "lora":
        config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["pooler"])
        model = peft.get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as output:
        recorder = Recorder()
        arguments = transformers.TrainingArguments(
            output_dir=output,
            num_train_epochs=job["epochs"],
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=32,
            learning_rate=RATES[job["method"]],
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=job["seed"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="group_by_length" if job["by_length"] else "random",
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=sets["train"], data_collator=collator, callbacks=[recorder]
        )
        trainer.train()
        logits = trainer.predict(sets["test"]).predictions
    true, steps = np.asarray(sets["test"]["label"]), len(recorder.ends)
    seconds, whole = recorder.ends[-1] - recorder.ends[WARMUP - 1], len(sets["train"]) % BATCH
    last = sum(1 for step in range(WARMUP, steps) if (step + 1) % -(-len(sets["train"]) // BATCH) == 0)  # batches that an epoch's end cuts
    examples = (steps - WARMUP) * BATCH - (last * (BATCH - whole) if whole else 0)
    loss = float(torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(true)))
    figures = {
        "examples_per_second": examples / seconds,
        "steps": steps,
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "accuracy": float((logits.argmax(1) == true).mean()),
        "macro_f1": float(sklearn.metrics.f1_score(true, logits.argmax(1), average="macro", zero_division=0)),
        "loss": loss,
    }
    pathlib.Path(out_file).write_text(json.dumps(figures))


def encoded(rows: datasets.Dataset, tokenizer: Any, labels: list[str], max_length: int) -> datasets.Dataset:
    """Returns the rows as the Trainer takes them."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(row["text"], truncation=True, max_length=max_length)
        return {**found, "label": labels.index(row["rating"])}

    return rows.map(encode, remove_columns=rows.column_names)


if __name__ == "__main__":
    main(*sys.argv[1:])
