"""The benchmarks of number formats run in small; what is reported is what was measured."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quick_benchmark_finds_the_published_order(tmp_path):
    subprocess.run([sys.executable, FOLDER / "quantization.py", "--quick", f"--output={tmp_path}"], check=True)
    found = {row["code"]: row["perplexity"] for row in json.loads((tmp_path / "quantization.json").read_text())["perplexities"]}
    assert found["int4"] > found["fp4"] > found["nf4"] > found["float32"]
    assert abs(found["int8"] / found["float32"] - 1) < 0.01
    assert (tmp_path / "quantization.png").exists()


@pytest.mark.slow
def test_every_look_up_has_the_values(tmp_path):
    options = ["--shapes", "64x128", "--tokens", "8", "--repeats", "1"]
    subprocess.run([sys.executable, FOLDER / "dequantize.py", *options, f"--output={tmp_path}"], check=True)
    assert "| gather 16 |" in (tmp_path / "dequantize.md").read_text()


def test_the_recorded_order_is_the_published_one():
    """QLoRA, arXiv:2305.14314, table 2."""
    found = json.loads((FOLDER / "results" / "quantization.json").read_text())
    perplexity = {row["code"]: row["perplexity"] for row in found["perplexities"]}
    assert perplexity["int4"] > perplexity["fp4"] > perplexity["nf4"] > perplexity["float32"]
    row = next(row for row in found["errors"] if (row["code"], row["block_size"], row["double_quantization"]) == ("nf4", 64, True))
    assert row["bits"] == pytest.approx(4.127, abs=1e-3)
    assert row["absolute"] == pytest.approx(0.0728, abs=3e-4)
