"""--mode=sweep: all runs of an experiment's `sweep()`, then their report; stopped anywhere, it goes on where it was."""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.sweep import executor
from jaxft.sweep.conductor import Conductor
from jaxft.sweep.executor import Options, Workers
from jaxft.sweep.runs import DONE, FAILED, NO_VALIDATION, Folder, Run, State, held, is_held, name_runs, run_experiment
from jaxft.sweep.search import Searcher, check_search, described
from jaxft.sweep.space import Sweep

TAKEOVER, POLL = 5.0, 0.2  # seconds in which the lock of a process that just died is looked at again, and between looks


def sweep(experiment: Experiment, declared: Any, workdir: pathlib.Path, options: Options, given: Sequence[str] = ()) -> None:
    """Runs a sweep to its end, or goes on with it, and writes its report.

    Args:
      experiment: the base of all runs, with what `--config.PATH=VALUE` gave.
      declared: what the experiment's `sweep()` returned: a `Sweep`, or overrides alone.
      workdir: the sweep's folder.
      options: which runs, and where.
      given: paths that `--config` gave, which some run must leave as they are.

    Raises:
        UserError: for what can't be run, before the first run starts; or where every run failed, for what the first failed.
    """
    plan = _planned(experiment, declared, given)
    executor.check(options)
    runs = name_runs(tuple(plan.runs))
    chosen = _selected(runs, options, plan)
    folder = Folder(workdir)
    _check_folder(folder)
    with contextlib.ExitStack() as stack:
        with _owned(folder) as session:
            runs = _written(folder, _base(experiment, plan) | {"workers": options.workers}, runs)
            if plan.search is not None:
                trials = min(options.limit or plan.search.trials, plan.search.trials)
                chosen = runs[:trials]
            for run in chosen:
                folder.retry(run.id)
            workers = Workers(folder, options, session)
            stack.callback(workers.wait)  # once the lock is free, which ends them
            conductor = Conductor(folder, workers, session, options.workers)
            if plan.search is None:
                states = conductor.conduct(chosen)
            else:
                states = conductor.search(chosen, Searcher(plan.search, plan.mode), trials)
        _report(folder, states)


def _report(folder: Folder, states: Mapping[str, State]) -> None:
    """Writes the report, and says what came of the runs; raises `UserError` where none is done."""
    from jaxft.sweep import report  # matplotlib: seconds that a mistyped flag needn't wait for

    report.write(folder.path)
    failed = {run: state.error for run, state in states.items() if state.state == FAILED}
    done = sum(state.state == DONE for state in states.values())
    for run, error in failed.items():
        console.say(f"{run} failed. {error}")
    if not done and failed:
        raise UserError(f"Every run failed. The first, {next(iter(failed))}: {next(iter(failed.values()))}")
    console.say(f"{done} of {len(states)} runs are done. {folder.path / 'report.html'} compares them; report.md and results.json too.")


# ---------------------------------------------------------------- what is run


def _planned(experiment: Experiment, declared: Any, given: Sequence[str]) -> Sweep:
    """The sweep with its runs as a list; raises `UserError` for one that makes no sense."""
    if not isinstance(declared, Sweep):
        if not isinstance(declared, Iterable):
            raise UserError(f"sweep() of {experiment.name} returns {type(declared).__name__}, not a jaxft.sweep.Sweep.")
        declared = Sweep(declared, metric=experiment.train.best_metric, mode=experiment.train.best_mode)
    else:
        for path in sorted({"train.best_metric", "train.best_mode"} & set(given)):
            raise UserError(
                f"--config.{path} has no effect: the sweep goes by {declared.metric} ({declared.mode}). Change that in sweep()."
            )
    if not isinstance(declared.runs, Iterable) or isinstance(declared.runs, Mapping):
        raise UserError(f"A sweep's runs are a list of overrides, not {type(declared.runs).__name__}.")
    plan = dataclasses.replace(declared, runs=tuple(declared.runs))
    for one in plan.runs:
        if not isinstance(one, Mapping):
            raise UserError(f"A run of a sweep is a dictionary of overrides, as {{'train.seed': 1}}, not {one!r}.")
    if plan.mode not in ("min", "max"):
        raise UserError(f"The sweep's mode is min or max, not {plan.mode!r}.")
    if plan.search is not None:
        if plan.runs:
            raise UserError("A sweep has runs or a search, not both.")
        check_search(plan.search, experiment)
        _check_chosen_on(experiment)
        changes: list[Mapping[str, Any]] = [plan.search.space]
    else:
        changes = list(plan.runs)
        if not changes:
            raise UserError(f"sweep() of {experiment.name} yields no run: there is nothing to do.")
        _check_runs(experiment, plan, name_runs(changes))
    for path in given:
        if all(path in run or (path.partition(".")[0] in run and "." in path) for run in changes):
            raise UserError(f"--config.{path} has no effect: every run of the sweep sets it. Leave it out, or change sweep().")
    for path in plan.vary:
        if all(path not in run for run in changes):
            raise UserError(f"The sweep's `vary` names {path}, which no run sets.")
    return plan


