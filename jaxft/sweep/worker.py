"""What a worker's process does: it takes runs, one after the other, until none is left.

It imports what runs need once, and gives each run a process of its own by forking: a run that dies takes nothing with it, what it peaked at
in memory is its own, and it pays for no imports. The worker itself must start no JAX backend and no thread, which no fork survives.
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.errors import UserError
from jaxft.sweep.runs import DONE, ENDED, FAILED, PRUNED, RUNNING, WAITING, Folder, held, is_held, write_json

POLL = 0.2  # seconds between looks at what others write
PATIENCE = 120.0  # seconds that a run gets to write its checkpoint and end
LAST_WORDS = 10.0  # seconds that a process gets to end after its answer
_STOPPED = "stopped"  # in the place of an answer: it was told to end


def work(path: str, session: int, attached: bool, seconds: float = math.inf) -> None:
    """Runs what queue.json of the sweep's folder has, until nothing is left or the sweep has ended.

    Args:
      path: of the sweep's folder.
      session: the start of the sweep that this worker belongs to.
      attached: whether it ends with the sweep's own process; on a cluster it goes on.
      seconds: that it has: then its run is told to write a checkpoint and end, for another worker to go on with.
    """
    until = time.monotonic() + seconds
    from jaxft.sweep import population  # noqa: F401 - what every run needs: imported once, before the first fork
    from jaxft.train import run  # noqa: F401

    parent = os.getppid()
    folder = Folder(pathlib.Path(path))
    alive = (lambda: os.getppid() == parent and is_held(folder.owner)) if attached else (lambda: time.monotonic() < until)
    while alive():
        queue = folder.queue()
        if queue.get("session") != session:
            return
        if queue["jobs"] is None:
            _check(folder, alive)
        elif not any(_take(folder, job, session, alive) for job in queue["jobs"]):
            if not queue["open"]:
                return
            time.sleep(POLL)


def _check(folder: Folder, alive: Callable[[], bool]) -> None:
    """Has all runs checked by a process of its own, unless another worker does so."""
    with held(folder.check_lock) as mine:
        if not mine or folder.checked.exists():
            time.sleep(POLL)
            return
        from jaxft.sweep import check

        log = folder.path / "check.log"
        death, found = _forked(check.check, (folder,), log, alive, lambda: False)
        if death is not None:
            found = f"The check of the runs died. {death} What it printed is in {log}."
        if found != _STOPPED:
            write_json(folder.checked, {"error": found, "groups": None} if isinstance(found, str) else {"error": None, "groups": found})


def _take(folder: Folder, job: Sequence[str], session: int, alive: Callable[[], bool]) -> bool:
    """Runs a job, the IDs of one run or of a population, if it is free and not at its end: whether it did."""
    if all(folder.state(run).state in ENDED for run in job):
        return False
    with folder.locks(job) as mine:
        if not mine:
            return False
        for run in job:
            folder.settle(run, session, folder.log(job[0]))
        left = [run for run in job if folder.state(run).state not in ENDED]
        together = len(left) > 1 and not any(folder.has_died(run, session) for run in left)  # one that kills the others is found alone
        for part in [left] if together else [[run] for run in left]:
            if not alive():
                break
            if not together:  # members of a population say themselves when they begin: what is charged to a run is what befell it
                folder.begin(part[0], session)
            pruned = lambda part=part: all(folder.prune(run).exists() for run in part)  # noqa: E731
            log = folder.log(job[0] if together else part[0])
            death, errors = _forked(_train, (folder, part, session), log, alive, pruned)
            _note(folder, part, session, death, errors if isinstance(errors, dict) else {}, pruned(), log)
    return bool(left)


def _note(
    folder: Folder, part: Sequence[str], session: int, death: str | None, errors: dict[str, str], pruned: bool, log: pathlib.Path
) -> None:
    """Writes what became of the runs of a process that has ended, as far as it hasn't said so itself."""
    left = [run for run in part if folder.state(run).state not in ENDED]
    if not any(folder.state(run).state == RUNNING for run in left):  # it ended before the first of them began, or between two
        charged = left if errors else left[:1] if death is not None else []
        for run in charged:
            folder.begin(run, session, shared=True)
    for run in left:
        if folder.state(run).state != RUNNING:
            continue
        if (folder.workdir(run) / "summary.json").is_file():
            folder.end(run, DONE)
        elif run in errors:
            folder.end(run, FAILED, error=errors[run])
        elif death is not None:
            folder.died(run, death, log)
        else:
            folder.end(run, PRUNED if pruned else WAITING)


def _train(folder: Folder, part: Sequence[str], session: int) -> dict[str, str]:
    """Trains a run, or a population; returns what the user did wrong, by the run. Of one that is done, its folder tells."""
    from jaxft.sweep.population import train_population
    from jaxft.train import run

    def tell(number: int, found: Mapping[str, Any] | None) -> None:
        if found is None:
            folder.begin(part[number], session, shared=True)
        elif "error" in found:
            folder.end(part[number], FAILED, found["error"])
        elif found:
            folder.end(part[number], DONE)

    try:
        experiments = [folder.experiment(name) for name in part]
        if len(part) == 1:
            run.train(experiments[0], folder.workdir(part[0]))
        else:
            train_population(experiments, [folder.workdir(name) for name in part], tell=tell)
    except UserError as error:
        return dict.fromkeys(part, str(error))
    return {}


# ---------------------------------------------------------------- a process of its own


def _forked(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: pathlib.Path, alive: Callable[[], bool], unwanted: Callable[[], bool]
) -> tuple[str | None, Any]:
    """Calls a function in a process of its own; returns why that died, or None, and what the function returned.

    It is told to end, by SIGTERM, where the sweep has ended or it is not wanted any more.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, arguments, log, theirs))
    process.start()
    theirs.close()
    told = None
    while not multiprocessing.connection.wait([ours, process.sentinel], timeout=POLL):
        if told is None and (unwanted() or not alive()):
            process.terminate()
            told = time.monotonic()
        if told is not None and time.monotonic() - told > PATIENCE:
            process.kill()
    try:
        answer = ours.recv() if ours.poll() else None
    except EOFError:
        answer = None
    process.join(LAST_WORDS)
    process.kill()
    process.join()
    if answer is not None or told is not None:
        return None, answer or _STOPPED
    return _reason(process.exitcode, log), None


def _reason(code: int | None, log: pathlib.Path) -> str:
    """Why a process ended, in a sentence."""
    if code is not None and code < 0:
        hint = ", by hand or for want of memory" if -code == signal.SIGKILL else ""
        return f"Its process was ended by {signal.Signals(-code).name}{hint}."
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
    return f"Its process ended with code {code}: {last}."


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], log: pathlib.Path, answer: Any) -> None:
    """What the process does: calls the function, says what it returned, and ends when its worker does."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):  # what they tell a worker, it tells by SIGTERM
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_worker, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        answer.send(function(*arguments))
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _end_with_worker() -> None:
    """Ends this process when the worker ends, however that was: nobody would note what it came to."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    multiprocessing.connection.wait([worker.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
