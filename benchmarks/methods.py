"""Every method of jaxft against its reference on one fine-tuning job: speed and memory beside the share of the model that trains.

    python benchmarks/methods.py [--steps N] [--only METHOD ...] [--output FOLDER] [--quick]

Each method trains as its experiment has it, on the bundled model and reviews; the reference, PEFT's own (AdapterHub's for bottleneck
adapters, transformers alone where no adapter is added), takes exactly the same examples in each step, from the same start where it can,
by AdamW at the same constant rate. Each side is a process of its own, one after the other; nothing else should run on the machine.
Tokens are the examples' own, as in benchmarks/sft.py. Compilation and the first step are excluded, and given beside the rest.

Needs jaxft's extra `benchmark`. AdapterHub's library pins an older transformers: JAXFT_ADAPTERS_PYTHON names the Python of an environment
that has it (tests/hub/make_adapterhub.py says how one is made); without it, bottleneck adapters stand without their reference.
Writes methods.json, methods.md and methods.png.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import machine
import matplotlib
import numpy as np
import sft
import sft_job

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "peft", "transformers", "torch", "numpy")
BASELINE = "lora"
METHODS = {  # the name in tables, what it is compared with
    BASELINE: "PEFT",
    "rslora": "PEFT",
    "lora_plus": "PEFT",
    "pissa": "PEFT",
    "dora": "PEFT",
    "adalora": "PEFT",
    "vera": "PEFT",
    "ia3": "PEFT",
    "sparse_mask": "PEFT",
    "bottleneck": "AdapterHub",
    "prefix": "PEFT",
    "prompt": "PEFT",
    "ptuning": "PEFT",
    "norm_tuning": "PEFT",
    "partial": "transformers",
    "full": "transformers",
}
OTHER_LOSSES = {  # that can't agree, with the reason
    "pissa": "its SVD is randomized",
    "ptuning": "torch draws its encoder",
    "adalora": "PEFT adds the regularizer to each half of a step, jaxft to the step",
    "lora_plus": "the reference's loop has one rate",
    "full": "the reference's loop has one rate, not one a layer",
}
ADAPTERS_PYTHON = "JAXFT_ADAPTERS_PYTHON"


def main() -> None:
    """Runs both sides of every method and writes the report."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine.describe(PACKAGES), "steps": options.steps, "methods": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = sft_job.TINY if options.quick else sft_job.BUNDLED
        for number, name in enumerate(options.only):
            job = sft_job.Job(source, folder, options.steps, recipe=f"{name}_llama2")
            if not number:
                sft.side("sft_job.py", job, folder)
            report["methods"][name] = measure(name, job, folder)
            print(_line(name, report["methods"]), flush=True)
    text = render(report)
    print(text)
    (options.output / "methods.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "methods.md").write_text(text + "\n")
    plot(report, options.output / "methods.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods alone")
    return sft.parsed(parser, 4, "methods.json, methods.md and methods.png")


def measure(name: str, job: sft_job.Job, folder: str) -> dict[str, Any]:
    """Returns what both sides measured of one method; a reference that failed has an `error`."""
    found = {"jaxft": sft.side("train_jaxft.py", job, folder)}
    python = os.environ.get(ADAPTERS_PYTHON) if METHODS[name] == "AdapterHub" else sys.executable
    if not python:
        return found | {"reference": {"error": f"{ADAPTERS_PYTHON} isn't set"}}
    write_rate(job)
    try:
        reference = sft.side("methods_torch.py", job, folder, python=python)
    except RuntimeError as error:
        return found | {"reference": {"error": str(error)}}
    if reference["tokens"] != found["jaxft"]["tokens"]:
        raise RuntimeError(f"The two sides of {name} didn't train on the same tokens.")
    return found | {"reference": reference}


def write_rate(job: sft_job.Job) -> None:
    """Puts the recipe's optimizer into the plan, which was made with another's."""
    plan = json.loads(job.path("plan.json").read_text())
    plan["optimizer"] = dataclasses.asdict(sft_job.experiment(job).optimizer)
    job.path("plan.json").write_text(json.dumps(plan))


# ---------------------------------------------------------------- reporting


def rate(result: dict[str, Any]) -> float:
    """Returns tokens a second, all steps but the first."""
    return sum(result["tokens"][1:]) / sum(result["seconds"][1:])


def step(result: dict[str, Any]) -> float:
    """Returns the median seconds of a step, the first left out."""
    return float(np.median(result["seconds"][1:]))


def loss_difference(name: str, both: dict[str, Any]) -> float | None:
    """Returns the largest relative difference of the losses, or None where the two sides can't have the same."""
    if name in OTHER_LOSSES or "error" in both["reference"]:
        return None
    return float(np.abs(np.asarray(both["jaxft"]["losses"]) / np.asarray(both["reference"]["losses"]) - 1).max())


def _cells(name: str, methods: dict[str, Any]) -> list[str]:
    both = methods[name]
    ours, theirs = both["jaxft"], both["reference"]
    baseline = step(methods[BASELINE]["jaxft"]) if BASELINE in methods else None
    cells = [
        f"{ours['trainable_parameters']:,}",
        f"{ours['trainable_parameters'] / ours['total_parameters']:.3%}",
        f"{ours['compile_seconds']:.0f}",
        f"{step(ours):.2f}",
        f"{step(ours) / baseline:.2f}" if baseline else "",
        f"{rate(ours):.0f}",
        f"{ours['peak_memory_bytes'] / 1e9:.2f}",
    ]
    if "error" in theirs:
        return [*cells, theirs["error"], "", "", "", ""]
    difference = loss_difference(name, both)
    return [
        *cells,
        f"{rate(theirs):.0f}",
        f"{theirs['peak_memory_bytes'] / 1e9:.2f}",
        f"{rate(ours) / rate(theirs):.2f}",
        f"{ours['peak_memory_bytes'] / theirs['peak_memory_bytes']:.2f}",
        "" if difference is None else f"{difference:.0e}",
    ]


COLUMNS = (
    "method",
    "reference",
    "trained parameters",
    "share",
    "compile, s",
    "step, s",
    "of LoRA's step",
    "tokens/s",
    "peak, GB",
    "reference, tokens/s",
    "reference, peak GB",
    "speed ratio",
    "memory ratio",
    "losses differ by",
)


def _line(name: str, methods: dict[str, Any]) -> str:
    cells = zip(COLUMNS[2:], _cells(name, methods), strict=True)
    return f"{name}: " + ", ".join(f"{column} {cell}" for column, cell in cells if cell)


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    about, methods = report["machine"], report["methods"]
    rows = [(name, METHODS[name], *_cells(name, methods)) for name in methods]
    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *rows]
    return "\n\n".join(
        (
            f"{about['processor']}, {about['cores']} cores; Python {about['python']}; "
            + ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            + f". Float32, {report['steps'] - 1} steps timed. Load average at the start: {about['load_average'][0]:.1f}.",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
        )
    )


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws speed and peak memory of both sides against the share of the parameters that trains."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    for name, both in report["methods"].items():
        share = both["jaxft"]["trainable_parameters"] / both["jaxft"]["total_parameters"]
        for axis, value in zip(axes, (rate, lambda result: result["peak_memory_bytes"] / 1e9), strict=True):
            ours = value(both["jaxft"])
            axis.plot(share, ours, "o", color="tab:blue")
            axis.annotate(name, (share, ours), textcoords="offset points", xytext=(4, 4), fontsize=7)
            if "error" not in both["reference"]:
                theirs = value(both["reference"])
                axis.plot(share, theirs, "x", color="tab:orange")
                axis.plot((share, share), (ours, theirs), color="0.85", zorder=0)
    for axis, label in zip(axes, ("tokens a second", "peak memory, GB"), strict=True):
        axis.set(xscale="log", xlabel="share of the parameters that trains", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].plot([], [], "o", color="tab:blue", label="jaxft")
    axes[0].plot([], [], "x", color="tab:orange", label="PEFT, AdapterHub or transformers")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