def _check_runs(experiment: Experiment, plan: Sweep, runs: Sequence[Run]) -> None:
    """Raises `UserError` for overrides that no run can have, and for a run that is there twice."""
    base, seen = _base(experiment, plan), dict[str, str]()
    for run in runs:
        try:
            experiment = run_experiment(base, run.overrides)
            _check_chosen_on(experiment)
            found = json.dumps(overrides.to_dict(experiment), sort_keys=True)
        except UserError as error:
            raise UserError(f"Run {run.id} of the sweep: {error}") from error
        if found in seen:
            raise UserError(f"Runs {seen[found]} and {run.id} of the sweep are the same. Leave one of them out.")
        seen[found] = run.id


def _check_chosen_on(experiment: Experiment) -> None:
    """Raises `UserError` for a run without the one set of rows that it is chosen on."""
    data = experiment.data
    if data.folds and data.fold < 0:
        raise UserError(
            "A sweep chooses on one validation set, and config.data.folds holds out each part of the rows in its turn. Name one part by "
            "config.data.fold, or leave config.data.folds out."
        )
    if not data.folds and not data.validation and not data.split[1]:
        raise UserError(NO_VALIDATION)


def _base(experiment: Experiment, plan: Sweep) -> dict[str, Any]:
    """What sweep.json says of all runs."""
    return {
        "experiment": experiment.name,
        "config": overrides.to_dict(experiment),
        "metric": plan.metric,
        "mode": plan.mode,
        "vary": list(plan.vary),
        "search": described(plan.search) if plan.search else None,
        "versions": {},
        "device": {},
        "runs": [],
    }


def _selected(runs: Sequence[Run], options: Options, plan: Sweep) -> list[Run]:
    """The runs that `--sweep.filter` and `--sweep.limit` leave."""
    if plan.search is not None:
        if options.filter:
            raise UserError("sweep.filter chooses among runs that are known; a search proposes them. Leave it out.")
        return []
    try:
        pattern = re.compile(options.filter)
    except re.error as error:
        raise UserError(f"sweep.filter: '{options.filter}' is no regular expression: {error}.") from error
    found = [run for run in runs if pattern.search(run.id)]
    if not found:
        shown = ", ".join(run.id for run in runs[:5])
        raise UserError(f"sweep.filter: '{options.filter}' matches none of the {len(runs)} runs, as {shown}.")
    return found[: options.limit or None]


# ---------------------------------------------------------------- its folder


def _check_folder(folder: Folder) -> None:
    """Raises `UserError` unless the folder is free, or holds a sweep."""
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file. Choose another --workdir.")
    held = [path.name for path in folder.path.iterdir() if path != folder.owner] if folder.path.exists() else []
    if held and "sweep.json" not in held and not all(name.endswith(".partial") for name in held):
        raise UserError(f"{folder.path} isn't empty and holds no sweep of jaxft. Choose another --workdir.")


@contextlib.contextmanager
def _owned(folder: Folder) -> Iterator[int]:
    """Holds the sweep's lock, which its workers watch; yields the number of this start of the sweep."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.path} can't be written ({error.strerror}). Choose another --workdir.") from error
    until = time.monotonic() + TAKEOVER
    while is_held(folder.owner) and time.monotonic() < until:
        time.sleep(POLL)
    with held(folder.owner) as mine:
        if not mine:
            raise UserError(f"Another process runs the sweep in {folder.path}. Wait for it, end it, or choose another --workdir.")
        yield folder.queue().get("session", 0) + 1


def _written(folder: Folder, base: dict[str, Any], runs: Sequence[Run]) -> list[Run]:
    """Says in sweep.json what the sweep is, and returns its runs, those of a search that were proposed before among them.

    Runs may have come behind those that were there. Raises `UserError` where the folder holds another sweep of which a run has begun.
    """
    saved = folder.sweep() if folder.begun() else {}
    if not saved:  # what a sweep left that was refused
        folder.checked.unlink(missing_ok=True)
    known = [Run(**run) for run in saved.get("runs", [])]
    if saved:
        for name in ("experiment", "config", "search"):
            if changed := next(_differences(saved[name], base[name], name), None):
                raise _other(folder, changed)
        base |= {"versions": saved["versions"], "device": saved["device"]}
        base["workers"] = max(base["workers"], saved.get("workers", 1))  # what some of its runs had beside them
        if saved["metric"] != base["metric"] or saved["mode"] != base["mode"]:  # which names each run's best checkpoint
            raise _other(folder, f"its metric was {saved['metric']} ({saved['mode']}) and is {base['metric']} ({base['mode']})")
    if not base["search"]:
        for one, other in zip(known, [*runs, *[None] * len(known)], strict=False):
            if other is None or one.id != other.id or one.overrides != other.overrides:
                raise _other(folder, f"run {one.id} was in it and {'none is in its place' if other is None else f'{other.id} is'} now")
        if len(runs) > len(known):  # what came since isn't checked yet
            folder.checked.unlink(missing_ok=True)
        known += runs[len(known) :]
    folder.write_sweep(base | {"runs": [dataclasses.asdict(run) for run in known]})
    return known


def _other(folder: Folder, changed: str) -> UserError:
    return UserError(f"{folder.path} holds another sweep: {changed}. Give what it was begun with, or choose another --workdir.")


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    """What differs between two values of JSON, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from _differences(before.get(name), now.get(name), f"{path}.{name}")
    elif before != now:
        yield f"{path} was {before!r} and is {now!r}"
