"""The sweep's own process: it says what is to be done, sees what becomes of it, and has enough workers at it."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

from jaxft.errors import UserError
from jaxft.sweep import sizing
from jaxft.sweep.executor import Workers
from jaxft.sweep.progress import Progress
from jaxft.sweep.runs import ENDED, RUNNING, Folder, Run, State, is_taken, name_runs, read_json
from jaxft.sweep.search import Searcher

POLL = 0.25  # seconds between looks at the runs
_LOST = 3  # starts of workers in a row of which none took a run


class Conductor:
    """Conducts one start of a sweep, whose lock it holds."""

    def __init__(self, folder: Folder, workers: Workers, session: int, count: int):
        self._folder, self._workers, self._session, self._count = folder, workers, session, count
        self._states: dict[str, State] = {}
        self._lost, self._attempts = 0, 0

    def conduct(self, runs: Sequence[Run]) -> Mapping[str, State]:
        """Returns the states of runs once all have ended; raises `UserError` for runs that can't be, before the first starts."""
        self._look(runs)
        progress = self._progress(len(runs))
        try:
            jobs = [[run.id] for run in runs]
            if len(runs) > 1:  # one is checked by itself
                jobs = self._grouped({run.id for run in runs}, self._checked())
            self._folder.write_queue(self._session, jobs, open=False)
            while left := self._unfinished(jobs):
                self._have_workers(left)
                time.sleep(POLL)
                self._look(runs)
                self._settle(jobs)
                progress.show(self._states)
            return self._states
        finally:
            progress.close()

    def search(self, runs: Sequence[Run], searcher: Searcher, trials: int) -> Mapping[str, State]:
        """Returns the states of `trials` runs, those that are known and others that the searcher proposes, once all have ended.

        Raises `UserError` for what is wrong with the first that it proposes: most of that is wrong with all.
        """
        runs = list(runs)
        self._look(runs)
        progress = self._progress(trials)
        try:
            for run in runs:
                searcher.adopt(run)
                self._observe(searcher, [run])
            if not runs:
                self._propose(searcher, runs, trials)
                self._checked()
                self._folder.write_queue(self._session, [[run.id] for run in runs], open=True)
            while True:
                self._propose(searcher, runs, trials)
                jobs = [[run.id] for run in runs]
                if not (left := self._unfinished(jobs)):
                    self._folder.write_queue(self._session, jobs, open=False)
                    return self._states
                self._have_workers(left)
                time.sleep(POLL)
                self._look(runs)
                self._settle(jobs)
                self._observe(searcher, runs)
                progress.show(self._states)
        finally:
            progress.close()

    # ------------------------------------------------------------ what is to be done

    def _checked(self) -> list[list[str]]:
        """The groups of runs that train together, once a worker found nothing wrong with any of them."""
        while (found := read_json(self._folder.checked)) is None:
            self._folder.write_queue(self._session, None, open=True)
            if not is_taken(self._folder.check_lock):
                self._start_workers(1)
            time.sleep(POLL)
        if found["error"] is not None:
            self._folder.checked.unlink()  # another start looks anew
            raise UserError(found["error"])
        return list(found["groups"])

    def _grouped(self, chosen: set[str], groups: Sequence[Sequence[str]]) -> list[list[str]]:
        """The chosen runs in jobs: populations of earlier starts, then of those that haven't ended what `groups` says."""
        sweep = self._folder.sweep()
        known = {run["id"]: run["group"] for run in sweep["runs"]}
        left = {run for run in chosen if known[run] is None and self._states[run].state not in ENDED}
        free = [group for group in ([run for run in group if run in left] for group in groups) if group]
        at_work = {known[run] for run in chosen if known[run] is not None and self._states[run].state not in ENDED}
        free = sizing.split(free, max(self._count - len(at_work), 1))
        number = 1 + max((group for group in known.values() if group is not None), default=-1)
        for group in (group for group in free if len(group) > 1):
            known |= dict.fromkeys(group, number)
            number += 1
        self._folder.write_sweep(sweep | {"runs": [run | {"group": known[run["id"]]} for run in sweep["runs"]]})
        jobs: dict[object, list[str]] = {}
        for run, group in known.items():
            if run in chosen:
                jobs.setdefault(run if group is None else group, []).append(run)
        return list(jobs.values())

    def _propose(self, searcher: Searcher, runs: list[Run], trials: int) -> None:
        """Adds runs to those that are at work, one a worker."""
        fresh = False
        while len(runs) < trials and sum(self._states[run.id].state not in ENDED for run in runs) < self._count:
            if (proposed := searcher.propose(len(runs))) is None:
                break
            (run,) = name_runs([proposed], first=len(runs))
            searcher.adopt(run)
            runs.append(run)
            self._states[run.id] = State()
            fresh = True
        if fresh:
            self._folder.write_sweep(self._folder.sweep() | {"runs": [dataclasses.asdict(run) for run in runs]})
        if fresh or self._folder.queue().get("session") != self._session:
            self._folder.write_queue(self._session, [[run.id] for run in runs], open=True)

    def _observe(self, searcher: Searcher, runs: Sequence[Run]) -> None:
        """Tells the searcher what came of runs so far, and asks for the end of those that it gives up."""
        metric = self._folder.sweep()["metric"]
        for run in runs:
            state = self._states[run.id].state
            if searcher.observe(run.id, state, self._folder.evaluations(run.id, metric)) and state not in ENDED:
                self._folder.prune(run.id).touch()

    # ------------------------------------------------------------ what becomes of it

    def _look(self, runs: Sequence[Run]) -> None:
        """Reads the states of the runs that haven't ended."""
        for run in runs:
            if (known := self._states.get(run.id)) is None or known.state not in ENDED:
                self._states[run.id] = self._folder.state(run.id)
        self._note_versions(runs)

    def _note_versions(self, runs: Sequence[Run]) -> None:
        """Takes the versions and the device from the first run that says what it runs with."""
        begun = [run.id for run in runs if self._states[run.id].attempts]
        if not begun or (sweep := self._folder.sweep())["versions"]:
            return
        if found := read_json(self._folder.workdir(begun[0]) / "config.json"):
            self._folder.write_sweep(sweep | {"versions": found["versions"], "device": found["device"]})

    def _settle(self, jobs: Sequence[Sequence[str]]) -> None:
        """Notes the end of runs whose process is gone and that say they run."""
        for job in jobs:
            running = [run for run in job if run in self._states and self._states[run].state == RUNNING]
            if not running:
                continue
            with self._folder.locks(job) as free:
                for run in running if free else ():
                    self._folder.settle(run, self._session, self._folder.log(job[0]))
                    self._states[run] = self._folder.state(run)

    def _unfinished(self, jobs: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        return [job for job in jobs if any(run in self._states and self._states[run].state not in ENDED for run in job)]

    def _have_workers(self, jobs: Sequence[Sequence[str]]) -> None:
        """Starts workers where fewer are at work than there is work for; a job that an earlier start's run is still ending isn't."""
        wanted = min(self._count, len(jobs))
        if len(self._workers.running()) < wanted and any(self._is_free(job) for job in jobs):
            self._start_workers(wanted)

    def _is_free(self, job: Sequence[str]) -> bool:
        return not any(is_taken(self._folder.lock_file(run)) for run in job)

    def _start_workers(self, wanted: int) -> None:
        """Starts workers where fewer are at work; raises `UserError` where they end without taking any run."""
        if len(self._workers.running()) >= wanted:
            return
        attempts = sum(state.attempts for state in self._states.values())
        self._lost = self._lost + 1 if attempts == self._attempts else 0
        self._attempts = attempts
        if self._lost > _LOST:
            raise UserError(f"Workers end before they take a run. What they printed is in {self._workers.folder}.")
        self._workers.start(wanted)

    def _progress(self, total: int) -> Progress:
        sweep = self._folder.sweep()
        return Progress(self._folder, sweep["metric"], sweep["mode"], self._states, total)
