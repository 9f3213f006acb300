"""Eight LoRA runs as a population against the same eight one after another: wall time and memory, by batch size, for both bundled models.

    python benchmarks/population.py [--runs N] [--only MODEL:ROWS ...] [--output FOLDER] [--quick]

The runs differ in learning rate, alpha and seed. One after another, each is a process of its own, as launch.py starts it, with the programs
that the ones before it left on disk; the population is one process, with a cache of its own, in as many places as jaxft.sweep.sizing says,
and again in other numbers of places, where it shows what that rule is made of. The first cell has the length, the rows a step and the
evaluation of ablation_methods; the others have a few steps, and 8 rows to evaluate: there the start and the compilation weigh most.
Wall time is that of whole processes: start, weights, rows, compilation, training, evaluation, export. Processor time stands beside it: on
a machine that others use it is the steadier of the two. Memory is the largest process's peak. Nothing else should run on the machine.

With --only, the other cells of an earlier report are kept.

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
RULE = 0  # places: as many as the sweep's rule says
# model, rows a step, steps a run (0: all of ablation_methods), places
CELLS = (
    *(("encoder", 2, 0, (RULE,)), ("encoder", 1, 24, (RULE, 2, 8)), ("encoder", 4, 24, (RULE, 2, 8)), ("encoder", 16, 8, (RULE, 2, 8))),
    *(("decoder", 1, 8, (RULE, 2, 8)), ("decoder", 4, 4, (RULE, 2))),
)
NAMES = tuple(f"{model}:{size}" for model, size, _, _ in CELLS)
_MEASURED = ("seconds", "processor_seconds", "compile_seconds", "peak_memory_bytes")


def main() -> None:
    """Runs all cells and writes the report."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    path, cells = options.output / "population.json", {}
    if options.only and path.exists():
        cells = {_name(one): one for one in json.loads(path.read_text())["cells"]}
    command = " ".join(["python benchmarks/population.py", *sys.argv[1:]])
    made_with = {"command": command, "machine": machine.describe(PACKAGES)}
    for model, size, steps, places in CELLS:
        job = {"model": model, "batch_size": size, "runs": options.runs, "steps": steps}
        if options.quick:
            job, places = job | {"runs": 2, "steps": 2}, places[:1]
        if not options.only or _name(job) in options.only:
            cells[_name(job)] = cell(job, places) | made_with
            print(json.dumps(cells[_name(job)]), flush=True)
    report = {"cells": [cells[name] for name in NAMES if name in cells]}
    text = render(report)
    print(text)
    path.write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "population.md").write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="MODEL:ROWS", help=f"these cells: {', '.join(NAMES)}")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="two runs of two steps a cell: whether it runs")
    return parser.parse_args()


def _name(job: dict[str, Any]) -> str:
    return f"{job['model']}:{job['batch_size']}"


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
    lines = ["# Populations: runs in one program, and one after another", ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in report["cells"]:
        groups.setdefault(json.dumps([one["command"], one["machine"]]), []).append(one)
    for key, cells in groups.items():
        command, described = json.loads(key)
        lines += [f"    {command}", "", *(f"{name}: {value}  " for name, value in described.items()), *_table(cells), ""]
    lines += ["Ratios are the population's over the same runs one after another; the first line of each cell is what a sweep does.", ""]
    return "\n".join(lines)


def _table(cells: list[dict[str, Any]]) -> list[str]:
    columns = ["model", "rows a step", "steps", "runs", "places", "wall time", "processor time", "compilation", "peak memory"]
    columns += ["s apart", "s together"]
    lines = ["", f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    for one in cells:
        for count, ratio in one["ratios"].items():
            together = one["together"][count]
            numbers = [one["batch_size"], together["steps"], one["runs"], together["places"], *(f"{ratio[name]:.2f}" for name in _MEASURED)]
            numbers += [f"{one['apart']['seconds']:.0f}", f"{together['seconds']:.0f}"]
            lines.append(f"| {' | '.join(map(str, [one['model'], *numbers]))} |")
    return lines


if __name__ == "__main__":
    main()
