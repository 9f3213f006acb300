"""Runs that train in one program: each ends as it does alone; stopped, failed and pruned ones; which runs fit each other."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from stopped_runs import stop_at

import experiments
from jaxft import overrides
from jaxft.errors import UserError
from jaxft.sweep import population
from jaxft.sweep.population import populations, train_population
from jaxft.train import run

pytestmark = pytest.mark.usefixtures("as_launched")

SAME = ("--config.data.split=0.6,0.2,0.2", "--config.train.steps=6", "--config.train.eval_every=2", "--config.train.checkpoint_every=3")
LLAMA = (
    *("--config.data.test=", "--config.data.system=", "--config.data.prompt=", "--config.data.completion=", "--config.data.max_length=128"),
    *("--config.train.batch_size=4", "--config.eval.generate=false", "--config.method.rank=4"),
)
BERT = (
    *("--config.data.test=", "--config.data.label=label", "--config.data.max_length=64", "--config.train.batch_size=4"),
    "--config.method=LoRA(rank=4,targets=('query','value'))",
)
NUMBERS = (
    ("--config.optimizer.learning_rate=1e-2", "--config.method.alpha=8", "--config.method.dropout=0.1", "--config.train.seed=0"),
    ("--config.optimizer.learning_rate=3e-3", "--config.method.alpha=32", "--config.method.dropout=0.3", "--config.train.seed=1"),
    ("--config.optimizer.learning_rate=1e-3", "--config.method.alpha=16", "--config.method.dropout=0.2", "--config.train.seed=0"),
)
DECAYS = ("0.0", "0.1", "0.3")
DROPOUTS = ("0.0", "0.1", "0.3")


def members(name, folder, *flags):
    """Returns three experiments that differ in every number."""
    found = []
    for numbers, decay, rate in zip(NUMBERS, DECAYS, DROPOUTS, strict=True):
        given = experiments.load(name)
        source = (f"--config.model.source={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}")
        varied = (f"--config.optimizer.weight_decay={decay}", f"--config.model.attention_dropout={rate}")
        if name != "lora_llama2":
            varied += (f"--config.model.hidden_dropout={rate}",)
        found.append(overrides.parse_flags(given, [*source, *SAME, *flags, *numbers, *varied]))
    return found


def lines(workdir):
    """Returns what metrics.jsonl holds, times aside."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def exported(workdir):
    return safetensors.numpy.load_file(next((workdir / "export").glob("*/*.safetensors")))


def files(workdir):
    """Returns the paths of a run's files, but for those whose names are the time's."""
    found = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith(("tensorboard", "checkpoints"))} | {
        path.name for path in (workdir / "checkpoints").iterdir()
    }


def check_alike(alone, together):
    """Holds a member's folder to that of its run alone, to float32 rounding."""
    assert files(together) == files(alone)
    assert json.loads((together / "config.json").read_text()) == json.loads((alone / "config.json").read_text())
    ours, theirs = lines(together), lines(alone)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-4, atol=1e-6)
    weights, reference = exported(together), exported(alone)
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, reference[name], rtol=1e-3, atol=2e-5, err_msg=name)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (together, alone))
    assert ours.keys() == theirs.keys()
    for when, figures in theirs["eval"].items():
        assert ours["eval"][when] == pytest.approx(figures, rel=1e-4, abs=1e-6)


@pytest.fixture
def programs(monkeypatch):
    """Returns a list that gets the places of each program that is compiled."""
    made = []

    class Noted(population.Program):
        def __init__(self, runs, places, varying):
            made.append(places)
            super().__init__(runs, places, varying)

    monkeypatch.setattr(population, "Program", Noted)
    return made


@pytest.fixture(scope="module")
def llamas(material, tmp_path_factory):
    """Three runs of a tiny Llama in two places: their experiments and folders, and what came of them."""
    runs, folder = members("lora_llama2", material, *LLAMA), tmp_path_factory.mktemp("llamas")
    folders = [folder / str(number) for number in range(3)]
    return runs, folders, train_population(runs, folders, places=2)


