"""The benchmark of the methods runs, on a tiny random model: jaxft's side and the reference's, a process each."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "methods.py"

# Float32 on both sides, the same examples and the same start: rounding is about 1e-7, one wrong token about 1e-3
TOLERANCE = 1e-5


@pytest.mark.slow
def test_quick_benchmark_agrees_and_reports(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--quick", f"--output={tmp_path}", "--only", "prompt"], check=True)
    methods = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert methods.keys() == {"prompt"}
    for both in methods.values():
        ours, theirs = both["jaxft"], both["reference"]
        assert ours["trainable_parameters"] == theirs["trainable_parameters"]
        for found, expected in zip(ours["losses"], theirs["losses"], strict=True):
            assert abs(found / expected - 1) < TOLERANCE
    assert (tmp_path / "methods.png").exists()
    assert "| prompt | PEFT | 1,280 |" in (tmp_path / "methods.md").read_text()
