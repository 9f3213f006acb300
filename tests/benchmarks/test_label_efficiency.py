"""The study of what labels are worth: settings chosen on validation, runs not repeated, and what its report says, runs made up."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import experiments
from jaxft import overrides

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import label_efficiency as study

SCORES = {"1e-4": 0.3, "3e-4": 0.5, "1e-3": 0.4}  # of the supervised run, by its rate


@pytest.fixture
def made_up(monkeypatch):
    """Puts made-up figures in the place of runs; returns the runs that were asked for."""
    asked = []

    def one(run, folder):
        path = folder / f"{run.name}.json"
        if not path.exists():
            asked.append(run)
            gain = 0.0 if run.algorithm == study.SUPERVISED else 0.05 + 0.01 * study.ALGORITHMS[run.algorithm].index(run.setting)
            score = SCORES[run.rate] + gain + 0.001 * (run.seed % 7) * (1 + gain)
            found = {"metrics": {"accuracy": score, "macro_f1": score}, "seconds": 10.0, "peak_memory_bytes": 10**9}
            path.write_text(json.dumps(study.dataclasses.asdict(run) | found))
        return json.loads(path.read_text())

    def measured(runs, folder, workers):
        return [one(run, folder) for run in runs]

    monkeypatch.setattr(study, "measured", measured)
    return asked


def test_settings_are_chosen_on_validation_and_runs_are_not_repeated(made_up, tmp_path):
    for seeds in ([0], [0, 1, 2]):
        study.study(60, ["fixmatch"], seeds, (100,), 5, tmp_path)
    assert len(made_up) == len({run.name for run in made_up}) == 3 + 3 + 2 * 3
    tested = [run for run in made_up if run.split == "test"]
    assert {run.rate for run in tested} == {"3e-4"}
    assert {run.setting for run in tested if run.algorithm == "fixmatch"} == {study.ALGORITHMS["fixmatch"][2]}
    assert {run.seed for run in made_up if run.split == "validation"} == {100}
    known = len(made_up)
    study.study(20, ["fixmatch"], [0, 1], (100,), 5, tmp_path)  # with the settings of 60 labels
    assert [(run.labels, run.split) for run in made_up[known:]] == [(20, "test")] * 4


def test_the_report_has_means_intervals_and_paired_gains(made_up, tmp_path):
    folder = tmp_path / "label_efficiency"
    folder.mkdir()
    study.study(60, ["fixmatch"], [0, 1, 2, 3], (100,), 5, folder)
    study.report(folder, tmp_path, 5)
    supervised, fixmatch = json.loads((tmp_path / "label_efficiency.json").read_text())["rows"]
    values = [0.5 + 0.001 * seed for seed in range(4)]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(supervised["accuracy"], np.mean(values))
    np.testing.assert_allclose(supervised["accuracy_interval"], (high - low) / 2)
    others = [0.57 + 0.00107 * seed for seed in range(4)]
    np.testing.assert_allclose(fixmatch["macro_f1_gain"], np.mean(others) - np.mean(values))
    np.testing.assert_allclose(fixmatch["macro_f1_p"], stats.ttest_rel(others, values).pvalue, rtol=1e-6)
    text = (tmp_path / "label_efficiency.md").read_text()
    assert "| 60 | fixmatch | `FixMatch(threshold=0.95,masked=0.15)` | 4 |" in text
    assert (tmp_path / "label_efficiency.png").stat().st_size > 1000


RUNS = """
import pathlib, label_efficiency as study
runs = [study.Run("fixmatch", 20, seed, study.ALGORITHMS["fixmatch"][0], "3e-4", 1, "validation") for seed in (0, 1)]
found = study.measured(runs, pathlib.Path("."), 2)
assert [one["seed"] for one in found] == [0, 1] and all(0 <= one["metrics"]["accuracy"] <= 1 for one in found)
"""


def test_runs_are_trained_once_and_leave_a_file_each(tmp_path):
    benchmarks = pathlib.Path(study.__file__).parent
    for trained in (2, 0):
        command, environment = [sys.executable, "-c", RUNS], os.environ | {"PYTHONPATH": str(benchmarks)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert done.stdout.count(b"accuracy") == trained
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("algorithm", study.ALGORITHMS)
def test_every_setting_is_one_that_a_run_takes(algorithm):
    for setting in study.ALGORITHMS[algorithm]:
        found = overrides.parse_flags(experiments.load(study.EXPERIMENT), study.Run(algorithm, 60, 0, setting, "5e-5", 10, "test").flags())
        assert (found.objective is None) == (algorithm == study.SUPERVISED)
        assert round(found.data.labelled_fraction * study.TRAINING_ROWS) == 60
