"""What the benchmark of encoders makes of its runs: figures of made-up runs."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
ACCURACIES = {"jaxft": (0.70, 0.74, 0.72), "Trainer, random order": (0.10, 0.10, 0.10), "Trainer, group_by_length": (0.71, 0.75, 0.70)}
SPEEDS = {"jaxft": (30.0, 44.0, 36.0), "Trainer, random order": (10.0, 11.0, 12.0), "Trainer, group_by_length": (20.0, 22.0, 18.0)}


@pytest.fixture(scope="module")
def encoders():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("encoders", FOLDER / "encoders.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("machine", None)


def runs(accuracies, seeds=3):
    """Returns made-up runs of both methods."""
    return [
        {"side": side, "method": method, "seed": seed, "examples_per_second": SPEEDS[side][seed], "accuracy": accuracies[side][seed]}
        | {"macro_f1": 0.5, "peak_memory_bytes": 2e9}
        for method in ("full", "lora")
        for side in SPEEDS
        for seed in range(seeds)
    ]


def test_the_faster_way_of_the_trainer_counts_seed_by_seed(encoders):
    ratio = encoders.summarize(runs(ACCURACIES))["full, ratio"]
    assert ratio["mean"] == pytest.approx((1.5 + 2.0 + 2.0) / 3)
    assert (ratio["least"], ratio["most"]) == (1.5, 2.0)


def test_accuracies_agree_within_the_seeds_spread(encoders):
    found = encoders.summarize(runs(ACCURACIES))
    assert found["lora, jaxft"]["accuracy"] == pytest.approx([0.72, 0.02])
    ratio = found["lora, ratio"]
    assert ratio["error"] == pytest.approx(np.sqrt((np.var([0.70, 0.74, 0.72], ddof=1) + np.var([0.71, 0.75, 0.70], ddof=1)) / 3))
    assert ratio["agree"]
    apart = encoders.summarize(runs(ACCURACIES | {"jaxft": (0.50, 0.54, 0.52)}))["lora, ratio"]
    assert apart["accuracies_apart"] == pytest.approx(0.2)
    assert not apart["agree"]


def test_one_run_says_nothing_of_agreement(encoders):
    one = runs(ACCURACIES, seeds=1)
    report = {
        "command": "python benchmarks/encoders.py --seeds 1",
        "machine": {},
        "epochs": 5.0,
        "runs": one,
        "summary": encoders.summarize(one),
    }
    text = encoders.render(report)
    assert "    python benchmarks/encoders.py --seeds 1\n" in text
    assert "one run says nothing of it" in text
