"""What a worker says of runs while it is at them; the processes that would train are left out."""

import pytest

from jaxft.sweep import worker
from jaxft.sweep.runs import DONE, FAILED, RUNNING, WAITING, Folder

JOB = ["000-one", "001-two", "002-three"]
SESSION = 1


def states(folder):
    return [folder.state(run).state for run in JOB]


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_a_death_is_charged_to_the_members_at_work_and_then_each_is_tried_alone(tmp_path, monkeypatch, begun):
    """The first is done, the second at work, the third waits; or none has begun: then the first is charged, or no attempt would count."""
    folder, seen = Folder(tmp_path), []

    def forked(function, arguments, log, alive, unwanted):
        seen.append((list(arguments[1]), states(folder)))
        if len(seen) > 1:
            return None, {}
        for run in JOB[:begun]:
            folder.begin(run, SESSION, shared=True)
        if begun == 2:
            folder.end(JOB[0], DONE)
        return "Its process was ended by SIGKILL.", None

    monkeypatch.setattr(worker, "_forked", forked)
    assert worker._take(folder, JOB, SESSION, lambda: True)
    assert seen == [(JOB, [WAITING] * 3)]
    assert [folder.state(run).deaths for run in JOB] == [[1, 0, 0], [1, 0, 0], [0, 1, 0]][begun]
    charged = folder.state(JOB[max(begun - 1, 0)])
    assert str(folder.log(JOB[0])) in charged.error  # the one log that the program wrote
    left = JOB[begun == 2 :]
    assert worker._take(folder, JOB, SESSION, lambda: True)
    assert [run for (run,), _ in seen[1:]] == left
    for (run,), found in seen[1:]:
        assert [state == RUNNING for state in found] == [one == run for one in JOB]


def test_a_member_that_was_killed_after_its_end_is_still_one_of_a_population(tmp_path):
    folder = Folder(tmp_path)
    folder.begin(JOB[0], SESSION, shared=True)
    folder.workdir(JOB[0]).mkdir()
    (folder.workdir(JOB[0]) / "summary.json").write_text("{}")
    folder.settle(JOB[0], SESSION + 1, folder.log(JOB[0]))
    assert folder.state(JOB[0]).state == DONE
    assert folder.state(JOB[0]).shared
    folder.begin(JOB[1], SESSION, shared=True)
    folder.begin(JOB[1], SESSION)
    assert not folder.state(JOB[1]).shared


def test_a_worker_whose_time_is_over_leaves_its_run_to_another_one(tmp_path, monkeypatch):
    folder, told, clock = Folder(tmp_path), [], [0.0]

    def forked(function, arguments, log, alive, unwanted):
        told.append(alive())
        clock[0] = 61.0
        told.append(alive())
        return None, worker._STOPPED

    monkeypatch.setattr(worker, "_forked", forked)
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    folder.write_queue(SESSION, [[run] for run in JOB], open=True)
    worker.work(str(tmp_path), SESSION, attached=False, seconds=60.0)
    assert told == [True, False]
    assert states(folder) == [WAITING] * 3
    assert folder.state(JOB[0]).attempts == 1
    assert folder.state(JOB[0]).deaths == 0


def test_whose_summary_is_whole_is_done_whatever_came_after_it(tmp_path, monkeypatch):
    folder = Folder(tmp_path)

    def forked(function, arguments, log, alive, unwanted):
        folder.begin(JOB[0], SESSION, shared=True)
        folder.workdir(JOB[0]).mkdir()
        (folder.workdir(JOB[0]) / "summary.json").write_text("{}")
        return None, dict.fromkeys(JOB, "The disk is full.")

    monkeypatch.setattr(worker, "_forked", forked)
    worker._take(folder, JOB, SESSION, lambda: True)
    assert states(folder) == [DONE, WAITING, WAITING]


def test_what_no_program_can_have_fails_all_its_runs(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    monkeypatch.setattr(worker, "_forked", lambda *_: (None, dict.fromkeys(JOB, "There is no such model.")))
    worker._take(folder, JOB, SESSION, lambda: True)
    assert states(folder) == [FAILED] * 3


@pytest.mark.parametrize("shared", [True, False])
def test_a_death_that_is_found_later_names_the_log_that_there_is(tmp_path, shared):
    folder = Folder(tmp_path)
    folder.begin(JOB[1], SESSION, shared=shared)
    folder.settle(JOB[1], SESSION, folder.log(JOB[0]))
    assert f"{folder.log(JOB[0] if shared else JOB[1])}." in folder.state(JOB[1]).error
