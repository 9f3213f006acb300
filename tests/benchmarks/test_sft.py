"""The side-by-side benchmark runs, on a tiny random model: both real libraries, a process each."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("trl")

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "sft.py"

# Float32 on both sides, the same examples and the same start: rounding is about 1e-7, one wrong token about 1e-3
TOLERANCE = 1e-5


@pytest.mark.slow
def test_quick_benchmark_agrees_and_reports(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--quick", f"--output={tmp_path}"], check=True)
    report = json.loads((tmp_path / "sft.json").read_text())
    assert report["summary"]["loss_relative_difference_max"] < TOLERANCE
    assert report["jaxft"]["tokens"] == report["trl"][0]["tokens"]
    assert (tmp_path / "sft.png").exists()
    assert "| jaxft, float32 |" in (tmp_path / "sft.md").read_text()


def test_the_published_text_is_that_of_its_figures_and_says_what_they_cover(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import sft

    report = json.loads((SCRIPT.parent / "results" / "sft.json").read_text())
    text = sft.render(report)
    assert (SCRIPT.parent / "results" / "sft.md").read_text() == text + "\n"
    assert f"it tells the operation for {sum(report['jaxft']['profile'].values()):.2f} s of" in text
    assert "is counted in each example that has it" in text
