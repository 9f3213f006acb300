"""Sweeps as a user starts them, on a tiny BERT: to their end, with runs that die, killed at random, with what makes no sense."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_reviews

import experiments
from experiments import full_bert_sentiment
from jaxft import overrides
from jaxft.errors import UserError
from jaxft.methods import BitFit, LoRA
from jaxft.sweep import Search, Sweep, choice, draws, executor, grid, log_uniform, product, seeds, uniform, zipped
from jaxft.sweep import sweep as sweeps
from jaxft.sweep.executor import Options
from jaxft.sweep.runs import DONE, FAILED, Folder, name_runs

ROOT = pathlib.Path(__file__).parents[2]
RUNS = product(grid({"method": [LoRA(rank=2), BitFit()]}), grid({"optimizer.learning_rate": [1e-3, 1e-2]}))

ALONE = [*RUNS[:1], {"method": BitFit()}]  # no population: a process each
LISTS = {"whole": Sweep(RUNS, vary=("method",)), "alone": Sweep(ALONE, vary=("method",))}

# What a process of its own runs
PROGRAM = """
import pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import test_sweep
test_sweep.go(pathlib.Path({material!r}), pathlib.Path({workdir!r}), test_sweep.LISTS[{declared!r}])
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a tiny BERT and its rows."""
    return tiny_reviews.write(tmp_path_factory.mktemp("sweeps"))


def experiment(material, **changed):
    """Returns a run of a few steps."""
    values = {"model.source": str(material / "model"), "data.train": str(material / "rows.jsonl"), "data.test": "", "data.label": "label"}
    values |= {"data.split": (0.5, 0.25, 0.25), "data.max_length": 32, "train.steps": 4, "train.batch_size": 2, "train.eval_every": 2}
    return overrides.with_values(full_bert_sentiment.get_config(), values | changed)


def go(material, workdir, declared=LISTS["whole"], options=Options(), given=(), **changed):  # noqa: B008 - frozen
    """Runs a sweep."""
    sweeps.sweep(experiment(material, **changed), declared, workdir, options, given)


def start(material, workdir, declared="whole"):
    """Starts the sweep in a process of its own."""
    places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "here": str(pathlib.Path(__file__).parent)}
    text = PROGRAM.format(**places, declared=declared, material=str(material), workdir=str(workdir))
    environment = os.environ | {"JAXFT_CACHE": str(material / "cache"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table(workdir):
    """Returns what the finished table says of each run, without times, memory and how often it was tried."""
    rows = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["rows"]
    told = ("state", "shared", "overrides", "validation", "after", "before", "curves")
    return {row["id"]: {name: row[name] for name in told} for row in rows}


@pytest.fixture(scope="module")
def whole(material):
    """A sweep that was left alone."""
    workdir = material / "whole"
    process = start(material, workdir)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out
    return workdir, out


@pytest.mark.slow
def test_every_run_is_done_and_in_the_report(whole):
    workdir, out = whole
    found = table(workdir)
    assert list(found) == ["000-lora-rank2-lr1e-3", "001-lora-rank2-lr1e-2", "002-bitfit-lr1e-3", "003-bitfit-lr1e-2"]
    assert {row["state"] for row in found.values()} == {DONE}
    assert "4 of 4 runs are done" in out
    assert "000-lora-rank2-lr1e-3: done, validation loss" in out
    for name in ("report.md", "report.html", "results.parquet", "runs/003-bitfit-lr1e-2/summary.json"):
        assert (workdir / name).exists()
    assert json.loads((workdir / "sweep.json").read_text())["versions"]["jaxft"]


@pytest.mark.slow
def test_killed_ten_times_the_table_is_that_of_a_sweep_left_alone(material, whole):
    """SIGKILL at random moments, now of the sweep's own process, now of a worker or a run first; seven while runs are at work."""
    workdir, chance = material / "killed", random.Random(0)
    for number in range(10):
        before = attempts(workdir)
        process = start(material, workdir)
        while number > 2 and process.poll() is None and attempts(workdir) == before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 2.5) if number > 2 else chance.uniform(0.5, 4.0))
        if number % 2 and (others := children(process.pid)):
            os.kill(chance.choice(others), signal.SIGKILL)
            time.sleep(chance.uniform(0.0, 1.0))
        process.kill()
        process.wait()
    process = start(material, workdir)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out
    assert attempts(workdir) >= len(RUNS) + 4, "hardly a run was killed at its work"
    assert table(workdir) == table(whole[0])


def attempts(workdir):
    """Returns how often runs have begun."""
    return sum(Folder(workdir).state(run.id).attempts for run in name_runs(RUNS))


