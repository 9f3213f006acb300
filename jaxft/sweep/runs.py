"""A sweep's runs and what its folder says of them.

sweep.json    what the sweep is: experiment, base configuration, metric, runs
queue.json    what its workers shall do now
runs/ID/      a run's own working folder, as --mode=train writes it
runs/ID.json  the state of a run
runs/ID.lock  held by the process that runs it; the system lets it go when that one ends, however it ends
runs/ID.log   what the run printed
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import overrides
from jaxft.config import Experiment
from jaxft.errors import UserError

WAITING, RUNNING, DONE, FAILED, PRUNED = "waiting", "running", "done", "failed", "pruned"
ENDED = (DONE, FAILED, PRUNED)
NO_VALIDATION = (
    "A sweep chooses on validation, and there are no rows for it. Give config.data.validation, or a share of the training rows by "
    "config.data.split."
)
ATTEMPTS = 2  # of a run that dies
_SLUG = 60  # characters of an ID after its number
_SHORT = {"optimizer.learning_rate": "lr", "train.seed": "seed", "model.quantization": ""}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    id: str  # its number among all, and what it is: 007-lora-lr1e-3-seed1
    overrides: dict[str, Any]  # by path, as JSON holds them
    group: int | None = None  # number of the population that it trains in, or None: alone


@dataclasses.dataclass(frozen=True)
class State:
    """What became of a run so far."""

    state: str = WAITING
    attempts: int = 0
    error: str | None = None
    began: str | None = None  # ISO time of the newest attempt
    ended: str | None = None
    host: str | None = None
    shared: bool = False  # whether the newest attempt trains in one program with others
    session: int = 0  # start of the sweep in which the newest attempt began
    deaths: int = 0  # attempts of that session that ended without a word


def name_runs(found: Sequence[Mapping[str, Any]], first: int = 0) -> list[Run]:
    """Returns runs of these overrides, numbered from `first`.

    >>> from jaxft.methods import LoRA
    >>> name_runs([{"method": LoRA(rank=16, dora=True), "optimizer.learning_rate": 1e-3, "train.seed": 1}], first=7)[0].id
    '007-lora-rank16-dora-lr1e-3-seed1'
    """
    runs = []
    for number, values in enumerate(found, start=first):
        slug = "-".join(filter(None, (_slug(path, value) for path, value in values.items())))[:_SLUG].strip("-.")
        runs.append(Run(f"{number:03d}-{slug}".rstrip("-"), {path: overrides.as_json(_python(value)) for path, value in values.items()}))
    return runs


def _python(value: Any) -> Any:
    """A number of NumPy's, as np.logspace gives them, as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _slug(path: str, value: Any) -> str:
    """What an ID says of one override."""
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        changed = [_slug(field.name, inner) for field, inner in fields if inner != field.default]
        return "-".join([type(value).__name__.lower(), *filter(None, changed)])
    name = _SHORT.get(path, path.rpartition(".")[2].replace("_", ""))
    if isinstance(value, bool):
        return name if value else f"no{name}"
    text = _number(value) if isinstance(value, float) else str(value)
    return name + re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")


def _number(value: float) -> str:
    """A number as short as it can be read.

    >>> _number(2.5e-4), _number(16.0), _number(0.1)
    ('2.5e-4', '16', '0.1')
    """
    if not math.isfinite(value) or not value or 0.1 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.4e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


# ---------------------------------------------------------------- the folder


