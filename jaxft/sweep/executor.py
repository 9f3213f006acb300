"""Where workers run: processes of this machine, or jobs of Slurm; both by submitit."""

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jaxft
from jaxft.errors import UserError, unknown
from jaxft.sweep.runs import Folder

POLL, GOODBYE = 0.05, 150.0  # seconds between looks at workers, and for those that end with a checkpoint to write
LOCAL, SLURM = "local", "slurm"
_DAY = 60 * 24  # minutes
_SIGNAL = 10  # seconds before the end of a job of Slurm's at which submitit is told: after GOODBYE is over
_FOREVER = 365 * _DAY  # a local worker ends when its work does
_SLURM_ONLY = ("partition", "account", "time", "gpus", "cpus", "memory", "slurm")
_SUBMITIT = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "gpus": "gpus_per_node",
    "cpus": "cpus_per_task",
    "memory": "mem_gb",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What `--sweep.NAME` gives."""

    limit: int = 0  # the first so many runs alone; 0 is all
    filter: str = ""  # runs alone whose ID matches this regular expression
    executor: str = LOCAL  # local, slurm
    workers: int = 1  # runs at a time
    partition: str = ""  # Slurm's, of a worker's job
    account: str = ""
    time: int = 0  # minutes a worker's job may take; 0: a day
    gpus: int = 0  # a worker
    cpus: int = 0
    memory: int = 0  # gigabytes a worker
    slurm: tuple[str, ...] = ()  # other options of sbatch: qos=high, constraint=a100


def check(options: Options) -> None:
    """Raises `UserError` for an executor that isn't there, and for options that it hasn't."""
    if options.executor not in (LOCAL, SLURM):
        raise unknown("sweep.executor", options.executor, (LOCAL, SLURM))
    for name in ("limit", "time", "gpus", "cpus", "memory"):
        if getattr(options, name) < 0:
            raise UserError(f"sweep.{name} is 0 or more, not {getattr(options, name)}.")
    if options.workers < 1:
        raise UserError(f"sweep.workers is 1 or more, not {options.workers}.")
    for name in _SLURM_ONLY:
        if options.executor == LOCAL and getattr(options, name):
            raise UserError(f"sweep.{name} is an option of Slurm's jobs. Give --sweep.executor=slurm too, or leave it out.")
    if any(option.startswith(("time=", "signal=")) for option in options.slurm):
        raise UserError("sweep.slurm gives no time and no signal: a run must end in order before them. Give --sweep.time in minutes.")
    if wrong := next((option for option in options.slurm if not option.partition("=")[2]), None):
        raise UserError(f"sweep.slurm: '{wrong}' is no option of sbatch. Write NAME=VALUE, several with commas between them.")
    _submitit()
    missing = next((name for name in ("sbatch", "srun") if shutil.which(name) is None), None)
    if options.executor == SLURM and missing:
        raise UserError(f"There is no Slurm here: no program {missing} is found. Leave sweep.executor=slurm out to run on this machine.")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("Sweeps need submitit, which isn't installed: pip install 'jaxft[sweep]'.") from error
    return submitit


class Workers:
    """The workers of one start of a sweep."""

    def __init__(self, folder: Folder, options: Options, session: int):
        self._folder, self._options, self._session = folder, options, session
        self._jobs: list[Any] = []
        self.folder = folder.path / "workers"  # of what they print

    def start(self, count: int) -> None:
        """Starts workers until so many are at work."""
        for _ in range(count - len(self.running())):
            with _importable(), _deaf():
                self._jobs.append(self._executor().submit(_work, str(self._folder.path), self._session, *self._terms()))

    def running(self) -> Sequence[Any]:
        """Returns the jobs of workers that haven't ended."""
        self._jobs = [job for job in self._jobs if not job.done()]
        return self._jobs

    def wait(self) -> None:
        """Returns once all have ended: Slurm's are told to; those on this machine see that the sweep's lock is free."""
        if self._options.executor == SLURM:
            for job in self.running():
                job.cancel(check=False)
            return
        until = time.monotonic() + GOODBYE
        while self.running() and time.monotonic() < until:
            time.sleep(POLL)

    def _terms(self) -> tuple[bool, float]:
        """Whether a worker ends with this process, and the seconds it has: of Slurm's, less what a run takes to end in order."""
        limit = 60.0 * (self._options.time or _DAY)
        return (True, math.inf) if self._options.executor == LOCAL else (False, max(limit - GOODBYE, limit / 2))

    def _executor(self) -> Any:
        options, submitit = self._options, _submitit()
        made = submitit.AutoExecutor(folder=self.folder, cluster=options.executor)
        if options.executor == LOCAL:
            made.update_parameters(timeout_min=_FOREVER)
            return made
        given = {name: getattr(options, field) for field, name in _SUBMITIT.items() if getattr(options, field)}
        others = dict(option.split("=", 1) for option in options.slurm)
        given["slurm_signal_delay_s"] = _SIGNAL  # what it tells a worker then would end its run without a checkpoint
        made.update_parameters(name=self._folder.path.name, timeout_min=options.time or _DAY, slurm_additional_parameters=others, **given)
        return made


def _work(path: str, session: int, attached: bool, seconds: float) -> None:
    """What a worker's process is given to do: named here, so that submitting needs none of what runs need."""
    from jaxft.sweep import worker

    worker.work(path, session, attached, seconds)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Lets new processes import jaxft from where this one did."""
    before = os.environ.get("PYTHONPATH")
    place = str(pathlib.Path(jaxft.__file__).parents[1])
    os.environ["PYTHONPATH"] = place if not before else f"{place}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Starts processes that Ctrl-C doesn't reach: they end in order, when the sweep's own process has."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set; nor does Ctrl-C come there
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
