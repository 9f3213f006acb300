"""What a worker says of runs while it is at them; the processes that would train are left out."""

from jaxft.sweep import worker
from jaxft.sweep.runs import RUNNING, WAITING, Folder

JOB = ["000-one", "001-two", "002-three"]
SESSION = 1


def states(folder):
    return [folder.state(run).state for run in JOB]


def test_members_tried_alone_run_one_after_the_other(tmp_path, monkeypatch):
    """A worker that dies at the first of them must cost the others none of their attempts."""
    folder, seen = Folder(tmp_path), []

    def forked(function, arguments, log, alive, unwanted):
        seen.append((list(arguments[1]), states(folder)))
        return ("Its process was ended by SIGKILL." if len(seen) == 1 else None), {}

    monkeypatch.setattr(worker, "_forked", forked)
    assert worker._take(folder, JOB, SESSION, lambda: True)
    assert seen == [(JOB, [RUNNING] * 3)]
    assert [folder.state(run).deaths for run in JOB] == [1, 1, 1]
    seen.append(None)
    assert worker._take(folder, JOB, SESSION, lambda: True)
    assert seen[2:] == [([run], [RUNNING if run == one else WAITING for one in JOB]) for run in JOB]
