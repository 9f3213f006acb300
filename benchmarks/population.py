"""Eight LoRA runs as a population against the same eight one after another: wall time and memory, by batch size, for both bundled models.

    python benchmarks/population.py [--runs N] [--epochs N] [--output FOLDER] [--quick]

The runs differ in learning rate, alpha and seed. One after another, each is a process of its own, as a sweep starts them, with the programs
that the ones before it left on disk; the population is one process, with a cache of its own, in as many places as jaxft.sweep.sizing says,
and again in other numbers of places, where it shows what that rule is made of. Wall time is that of whole processes: start, weights, rows,
compilation, training, evaluation, export. Processor time stands beside it: on a machine that others use it is the steadier of the two.
Memory is the largest process's peak. Nothing else should run on the machine.

Needs jaxft's extra `benchmark`. Writes population.json and population.md.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import machine

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
BATCHES = {"encoder": (1, 4, 16), "decoder": (1, 4)}  # rows a step
PLACES = (0, 2, 8)  # 0 is what the rule says


def main() -> None:
    """Runs all cells and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=0.0, help="of each run; 0: as the sweep, ablation_methods, has them")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="two runs of a few steps, one batch size: whether it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for model, sizes in BATCHES.items():
        for size in sizes[:1] if options.quick else sizes:
            job = {"model": model, "batch_size": size, "runs": 2 if options.quick else options.runs, "epochs": options.epochs}
            job |= {"steps": 3 if options.quick else 0}
            cells.append(cell(job, (0, 2) if options.quick else PLACES))
            print(json.dumps(cells[-1]), flush=True)
    command = " ".join(["python benchmarks/population.py", *sys.argv[1:]])
    report = {"command": command, "machine": machine.describe(PACKAGES), "cells": cells}
    text = render(report)
    print(text)
    (options.output / "population.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "population.md").write_text(text)


def cell(job: dict[str, Any], places: tuple[int, ...]) -> dict[str, Any]:
    """Returns what both sides measured at one batch size, with the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder)
        apart = [side(job | {"only": number, "places": 1}, cache / "apart") for number in range(job["runs"])]
        together = {str(count): side(job | {"only": None, "places": count}, cache / f"together{count}") for count in places}
    alone = {name: sum(one[name] for one in apart) for name in ("seconds", "processor_seconds", "compile_seconds")}
    alone["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in apart)
    ratios = {count: {name: found[name] / alone[name] for name in alone} for count, found in together.items()}
    return {**job, "apart": alone, "together": together, "ratios": ratios}


def side(job: dict[str, Any], cache: pathlib.Path) -> dict[str, Any]:
    """Returns what one process took, from its start to its end, and what it measured itself."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "out.json"
        given.write_text(json.dumps(job))
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))  # where the experiments are
        command = [sys.executable, str(HERE / "population_jaxft.py"), str(given), str(out)]
        environment = os.environ | {"PYTHONPATH": path, "JAXFT_CACHE": str(cache)}
        began, before = time.perf_counter(), _processor_seconds()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds, processor = time.perf_counter() - began, _processor_seconds() - before
        if done.returncode:
            sys.exit(f"population_jaxft.py failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found | {"seconds": seconds, "processor_seconds": processor}


def _processor_seconds() -> float:
    """Of all processes that have ended here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    lines = ["# Populations: runs in one program, and one after another", "", f"    {report['command']}", ""]
    lines += [f"{key}: {value}  " for key, value in report["machine"].items()]
    lines += ["", "Ratios are the population's over the same runs one after another; the first line of each cell is what a sweep does.", ""]
    lines += ["| model | rows a step | runs | places | wall time | processor time | compilation | peak memory | s apart | s together |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for one in report["cells"]:
        for count, ratio in one["ratios"].items():
            together, rows = (
                one["together"][count],
                f"| {one['model']} | {one['batch_size']} | {one['runs']} | {one['together'][count]['places']} ",
            )
            names = ("seconds", "processor_seconds", "compile_seconds", "peak_memory_bytes")
            cells = [f"{ratio[name]:.2f}" for name in names] + [f"{one['apart']['seconds']:.0f}", f"{together['seconds']:.0f}"]
            lines.append(f"{rows}| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