@pytest.mark.slow
def test_members_of_a_population_of_llamas_end_as_they_do_alone(llamas, tmp_path):
    for number, (experiment, folder, found) in enumerate(zip(*llamas, strict=True)):
        assert found["steps"] == 6
        run.train(experiment, tmp_path / str(number))
        check_alike(tmp_path / str(number), folder)


@pytest.mark.slow
def test_members_of_a_population_of_berts_with_dropout_end_as_they_do_alone(reviews, tmp_path, programs):
    runs = members("full_bert_sentiment", reviews, *BERT)
    folders = [tmp_path / f"together{number}" for number in range(3)]
    train_population(runs, folders, places=2)
    assert programs == [2]  # the third one takes a place that fell free, in the same program
    for number, (experiment, folder) in enumerate(zip(runs, folders, strict=True)):
        run.train(experiment, tmp_path / str(number))
        check_alike(tmp_path / str(number), folder)


@pytest.mark.slow
def test_a_population_that_was_stopped_goes_on_and_ends_with_the_same_bytes(llamas, tmp_path, monkeypatch):
    runs, whole, _ = llamas
    folders = [tmp_path / str(number) for number in range(3)]
    for moment in (5, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, moment)
            assert {} in train_population(runs, folders, places=2)
    assert all(found["steps"] == 6 for found in train_population(runs, folders, places=2))
    for folder, other in zip(folders, whole, strict=True):
        assert lines(folder) == lines(other)
        for name, weight in exported(folder).items():
            assert weight.tobytes() == exported(other)[name].tobytes()
    before = [(folder / "summary.json").stat().st_mtime_ns for folder in folders]
    train_population(runs, folders, places=2)  # what is finished is left alone
    assert [(folder / "summary.json").stat().st_mtime_ns for folder in folders] == before


@pytest.mark.slow
def test_a_run_that_fails_and_one_that_is_pruned_leave_their_places(llamas, tmp_path, programs):
    runs, whole, _ = llamas
    broken = dataclasses.replace(runs[0], optimizer=dataclasses.replace(runs[0].optimizer, learning_rate=1e38))
    asked = []

    def prune(number, step, metrics):
        asked.append((number, step, "loss" in metrics))
        return number == 1

    folders = [tmp_path / str(number) for number in range(3)]
    failed, pruned, last = train_population([broken, runs[1], runs[2]], folders, prune, places=2)
    assert "isn't finite" in failed["error"]
    assert pruned == {"pruned": 2}
    assert last["steps"] == 6
    assert programs == [2]
    assert (1, 2, True) in asked
    assert not (folders[0] / "summary.json").exists()
    assert not (folders[1] / "summary.json").exists()
    assert (folders[1] / "checkpoints" / "2").is_dir()
    for one, other in zip(lines(folders[2]), lines(whole[2]), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_runs_that_differ_in_numbers_fit_each_other(tmp_path):
    runs = members("full_bert_sentiment", tmp_path, *BERT)
    ranks = dataclasses.replace(runs[0], method=dataclasses.replace(runs[0].method, rank=8))
    without = dataclasses.replace(runs[0], method=dataclasses.replace(runs[0].method, dropout=0.0))
    summed = [dataclasses.replace(one, method=one.method + experiments.load("bitfit_bert_sentiment").method) for one in runs[:2]]
    semi = experiments.load("semi_supervised_bert_sentiment")
    assert populations([*runs, ranks, without, *summed, semi, semi]) == [[0, 1, 2], [3], [4], [5, 6], [7], [8]]


def test_runs_that_do_not_fit_are_refused(tmp_path):
    runs = members("full_bert_sentiment", tmp_path, *BERT)
    other = dataclasses.replace(runs[0], train=dataclasses.replace(runs[0].train, batch_size=2))
    with pytest.raises(UserError, match="differ in more than numbers"):
        train_population([runs[0], other], [tmp_path / "0", tmp_path / "1"])
    with pytest.raises(UserError, match="a folder of its own"):
        train_population(runs[:2], [tmp_path / "0", tmp_path / "0"])
