"""jaxft against transformers' Trainer (with PEFT for LoRA) on sentiment of the bundled reviews by MiniLM: examples a second, accuracy.

    python benchmarks/encoders.py [--seeds N] [--epochs N] [--output FOLDER] [--quick]

Both train full_bert_sentiment's model and data, whole and by LoRA on queries and values, by AdamW with the same rate, schedule, decay and
examples a step on average; jaxft takes packed rows, the Trainer batches of its own, padded to the longest, in random order and by length
(`group_by_length`): the faster one counts. A side is a process of its own, one after the other, seed by seed; nothing else should run on
the machine. Both clocks run from the end of the fifth step to the end of the last, so compilation and evaluation are excluded, and all else
between steps is in. The two sides agree where their mean accuracies are no further apart than twice the error of their difference.

Needs jaxft's extra `benchmark`. Writes encoders.json and encoders.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import machine
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "peft", "accelerate", "torch", "numpy")
METHODS = ("full", "lora")
SIDES = {
    "jaxft": ("encoders_jaxft.py", {}),
    "Trainer, random order": ("encoders_trainer.py", {"by_length": False}),
    "Trainer, group_by_length": ("encoders_trainer.py", {"by_length": True}),
}


def main() -> None:
    """Runs all sides and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: whether it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    seeds, epochs = (1, 0.25) if options.quick else (options.seeds, options.epochs)
    runs: list[dict[str, Any]] = []
    for method in METHODS:
        for seed in range(seeds):
            for name, (script, settings) in SIDES.items():
                job = {"method": method, "seed": seed, "epochs": epochs, **settings}
                runs.append({"side": name, **job, **side(script, job)})
                print(json.dumps(runs[-1]), flush=True)
    command = " ".join(["python benchmarks/encoders.py", *sys.argv[1:]])
    report = {"command": command, "machine": machine.describe(PACKAGES), "epochs": epochs, "runs": runs, "summary": summarize(runs)}
    text = render(report)
    print(text)
    (options.output / "encoders.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "encoders.md").write_text(text)


def side(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Returns what one side measured, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "out.json"
        given.write_text(json.dumps(job))
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))  # where the experiments are
        command = [sys.executable, str(HERE / script), str(given), str(out)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means and deviations over seeds by method and side, how fast jaxft is beside the faster way of the Trainer in the same seed,
    and whether its accuracy agrees with that way's.
    """
    found: dict[str, Any] = {}
    for method in METHODS:
        of = {name: [run for run in runs if run["side"] == name and run["method"] == method] for name in SIDES}
        for name, own in of.items():
            values = {key: [run[key] for run in own] for key in ("examples_per_second", "accuracy", "macro_f1", "peak_memory_bytes")}
            found[f"{method}, {name}"] = {key: [float(np.mean(one)), deviation(one)] for key, one in values.items()}
        ours, *theirs = of.values()
        fastest = [max(same, key=lambda run: run["examples_per_second"]) for same in zip(*theirs, strict=True)]
        ratios = [run["examples_per_second"] / other["examples_per_second"] for run, other in zip(ours, fastest, strict=True)]
        accuracies = [[run["accuracy"] for run in side] for side in (ours, fastest)]
        apart = abs(float(np.mean(accuracies[0]) - np.mean(accuracies[1])))
        error = float(np.sqrt(sum(deviation(side) ** 2 / len(side) for side in accuracies)))
        found[f"{method}, ratio"] = {"mean": float(np.mean(ratios)), "least": min(ratios), "most": max(ratios)}
        found[f"{method}, ratio"] |= {"accuracies_apart": apart, "error": error, "agree": apart <= 2 * error if len(ours) > 1 else None}
    return found


def deviation(values: list[float]) -> float:
    """Returns the standard deviation of a sample; 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    lines = ["# Encoders: jaxft and transformers' Trainer", "", f"    {report['command']}", ""]
    lines += [f"{key}: {value}  " for key, value in report["machine"].items()]
    seeds = len({run["seed"] for run in report["runs"]})
    lines += ["", f"{report['epochs']} epochs; mean (standard deviation) over {seeds} seeds, or the one run's figure.", ""]
    lines += ["| method | side | examples/s | test accuracy | macro F1 | peak memory, GB |", "|---|---|---:|---:|---:|---:|"]
    agreement = []
    for key, one in report["summary"].items():
        method, _, name = key.partition(", ")
        if name == "ratio":
            lines.append(f"| {method} | jaxft / faster Trainer | {one['mean']:.2f} ({one['least']:.2f} to {one['most']:.2f}) | | | |")
            apart = f"{method}: accuracies are {100 * one['accuracies_apart']:.1f} points apart, the difference's error is "
            word = {True: "they agree", False: "they do not agree", None: "one run says nothing of it"}[one["agree"]]
            agreement.append(f"{apart}{100 * one['error']:.1f}: {word}.  ")
            continue
        speed, accuracy, f1, memory = (one[part] for part in ("examples_per_second", "accuracy", "macro_f1", "peak_memory_bytes"))
        cells = [f"{speed[0]:.1f} ({speed[1]:.1f})", *(f"{100 * part[0]:.1f}% ({100 * part[1]:.1f})" for part in (accuracy, f1))]
        lines.append(f"| {method} | {name} | {' | '.join(cells)} | {memory[0] / 1e9:.2f} |")
    return "\n".join([*lines, "", *agreement]) + "\n"


if __name__ == "__main__":
    main()