class Folder:
    """The folder of a sweep."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.runs = path / "runs"
        self.checked = path / "checked.json"  # what the check of all runs came to
        self.check_lock = path / "check.lock"  # held by the worker that checks them
        self.owner = path / "sweep.lock"  # held by the sweep's own process

    def workdir(self, run: str) -> pathlib.Path:
        """Returns the working folder of a run."""
        return self.runs / run

    def log(self, run: str) -> pathlib.Path:
        """Returns where what a run prints is kept."""
        return self.runs / f"{run}.log"

    def prune(self, run: str) -> pathlib.Path:
        """Returns the file that asks for the end of a run."""
        return self.runs / f"{run}.prune"

    def lock_file(self, run: str) -> pathlib.Path:
        """Returns the file of a run's lock."""
        return self.runs / f"{run}.lock"

    def lock(self, run: str) -> Any:
        """Returns `held` of the run's lock."""
        return held(self.lock_file(run))

    @contextlib.contextmanager
    def locks(self, runs: Iterable[str]) -> Iterator[bool]:
        """Holds the locks of all these runs, if all are free: whether they were. Another start's jobs may have some of them."""
        with contextlib.ExitStack() as stack:
            yield all(stack.enter_context(self.lock(run)) for run in runs)

    def state(self, run: str) -> State:
        """Returns the state of a run; that of one that nothing was said of is waiting."""
        path = self.runs / f"{run}.json"
        try:
            return State(**(read_json(path) or {}))
        except TypeError as error:
            raise UserError(f"{path} isn't of this version of jaxft: {error}. Choose another --workdir.") from error

    def write_state(self, run: str, state: State) -> None:
        """Says what became of a run: only who holds its lock may."""
        write_json(self.runs / f"{run}.json", dataclasses.asdict(state))

    def begun(self) -> bool:
        """Returns whether any run ever began."""
        return any(self.runs.glob("*.json"))

    def sweep(self) -> dict[str, Any]:
        """Returns sweep.json, or an empty dictionary where there is none."""
        found = read_json(self.path / "sweep.json") or {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path / 'sweep.json'} holds no sweep. Put it back, or choose another --workdir.")
        return found

    def write_sweep(self, found: Mapping[str, Any]) -> None:
        """Writes sweep.json."""
        write_json(self.path / "sweep.json", found)

    def queue(self) -> dict[str, Any]:
        """Returns queue.json: "session", "jobs" (lists of IDs that run in one process) or None before the check, "open"."""
        return read_json(self.path / "queue.json") or {}

    def write_queue(self, session: int, jobs: Sequence[Sequence[str]] | None, open: bool) -> None:
        """Writes queue.json; `open`: more may come, so workers wait for it."""
        write_json(self.path / "queue.json", {"session": session, "jobs": jobs, "open": open})

    def experiment(self, run: str) -> Experiment:
        """Returns the configuration of a run; raises `UserError` for overrides that no run can have."""
        found = self.sweep()
        (values,) = (one["overrides"] for one in found["runs"] if one["id"] == run)
        return run_experiment(found, values)

    def retry(self, run: str) -> None:
        """Lets a run that failed in an earlier start wait for another attempt."""
        if self.state(run).state == FAILED:
            with self.lock(run) as free:
                if free:
                    self.write_state(run, dataclasses.replace(self.state(run), state=WAITING, deaths=0))

    def evaluations(self, run: str, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric at each of a run's evaluations on validation so far."""
        found, name = {}, f"validation_{metric}"
        with contextlib.suppress(FileNotFoundError):
            for line in (self.workdir(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                    if name in (values := json.loads(line)):
                        found[values["step"]] = values[name]
        return sorted(found.items())

    # What becomes of a run, said by who holds its lock

    def begin(self, run: str, session: int, shared: bool = False) -> None:
        """Notes that an attempt begins, alone or in one program with others, of a run that was settled and hasn't ended."""
        state = self.state(run)
        began: dict[str, Any] = {
            "state": RUNNING,
            "attempts": state.attempts + 1,
            "began": now(),
            "ended": None,
            "host": socket.gethostname(),
            "shared": shared,
            "session": session,
            "deaths": state.deaths if self.has_died(run, session) else 0,
        }
        self.write_state(run, dataclasses.replace(state, **began))

    def has_died(self, run: str, session: int) -> bool:
        """Returns whether an attempt of this start of the sweep died."""
        state = self.state(run)
        return state.session == session and state.deaths > 0

    def settle(self, run: str, session: int, log: pathlib.Path) -> None:
        """Notes what an attempt came to that ended without saying so.

        Its results may be whole all the same. An attempt of an earlier start of the sweep was stopped with it, so it's no death. `log`:
        what its population printed, if it was in one.
        """
        state = self.state(run)
        if state.state != RUNNING:
            return
        if (self.workdir(run) / "summary.json").is_file():
            self.end(run, DONE)
        elif state.session == session:
            self.died(
                run,
                "Its process ended without a word, as one does that is killed, by hand or for want of memory.",
                log if state.shared else None,
            )

    def end(self, run: str, state: str, error: str | None = None) -> None:
        """Notes what a run came to."""
        self.write_state(run, dataclasses.replace(self.state(run), state=state, error=error, ended=now()))

    def died(self, run: str, reason: str, log: pathlib.Path | None = None) -> None:
        """Notes that an attempt died; the run waits for another one, or has failed. `log`: what it printed, where not in its own."""
        state = self.state(run)
        deaths = state.deaths + 1
        error = f"{reason} What it printed is in {log or self.log(run)}."
        if deaths >= ATTEMPTS:
            error = f"It died {deaths} times. {error}"
        self.write_state(
            run, dataclasses.replace(state, state=FAILED if deaths >= ATTEMPTS else WAITING, error=error, ended=now(), deaths=deaths)
        )


def run_experiment(sweep: Mapping[str, Any], values: Mapping[str, Any]) -> Experiment:
    """Returns a run's configuration: the base's, with the sweep's metric naming the best checkpoint, and the run's overrides."""
    best = {"train.best_metric": sweep["metric"], "train.best_mode": sweep["mode"]}
    return overrides.with_values(overrides.from_dict(sweep["config"]), best | dict(values))


def now() -> str:
    """Returns the time, as ISO 8601 has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def read_json(path: pathlib.Path) -> Any:
    """Returns what a file holds, or None where there is none; raises `UserError` where it isn't JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}. Put it back, or choose another --workdir.") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes beside the place and renames, so that no reader sees half of it; raises `UserError` where the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}). Make room, or choose another --workdir.") from error


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[bool]:
    """Holds a file's lock, if it is free: whether it was. The system frees it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        yield _locked(file, fcntl.LOCK_EX)


def is_held(path: pathlib.Path) -> bool:
    """Returns whether some process holds a file's lock."""
    with path.open("a+") as file:
        return not _locked(file, fcntl.LOCK_SH)


def is_taken(path: pathlib.Path) -> bool:
    """Returns whether some process holds the lock of a file that may not be there yet."""
    return path.exists() and is_held(path)


def _locked(file: Any, kind: int) -> bool:
    """Locks a file, if that is free: whether it was; raises `UserError` on a file system that has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} can't be locked ({error.strerror}): a sweep needs a file system with locks. Choose another --workdir."
        ) from error
    return True
