"""Where a run's figures go beside `metrics.jsonl` and TensorBoard: Weights & Biases, MLflow; none unless `train.loggers` names them."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.errors import UserError, unknown

RECORD = "loggers.json"  # in a run's folder: under which id each logger knows it, and what was written there
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # by a logger's name, which is also that of the module
_PROJECT = "jaxft"  # of Weights & Biases, where WANDB_PROJECT names none
_PARAMETERS = 100  # that MLflow takes at once
_LETTERS = 500  # of a parameter's value that every store of MLflow takes


class Logger(Protocol):
    """A service that one run's figures are written to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes figures of a step; steps never fall."""

    def close(self, complete: bool) -> None:
        """Ends it: `complete`, or stopped and to go on."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a logger is told of a run when it is opened."""

    id: str  # the one that it knows the run by; empty: a new run
    name: str
    experiment: str
    folder: pathlib.Path
    config: Mapping[str, Any]


class WandB:
    """Weights & Biases: offline in the run's folder, unless `WANDB_MODE` says otherwise; its other variables hold too."""

    def __init__(self, run: Run):
        import wandb

        self.id = run.id or uuid.uuid4().hex[:8]
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            group=run.experiment,
            name=run.name,
            id=self.id,
            resume=None if mode == "offline" else "allow",  # offline, the same id says it: `wandb sync` joins what has one
            dir=run.folder,
            config=dict(run.config),
            mode=mode,
            reinit="create_new",  # the runs of a population are open side by side
            settings=wandb.Settings(console="off", silent=True),
        )
        if mode == "offline":
            console.say(f"Weights & Biases: offline. `wandb sync {pathlib.Path(self._run.dir).parent}` sends the run.")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes figures of a step."""
        self._run.log(dict(values), step=step)

    def close(self, complete: bool) -> None:
        """Ends the run, or leaves it as one that failed."""
        self._run.finish(exit_code=0 if complete else 1)


class MLflow:
    """MLflow: files in `mlruns` of the run's folder, unless `MLFLOW_TRACKING_URI` names another store."""

    def __init__(self, run: Run):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask whether files are meant
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").absolute().as_uri())
        self.id = run.id or self._begin(run)
        self._client.update_run(self.id, status="RUNNING")
        if not run.id:
            fields = [Param(name, str(value)[:_LETTERS]) for name, value in run.config.items()]
            for start in range(0, len(fields), _PARAMETERS):
                self._client.log_batch(self.id, params=fields[start : start + _PARAMETERS])

    def _begin(self, run: Run) -> str:
        found = self._client.get_experiment_by_name(run.experiment)
        number = self._client.create_experiment(run.experiment) if found is None else found.experiment_id
        return str(self._client.create_run(number, run_name=run.name).info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes figures of a step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(name, float(value), now, step) for name, value in values.items()])

    def close(self, complete: bool) -> None:
        """Says how the run ended."""
        self._client.set_terminated(self.id, "FINISHED" if complete else "KILLED")


KNOWN: dict[str, Callable[[Run], Any]] = {"wandb": WandB, "mlflow": MLflow}


class Once:
    """A logger that gets no figure twice: what a resumed run computes again was written by the run that was stopped."""

    def __init__(self, name: str, run: Run, identity: str, goes_on: bool):
        """Opens the logger `name`: on the run it has of this folder, where that `goes_on` or is of the same `identity`."""
        self._name, self._folder, self._identity = name, run.folder, identity
        record = _records(run.folder).get(name, {})
        if not goes_on and record.get("identity") != identity:  # another run began here, and was given up before its first checkpoint
            record = {}
        self._step, self._names = int(record.get("step", 0)), list(record.get("names", ()))
        with self._explained("can't be opened"):
            self._logger = KNOWN[name](dataclasses.replace(run, id=record.get("id", "")))
            self._keep()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what isn't written yet of a step."""
        fresh = {name: value for name, value in values.items() if step > self._step or (step == self._step and name not in self._names)}
        if not fresh:
            return
        with self._explained("refused the figures of a step"):
            self._logger.write(step, fresh)
        self._names = ([] if step > self._step else self._names) + list(fresh)
        self._step = step
        self._keep()

    def close(self, complete: bool) -> None:
        """Ends the logger's run."""
        with self._explained("can't be closed"):
            self._logger.close(complete)

    def _keep(self) -> None:
        mine = {"id": self._logger.id, "identity": self._identity, "step": self._step, "names": self._names}
        path = self._folder / RECORD
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps({**_records(self._folder), self._name: mine}) + "\n", encoding="utf-8")
        temporary.replace(path)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns what a logger raises, which may be anything, into a message."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"The logger {self._name} {what}: {first}. The last whole checkpoint is kept: mend it and give the same command again, or "
                "leave config.train.loggers out."
            ) from error


def check(names: Sequence[str]) -> None:
    """Raises `UserError` for a logger that there isn't, or that is named twice."""
    for place, name in enumerate(names):
        if name not in KNOWN:
            raise unknown("logger", name, KNOWN)
        if name in names[:place]:
            raise UserError(f"train.loggers names {name} twice.")


def check_installed(names: Sequence[str]) -> None:
    """Raises `UserError` for a logger whose package isn't installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.loggers={name} needs a package that isn't installed. Install it: pip install {PACKAGES[name]}")


def opened(experiment: Experiment, workdir: pathlib.Path, start: int) -> tuple[Once, ...]:
    """Returns the experiment's loggers, open on the run of a folder, which goes on from the step `start`."""
    if not experiment.train.loggers:
        return ()
    config = dict(overrides.flat(overrides.to_dict(experiment)))
    identity = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    run = Run("", workdir.absolute().name, experiment.name, workdir, config)
    return tuple(Once(name, run, identity, goes_on=start > 0) for name in experiment.train.loggers)


def _records(folder: pathlib.Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found
