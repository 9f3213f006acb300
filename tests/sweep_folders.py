"""Folders of sweeps as they are on disk, of runs that never ran."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any


def write_sweep(folder: pathlib.Path, runs: Sequence[dict[str, Any]], metric: str = "loss", mode: str = "min", **fields: Any) -> None:
    """Writes sweep.json of runs that have "overrides", and maybe a "group"."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [{"id": f"{number:03d}", "group": None} | run for number, run in enumerate(runs)]
    config = {"optimizer": {"learning_rate": 1e-3}, "train": {"seed": 0}, "eval": {"split": "test"}, "model": {"source": "tiny"}}
    sweep = {"experiment": "ablation", "config": config, "metric": metric, "mode": mode, "vary": ["method"], "versions": {}, "device": {}}
    (folder / "sweep.json").write_text(json.dumps(sweep | {"runs": named} | fields))


def write_run(
    folder: pathlib.Path,
    run: str,
    validation: Sequence[float] = (),
    test: float | None = None,
    metric: str = "loss",
    state: dict[str, Any] | None = None,
    **summary: Any,
) -> None:
    """Writes a run's folder: evaluations on validation, the figure after training, the state, and other fields of the summary."""
    own = folder / "runs" / run
    own.mkdir(parents=True)
    lines = [{"step": step, "loss": 1.5 * math.exp(-step / 40) + 0.2} for step in range(1, 101)]
    lines += [{"step": 50 * (i + 1), f"validation_{metric}": value} for i, value in enumerate(validation)]
    (own / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "runs" / f"{run}.json").write_text(json.dumps({"state": "done", "attempts": 1, "error": None} | (state or {})))
    if test is None:
        return
    figures = {"before": {metric: 1.1, "general_loss": 3.0}, "after": {metric: test, "general_loss": 3.25}}
    known = {"method": "LoRA", "trainable_parameters": 1000, "total_parameters": 100_000, "peak_memory_bytes": 2**30}
    known |= {"tokens_per_second": 200.0, "seconds": 90.0, "compile_seconds": 5.0, "eval": figures}
    (own / "summary.json").write_text(json.dumps(known | summary))
    (own / "export").mkdir()
    (own / "export" / "adapter.safetensors").write_bytes(b"0" * 2048)
