"""The benchmark of QLoRA runs, on a tiny random model: three sides, a process each."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "qlora.py"
TOLERANCE = 1e-5  # float32 on both sides, the same codes, examples and start


@pytest.mark.slow
def test_quick_benchmark_agrees_and_reports(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--quick", f"--output={tmp_path}"], check=True)
    lora, qlora, peft = json.loads((tmp_path / "qlora.json").read_text())["sides"].values()
    for found, expected in zip(qlora["losses"], peft["losses"], strict=True):
        assert abs(found / expected - 1) < TOLERANCE
    assert abs(qlora["losses"][0] / lora["losses"][0] - 1) > TOLERANCE  # 4 bits aren't the model itself
    assert qlora["frozen_bytes"] < lora["frozen_bytes"]
    assert "| jaxft, QLoRA |" in (tmp_path / "qlora.md").read_text()
