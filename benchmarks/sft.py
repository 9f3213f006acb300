"""jaxft against TRL's SFTTrainer with PEFT on one fine-tuning job: speed, memory, losses, and the floor under jaxft's step.

    python benchmarks/sft.py [--steps N] [--output FOLDER] [--quick]

Both train the recipe lora_llama2's model and data with LoRA rank 8 on all linear layers from the same start, by AdamW at the same
constant rate. Each side is a process of its own, one after the other; nothing else should run on the machine. jaxft takes packed rows,
8 examples a step on average; TRL gets exactly the same examples in each step, so losses compare step by step. TRL's options are tried on
few steps first (`TRIALS`), and its best is run in full. Tokens are the examples' own: no padding, and a prefix that examples share counts
once an example on both sides. Compilation and the first step are excluded, and given beside the rest.

Needs jaxft's extra `benchmark`. Writes sft.json, sft.md and sft.png.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import machine
import matplotlib
import numpy as np
import sft_job

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "trl", "peft", "transformers", "accelerate", "torch", "numpy", "matplotlib")
TRIALS: tuple[dict[str, Any], ...] = (  # of sft_trl.Variant
    {"name": "padded, sdpa"},
    {"name": "padded, eager attention", "attention": "eager"},
    {"name": "padded, two halves by length", "micro_batches": "length"},
    {"name": "padding-free", "padding_free": True},
    {"name": "padding-free, a packed row at a time", "padding_free": True, "micro_batches": "row"},
    {"name": "torch.compile", "compile": True, "warmup": 3},  # compiles for the first lengths, then once for any
    {"name": "gradient checkpointing (TRL's default)", "gradient_checkpointing": True},
    {"name": "TRL's own batches of 8, random", "order": "random"},
    {"name": "TRL's own batches of 8, group_by_length", "order": "group_by_length"},
    {"name": "bfloat16 autocast", "dtype": "bfloat16", "warmup": 0},  # may be far too slow for two steps
    {"name": "bfloat16 autocast and parameters", "dtype": "bfloat16", "parameters": "bfloat16", "warmup": 0},
)
NOT_TRIED = {  # with the reason
    "use_liger_kernel, use_kernels": "Triton kernels, GPU only",
    "flash attention, packing with varlen kernels": "GPU only; padding-free with sdpa is the exact equivalent on CPU",
    "packing=True": "the same as padding-free with a packed row at a time, but for which examples share a step",
    "loss_type": "nll is TRL's fused head in chunks, always on; dft is another loss",
    "dataloader_num_workers": "collating 8 examples takes under a millisecond, and workers would take the step's cores",
    "optim": "adamw_torch_fused is the default of transformers 5",
    "OMP_NUM_THREADS": "torch takes all cores by itself",
    "GLIBC_TUNABLES, MALLOC_*": "settings of the process, not of the trainer, left alone on both sides",
}
KINDS_SHOWN = 12  # of operations, the slowest
TRIAL_STEPS = 1  # timed; a variant's warmup comes before
QUICK_STEPS = 2
TRIAL_SECONDS = 300  # then a trial is given up: ten times what the slowest variant in float32 takes, loading included


def main() -> None:
    """Runs both sides and writes the report."""
    options = parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 20, "sft.json, sft.md and sft.png")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        job = sft_job.Job(sft_job.TINY if options.quick else sft_job.BUNDLED, folder, options.steps)
        side("sft_job.py", job, folder)
        report = {"machine": machine.describe(PACKAGES), "job": dataclasses.asdict(job) | {"folder": ""}}
        print(f"jaxft: {job.steps} steps", flush=True)
        report["jaxft"] = side("sft_jaxft.py", job, folder) | {"variant": {"name": "jaxft", "dtype": "float32", "warmup": 1}}
        report["trials"] = trials(job, folder, TRIALS[:1] if options.quick else TRIALS)
        report["trl"] = finals(job, folder, report["trials"])
    report["not_tried"] = NOT_TRIED
    report["summary"] = summarize(report)
    text = render(report)
    print(text)
    (options.output / "sft.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "sft.md").write_text(text + "\n")
    plot(report, options.output / "sft.png")


def parsed(parser: argparse.ArgumentParser, steps: int, files: str) -> argparse.Namespace:
    """Returns the options of a benchmark that trains: a parser's own, and those that all have.

    Args:
      parser: with what the benchmark alone has.
      steps: where none are asked for.
      files: that it writes.
    """
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each side, 2 or more; the first isn't timed")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results", help=f"folder for {files}")
    parser.add_argument("--quick", action="store_true", help="2 steps of a tiny random model")
    options = parser.parse_args()
    if options.quick:
        options.steps = QUICK_STEPS
    if options.steps < 2:
        parser.error("--steps must be 2 or more: the first step isn't timed.")
    return options


# ---------------------------------------------------------------- running


def side(
    script: str,
    job: sft_job.Job,
    folder: str,
    variant: dict[str, Any] | None = None,
    timeout: float | None = None,
    python: str = sys.executable,
) -> Any:
    """Returns what a side's process wrote; raises `RuntimeError` with its last line where it failed."""
    job_path, out, variant_path = (pathlib.Path(folder) / name for name in ("job.json", "out.json", "variant.json"))
    job.write(job_path)
    out.unlink(missing_ok=True)
    command = [python, str(HERE / script), str(job_path), str(out)]
    if variant is not None:
        variant_path.write_text(json.dumps(variant))
        command.append(str(variant_path))
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result in {timeout:.0f} seconds") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(out.read_text()) if out.exists() else None


