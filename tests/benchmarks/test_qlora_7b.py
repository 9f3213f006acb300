"""The benchmark of QLoRA at 7B's size, on its small model, and PEFT's side of it beside that."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("bitsandbytes")

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
ON_CPU = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
TOLERANCE = 1e-5  # float32 on both sides, the same codes and examples, and a LoRA that changes nothing yet


def run(*arguments):
    """Returns what a script prints in a process of its own, on CPU."""
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=ON_CPU).stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns the folder of the small model and of the report, and what was printed."""
    folder = tmp_path_factory.mktemp("small")
    return folder, run(BENCHMARKS / "qlora_7b.py", "--small", "--tokens=32", "--steps=1", f"--folder={folder}/model", f"--output={folder}")


def test_without_a_gpu_it_says_what_is_unmeasured(small):
    folder, said = small
    report = json.loads((folder / "qlora_7b.json").read_text())
    told = [line for line in said.splitlines() if line.startswith("Not measured")]
    assert told == [f"Not measured here: {what}." for what in report["unmeasured"]]
    assert [what.split()[0] for what in report["unmeasured"]] == ["LoRA", "the", "QLoRA"]
    assert set(report) == {"machine", "model", "unmeasured", "qlora"}


def test_its_published_figures_say_so_too(small):
    published = json.loads((BENCHMARKS / "results" / "qlora_7b.json").read_text())
    own = json.loads((small[0] / "qlora_7b.json").read_text())
    assert published["unmeasured"] == own["unmeasured"]


@pytest.mark.slow
def test_pefts_side_trains_the_same_base_on_the_same_examples(small, monkeypatch):
    folder = small[0]
    monkeypatch.syspath_prepend(BENCHMARKS)
    import qlora_7b

    (folder / "job.json").write_text(json.dumps(qlora_7b.peft_job(folder / "model", 32, 1, qlora_7b.SMALL["vocab_size"])))
    theirs = json.loads(run(BENCHMARKS / "qlora_7b_torch.py", folder / "job.json").splitlines()[-1])
    ours = json.loads((folder / "qlora_7b.json").read_text())["qlora"]
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=TOLERANCE)
    assert theirs["trainable_parameters"] == ours["trainable_parameters"]
    assert theirs["tokens"] == ours["tokens"]
