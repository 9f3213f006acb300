"""Which runs train together, and what a start of a sweep takes up again: without a process."""

import pytest
from sweep_folders import write_sweep

from experiments import full_bert_sentiment
from jaxft.errors import UserError
from jaxft.methods import BitFit, LoRA
from jaxft.overrides import as_json, to_dict
from jaxft.sweep import conductor as conductor_module
from jaxft.sweep import worker
from jaxft.sweep.conductor import Conductor
from jaxft.sweep.runs import DONE, FAILED, WAITING, Folder, Run

IDS = ["000", "001", "002", "003"]


def conductor_of(folder, groups=(None,) * 4):
    write_sweep(folder.path, [{"group": group, "overrides": {"train.seed": seed}} for seed, group in enumerate(groups)])
    found = Conductor(folder, None, session=1, count=1)
    found._look([Run(run, {}) for run in IDS])
    return found


def test_what_is_done_joins_no_population(tmp_path):
    folder = Folder(tmp_path)
    folder.end("000", DONE)
    jobs = conductor_of(folder)._grouped(set(IDS), [IDS])
    assert jobs == [["000"], ["001", "002", "003"]]
    assert [run["group"] for run in folder.sweep()["runs"]] == [None, 0, 0, 0]


def test_of_a_population_the_chosen_runs_alone_are_taken_up(tmp_path):
    folder = Folder(tmp_path)
    assert conductor_of(folder, (0, 0, 0, None))._grouped({"001", "003"}, [IDS]) == [["001"], ["003"]]


def test_a_run_that_an_earlier_starts_population_still_trains_is_not_taken(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    assert conductor_of(folder, (0, 0, 0, None))._grouped({"001"}, [IDS]) == [["001"]]
    monkeypatch.setattr(worker, "_forked", lambda *_: pytest.fail("It was trained twice."))
    with folder.locks(["000", "001", "002"]) as mine:
        assert mine
        assert not worker._take(folder, ["001"], 2, lambda: True)
        with folder.locks(["003", "002"]) as others:
            assert not others
    with folder.locks(["003", "002"]) as free:
        assert free


def test_no_worker_is_left_without_a_job_while_others_have_several_runs(tmp_path):
    conductor = conductor_of(Folder(tmp_path))
    conductor._count = 3
    assert conductor._grouped(set(IDS), [IDS]) == [["000"], ["001"], ["002", "003"]]


class Workers:
    """Those that end at once, without taking a run."""

    folder = "workers"

    def __init__(self):
        self.started = 0

    def running(self):
        return []

    def start(self, count):
        self.started += count


def test_a_run_that_an_earlier_start_is_still_ending_is_waited_for(tmp_path):
    folder = Folder(tmp_path)
    conductor = conductor_of(folder)
    conductor._workers = workers = Workers()
    with folder.lock("000"):
        for _ in range(10):
            conductor._have_workers([["000", "001"]])
    assert workers.started == 0
    for _ in range(conductor_module._LOST):
        conductor._have_workers([["000", "001"]])
    with pytest.raises(UserError, match="Workers end before they take a run"):
        conductor._have_workers([["000", "001"]])


def test_what_failed_waits_for_another_attempt(tmp_path):
    folder = Folder(tmp_path)
    folder.died("000", "It was killed.")
    folder.died("000", "It was killed.")
    folder.end("001", DONE)
    assert folder.state("000").state == FAILED
    for run in IDS:
        folder.retry(run)
    assert [folder.state(run).state for run in IDS[:3]] == [WAITING, DONE, WAITING]
    folder.died("000", "It was killed.")
    assert folder.state("000").state == WAITING  # of this start, its first death


def test_a_run_that_can_not_be_fails_alone(tmp_path, monkeypatch):
    folder, trained = Folder(tmp_path), []
    bad, good = ({"method": as_json(method), "method.rank": 2} for method in (BitFit(), LoRA(rank=4)))
    write_sweep(tmp_path, [{"overrides": bad}, {"overrides": good}], config=to_dict(full_bert_sentiment.get_config()))
    monkeypatch.setattr("jaxft.train.run.train", lambda experiment, workdir: trained.append(experiment.method.rank))
    assert "no field" in worker._train(folder, ["000"], 1)["000"]
    assert worker._train(folder, ["001"], 1) == {}
    assert trained == [2]