def trials(job: sft_job.Job, folder: str, variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs each variant on few steps; one that fails is kept with its error."""
    found = []
    for variant in variants:
        steps = variant.get("warmup", 1) + TRIAL_STEPS
        try:
            result = side("sft_trl.py", dataclasses.replace(job, steps=steps), folder, variant, TRIAL_SECONDS)
            result["tokens_per_second"] = rate(result)
            print(f"TRL, {variant['name']}: {rate(result):.0f} tokens/s, {steps} steps", flush=True)
        except RuntimeError as error:
            result = {"variant": variant, "error": str(error)}
            print(f"TRL, {variant['name']}: {error}", flush=True)
        found.append(result)
    return found


def finals(job: sft_job.Job, folder: str, tried: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs in full: TRL's best with our examples, and its best in float32 where that is with its own batches.

    The best in bfloat16 is run in full too, unless its trial, which has the first step in it, took more than twice as long as float32;
    then its trial stands.
    """
    done = [trial for trial in tried if "error" not in trial]
    single = [trial for trial in done if trial["variant"]["dtype"] == "float32"]
    chosen = [_best(trial for trial in single if trial["variant"]["order"] == "ours")]
    if (best := _best(single)) not in chosen:
        chosen.append(best)
    half = [trial for trial in done if trial["variant"]["dtype"] == "bfloat16"]
    faster = [_best(half)] if half and rate(_best(half)) > rate(best) / 2 else []
    found = []
    for trial in chosen + faster:
        if len(trial["seconds"]) >= job.steps:
            found.append(trial)
            continue
        print(f"TRL, {trial['variant']['name']}: {job.steps} steps", flush=True)
        found.append(side("sft_trl.py", job, folder, trial["variant"] | {"warmup": max(trial["variant"]["warmup"], 1)}))
    return found + ([_best(half)] if half and not faster else [])


def _best(results: Any) -> dict[str, Any]:
    return max(results, key=rate)


# ---------------------------------------------------------------- reporting


def timed(result: dict[str, Any], name: str) -> np.ndarray:
    """Returns a measurement of each timed step: all but those that warm up."""
    return np.asarray(result[name][result["variant"]["warmup"] :], float)


def rate(result: dict[str, Any]) -> float:
    """Returns tokens a second over the timed steps."""
    return float(timed(result, "tokens").sum() / timed(result, "seconds").sum())


def summarize(report: dict[str, Any]) -> dict[str, float]:
    """Returns the ratios and the agreement of the losses."""
    ours, theirs = report["jaxft"], report["trl"]
    same = theirs[0]
    if same["tokens"] != ours["tokens"]:
        raise RuntimeError("The two sides didn't train on the same tokens.")
    better = _best(theirs)
    difference = np.abs(np.asarray(ours["losses"]) / np.asarray(same["losses"]) - 1)
    median = float(np.median(timed(ours, "seconds")))
    return {
        "speed_ratio": rate(ours) / rate(better),
        "speed_ratio_same_examples": rate(ours) / rate(same),
        "memory_ratio": ours["peak_memory_bytes"] / better["peak_memory_bytes"],
        "loss_relative_difference_max": float(difference.max()),
        "loss_relative_difference_mean": float(difference.mean()),
        "step_over_floor": median / ours["floor"]["seconds"],
        "seconds_over_floor": median - ours["floor"]["seconds"],
    }


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    ours, summary, about = report["jaxft"], report["summary"], report["machine"]
    rows = [_row("jaxft, float32", ours, f"{ours['compile_seconds']:.1f} + {ours['seconds'][0]:.1f}")]
    rows += [_row(f"TRL, {_precision(r)}: {r['variant']['name']}", r, f"{r['seconds'][0]:.1f}") for r in report["trl"]]
    columns = ("", "steps timed", "compile + first step, s", "median step, s", "mean step, s", "tokens/s", "peak memory, GB")
    parts = [
        f"{about['processor']}, {about['cores']} cores; Python {about['python']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f". Load average at the start: {about['load_average'][0]:.1f}.",
        _markdown(columns, rows),
        "Tokens are each example's own, without padding: a prefix that examples share stands once in a row of jaxft's, and is counted in "
        "each example that has it, on both sides.",
        f"jaxft trains {summary['speed_ratio']:.2f} times the tokens a second of TRL's better figure, at {summary['memory_ratio']:.2f} of "
        f"its peak memory. On the same examples, losses differ by {summary['loss_relative_difference_max']:.1e} of their value at most, "
        f"{summary['loss_relative_difference_mean']:.1e} on average.",
        f"A step takes {summary['step_over_floor']:.2f} times its floor, the sum of its products timed alone:",
        _floor(ours["floor"]["kinds"]),
        _coverage(ours["profile"], float(np.median(timed(ours, "seconds")))),
        _markdown(("operations", "seconds"), [(kind, f"{seconds:.3f}") for kind, seconds in list(ours["profile"].items())[:KINDS_SHOWN]]),
        "What was tried of TRL, on few steps:",
        _markdown(("variant", "tokens/s", "peak memory, GB"), [_trial(trial) for trial in report["trials"]]),
    ]
    return "\n\n".join(parts)


def _coverage(profile: dict[str, float], step: float) -> str:
    """What of a step's time the table of operations has."""
    named, shown = (sum(seconds) for seconds in (list(profile.values()), list(profile.values())[:KINDS_SHOWN]))
    return (
        f"Where one step's time goes, by the profiler: it tells the operation for {named:.2f} s of the median step's {step:.2f} s, "
        f"{named / step:.0%}, and the table has the largest kinds of these, {shown:.2f} s. The rest has no operation's name there; most "
        "products of the linear layers, which the table above times alone, are part of it."
    )


def _precision(result: dict[str, Any]) -> str:
    return result["variant"]["dtype"]


def _row(name: str, result: dict[str, Any], first: str) -> tuple[str, ...]:
    seconds = timed(result, "seconds")
    numbers = (f"{np.median(seconds):.2f}", f"{seconds.mean():.2f}", f"{rate(result):.0f}", f"{result['peak_memory_bytes'] / 1e9:.2f}")
    return (name, str(len(seconds)) if result["variant"]["warmup"] else "1, the first", first, *numbers)


def _floor(kinds: dict[str, dict[str, float]]) -> str:
    rows = [(kind, f"{entry['seconds']:.3f}", f"{entry['gflops']:.0f}") for kind, entry in kinds.items()]
    return _markdown(("products", "seconds", "GFLOP/s"), rows)


def _trial(trial: dict[str, Any]) -> tuple[str, ...]:
    name = trial["variant"]["name"]
    if "error" in trial:
        return name, "none", trial["error"]
    return name, f"{rate(trial):.0f}", f"{trial['peak_memory_bytes'] / 1e9:.2f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss of each step on both sides, over steps and over time."""
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    theirs = report["trl"][0]
    for name, result, style in (("jaxft", report["jaxft"], "-"), (f"TRL, {_precision(theirs)}", theirs, "--")):
        by_step.plot(range(1, len(result["losses"]) + 1), result["losses"], style, label=name)
        by_time.plot(np.cumsum(result["seconds"]) + result.get("compile_seconds", 0), result["losses"], style, label=name)
    by_step.set(xlabel="optimizer step", ylabel="loss, nats a scored token")
    by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set(xlabel="seconds, compilation included")
    by_step.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