def children(parent):
    """Returns the processes that descend from one."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found.setdefault(int(fields[1]), []).append(int(path.parent.name))
    below = [parent]
    for one in below:
        below += found.get(one, [])
    return below[1:]


def forked(parent):
    """Returns the run's own process, which its worker forked: the command line is the worker's still; or None, where there is none yet."""
    youngest = [parent, *children(parent)][-2:]
    try:
        lines = {pathlib.Path(f"/proc/{process}/cmdline").read_bytes() for process in youngest}
    except OSError:  # one has ended
        return None
    return youngest[-1] if len(youngest) == 2 and len(lines) == 1 else None


@pytest.mark.slow
def test_a_run_that_dies_is_tried_again_and_takes_nothing_with_it(material):
    workdir, state = material / "dying", Folder(material / "dying").state
    process, killed = start(material, workdir, "alone"), set()
    while process.poll() is None:
        time.sleep(0.05)
        found = state("001-bitfit")
        if found.state == "running" and found.attempts not in killed and (run := forked(process.pid)):
            os.kill(run, signal.SIGKILL)
            killed.add(found.attempts)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert "001-bitfit: failed. It died 2 times" in out
    assert state("000-lora-rank2-lr1e-3").state == DONE
    dead = state("001-bitfit")
    assert (dead.state, dead.attempts) == (FAILED, 2)
    assert "It died 2 times. Its process was ended by SIGKILL" in dead.error
    assert "It died 2 times" in (workdir / "report.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what makes no sense


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Sweep(()), "yields no run"),
        (Sweep([{"train.seed": 0}, {"train.seed": 1}, {"train.seed": 0}]), "are the same. Leave one of them out"),
        (Sweep([{"optimizer.learning_rat": 1.0}]), "optimizer.learning_rate"),
        (Sweep([{"train.seed": "one"}]), "train.seed"),
        (Sweep([{"optimizer.learning_rate": float("nan")}]), "learning_rate"),
        (Sweep([5]), "A run of a sweep is a dictionary of overrides, as {'train.seed': 1}, not 5"),
        (Sweep({"method": LoRA()}), "runs are a list of overrides, not dict"),
        (Sweep(None), "runs are a list of overrides, not NoneType"),
        (["train.seed=1"], "is a dictionary of overrides, as {'train.seed': 1}, not 'train.seed=1'"),
        (Sweep([{"train.seed": 0}], mode="most"), "min or max"),
        (Sweep([{"train.seed": 0}], vary=("method",)), "which no run sets"),
        (Sweep([{"train.seed": 0}], search=Search({"train.seed": choice(1)})), "not both"),
        (Sweep(search=Search({"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}, pruner="medien")), "Did you mean 'median'"),
    ],
)
def test_a_sweep_that_can_not_be_is_refused(material, tmp_path, declared, words):
    with pytest.raises(UserError) as caught:
        go(material, tmp_path / "sweep", declared)
    assert words in str(caught.value)
    assert not (tmp_path / "sweep" / "runs").exists()


SEARCH = Search({"optimizer.learning_rate": log_uniform(1e-5, 1e-1)}, trials=3, sampler="tpe", pruner="median")


@pytest.mark.parametrize("declared", [Sweep(RUNS, metric="perplexity"), Sweep(search=SEARCH, metric="perplexity")], ids=["runs", "search"])
def test_a_metric_that_nobody_logs_is_refused_before_the_first_run(material, tmp_path, declared):
    with pytest.raises(UserError, match=r"There is no Sweep.metric 'perplexity'"):
        go(material, tmp_path / "sweep", declared)
    assert not list((tmp_path / "sweep" / "runs").glob("*.json"))


@pytest.mark.parametrize("declared", [Sweep(RUNS[:1]), Sweep(search=SEARCH)], ids=["run", "search"])
@pytest.mark.parametrize(
    ("given", "words"),
    [({"data.folds": 3}, "Name one part by config.data.fold, or leave"), ({"data.split": (1.0, 0.0, 0.0)}, "there are no rows for it")],
    ids=["folds", "none"],
)
def test_runs_without_one_validation_set_are_refused_though_it_is_one_run(material, tmp_path, declared, given, words):
    with pytest.raises(UserError, match=words):
        go(material, tmp_path / "sweep", declared, **given)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_that_was_refused_may_be_mended_and_what_is_added_is_checked(material, tmp_path):
    with pytest.raises(UserError, match="rows for it"):
        go(material, tmp_path / "sweep", Sweep(RUNS[:2]), **{"data.split": (0.7, 0.0, 0.3)})
    go(material, tmp_path / "sweep", Sweep(RUNS[:1]))
    assert [row["state"] for row in table(tmp_path / "sweep").values()] == [DONE]
    with pytest.raises(UserError, match="Run 001-lora-targets.*matches nothing"):
        go(material, tmp_path / "sweep", Sweep([*RUNS[:1], {"method": LoRA(targets=("nothing_such",))}]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(executor="slurm"), "There is no Slurm here"),
        (Options(executor="slrm"), "Did you mean 'slurm'"),
        (Options(filter="dora"), "matches none of the 4 runs"),
        (Options(filter="("), "no regular expression"),
        (Options(partition="gpu"), "an option of Slurm's jobs"),
        (Options(workers=0), "1 or more"),
        (Options(executor="slurm", slurm=("time=10",)), "Give --sweep.time in minutes"),
    ],
)
def test_options_that_make_no_sense_are_refused(material, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        go(material, tmp_path / "sweep", options=options)


def test_a_metric_that_the_sweep_has_itself_is_not_given_beside_it(material, tmp_path):
    with pytest.raises(UserError, match=r"--config.train.best_metric has no effect: the sweep goes by loss \(min\)"):
        go(material, tmp_path / "sweep", given=("train.best_metric",))


def test_a_text_is_no_list_of_values():
    with pytest.raises(UserError, match=r"takes a list of values of model.quantization, not 'nf4'. Write \['nf4'\]"):
        grid({"model.quantization": "nf4"})


def test_an_override_that_every_run_sets_is_refused(material, tmp_path):
    with pytest.raises(UserError, match=r"--config.optimizer.learning_rate has no effect"):
        go(material, tmp_path / "sweep", given=("optimizer.learning_rate",))


def test_the_folder_of_another_sweep_is_left_alone(material, whole, tmp_path):
    before = (whole[0] / "sweep.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another sweep: run 001-lora-rank2-lr1e-2 was in it"):
        go(material, whole[0], Sweep(RUNS[:1] + RUNS[2:], vary=("method",)))
    with pytest.raises(UserError, match=r"holds another sweep: config.train.steps was 4 and is 5"):
        go(material, whole[0], **{"train.steps": 5})
    assert (whole[0] / "sweep.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no sweep"):
        go(material, tmp_path)


def test_slurm_is_given_its_options(monkeypatch, tmp_path):
    monkeypatch.setattr(executor.shutil, "which", lambda name: f"/usr/bin/{name}")
    options = Options(executor="slurm", partition="gpu", gpus=1, time=90, slurm=("qos=high",))
    executor.check(options)
    workers = executor.Workers(Folder(tmp_path), options, 1)
    assert workers._terms() == (False, 90 * 60 - executor.GOODBYE)
    made = workers._executor()._executor
    given = made.parameters
    assert (given["partition"], given["time"], given["gpus_per_node"], given["signal_delay_s"]) == ("gpu", 90, 1, 10)
    assert given["additional_parameters"] == {"qos": "high"}


def test_an_experiment_without_a_sweep_is_told_with_those_that_have_one():
    with pytest.raises(UserError, match=r"'lora_llama2' has no sweep\(\).* Known with one: ablation_masking, "):
        experiments.load_sweep("lora_llama2")


# ---------------------------------------------------------------- what runs are made of


def test_lists_of_overrides():
    assert len(product(grid({"a": [1, 2], "b": [3, 4]}), seeds(3))) == 12
    assert zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(UserError, match="2 of a, 1 of b"):
        zipped({"a": [1, 2], "b": [3]})
    with pytest.raises(UserError, match="two of them give a"):
        product([{"a": 1}], [{"a": 2}])
    found = draws({"x": uniform(0, 1), "y": log_uniform(1e-4, 1e-2), "z": choice("a", "b")}, 200)
    assert found == draws({"x": uniform(0, 1), "y": log_uniform(1e-4, 1e-2), "z": choice("a", "b")}, 200)
    assert abs(sum(run["x"] for run in found) / 200 - 0.5) < 0.07
    assert abs(sum(run["y"] < 1e-3 for run in found) / 200 - 0.5) < 0.12  # half below the geometric mean
    assert {run["z"] for run in found} == {"a", "b"}


def test_runs_have_names_that_people_read():
    (run,) = name_runs([{"method": LoRA(rank=16, dora=True), "optimizer.learning_rate": 2.5e-4, "train.seed": 3}], first=12)
    assert run.id == "012-lora-rank16-dora-lr2.5e-4-seed3"


@pytest.mark.slow
def test_a_search_proposes_measures_and_prunes(material, tmp_path):
    go(material, tmp_path / "search", Sweep(search=SEARCH))
    rows = table(tmp_path / "search")
    assert len(rows) == 3
    assert len({row["overrides"]["optimizer.learning_rate"] for row in rows.values()}) == 3
    go(material, tmp_path / "search", Sweep(search=SEARCH), Options(limit=9))  # is finished, also where more are allowed
    assert table(tmp_path / "search") == rows
