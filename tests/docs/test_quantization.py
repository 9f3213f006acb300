"""The page of number formats: its example runs, and its tables are the recorded ones."""

import json
import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")


def test_its_example_runs():
    random = np.random.default_rng(0)
    given = {"values": random.normal(size=(128, 64)).astype(np.float32), "inputs": random.normal(size=(5, 128)).astype(np.float32)}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, given)
    assert given["outputs"].shape == (5, 64)
    assert given["kernel"].codes.nbytes == 128 * 64 // 2
    np.testing.assert_allclose(given["outputs"], given["inputs"] @ given["whole"], rtol=1e-4, atol=1e-4)


def test_its_tables_are_the_recorded_ones():
    recorded = (ROOT / "benchmarks" / "results" / "quantization.md").read_text(encoding="utf-8")
    rows = [line for line in PAGE.splitlines() if re.match(r"\| (float32|int8|NF4|FP4|Int4) \|", line)]
    assert len(rows) == 9
    assert [row for row in rows if row not in recorded] == []
    assert json.loads((ROOT / "benchmarks" / "results" / "quantization.json").read_text())["perplexities"]
