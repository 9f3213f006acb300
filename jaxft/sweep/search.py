"""Optuna behind a sweep: it proposes runs, by what came of those before, and says which to stop early.

The study lives in memory. One that goes on is made anew from the runs' own folders, and each proposal has a seed of its own: with one
worker, a search that was stopped and went on proposes what one left alone does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft import overrides
from jaxft.config import Experiment
from jaxft.errors import UserError, unknown
from jaxft.sweep.runs import DONE, ENDED, PRUNED, Run
from jaxft.sweep.space import Draw, Search

_TRIES = 100  # proposals of what there was already, in a row
SAMPLERS, PRUNERS, NONE = ("random", "tpe"), ("asha", "median", "none"), "none"


def check_search(search: Search, experiment: Experiment) -> None:
    """Raises `UserError` for a search that can't be."""
    if search.sampler not in SAMPLERS:
        raise unknown("sampler", search.sampler, SAMPLERS)
    if search.pruner not in PRUNERS:
        raise unknown("pruner", search.pruner, PRUNERS)
    if search.trials < 1 or not search.space:
        raise UserError(f"A search has a space and 1 trial or more, not {len(search.space)} paths and {search.trials} trials.")
    if search.pruner != NONE and not experiment.train.eval_every:
        raise UserError(f"The pruner {search.pruner} goes by evaluations during training: set train.eval_every too.")
    for path, draw in search.space.items():
        if not isinstance(draw, Draw):
            raise UserError(f"A search draws {path} by uniform(), log_uniform() or choice(), not from {draw!r}.")
    for path, draw in search.space.items():  # one value of each, so that a wrong path or type is known before hours are spent
        for value in draw.values or (draw.low, draw.high):
            whole = {"method": experiment.method} if path != "method" else {}
            if path.partition(".")[0] in search.space and "." in path:
                continue  # the field of a method that is drawn too
            overrides.with_values(experiment, whole | {path: value})
    _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("A search needs Optuna, which isn't installed: pip install 'jaxft[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Searcher:
    """One study."""

    def __init__(self, search: Search, mode: str):
        optuna = _optuna()
        self._search, self._best = search, min if mode == "min" else max
        pruners = {"median": optuna.pruners.MedianPruner, "asha": optuna.pruners.SuccessiveHalvingPruner, NONE: optuna.pruners.NopPruner}
        self._study = optuna.create_study(direction="minimize" if mode == "min" else "maximize", pruner=pruners[search.pruner]())
        self._space = {path: _distribution(draw) for path, draw in search.space.items()}
        self._known: list[dict[str, Any]] = []  # what was proposed before
        self._is_spent = False
        self._trials: dict[str, Any] = {}  # of runs that aren't at their end
        self._reported: dict[str, int] = {}  # evaluations of these that were told

    def propose(self, number: int) -> dict[str, Any] | None:
        """Returns the overrides of the run of this number; `adopt` then makes it known. None: the space seems to have no other run.

        In the place of a run that there was already, a random one is proposed.
        """
        samplers, seed = _optuna().samplers, self._search.seed * 1_000_003 + number
        self._study.sampler = (samplers.TPESampler if self._search.sampler == "tpe" else samplers.RandomSampler)(seed=seed)
        for _ in range(_TRIES if not self._is_spent else 0):
            trial = self._study.ask(self._space)
            if trial.params not in self._known:
                self._asked = trial
                return {path: self._value(path, found) for path, found in trial.params.items()}
            self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            if not isinstance(self._study.sampler, samplers.RandomSampler):
                self._study.sampler = samplers.RandomSampler(seed=seed)
        self._is_spent = True
        return None

    def adopt(self, run: Run) -> None:
        """Takes a run as the newest proposal."""
        trial, self._asked = self._asked, None
        if trial is None:  # of an earlier start
            self._study.enqueue_trial({path: self._parameter(path, value) for path, value in run.overrides.items()})
            trial = self._study.ask(self._space)
        self._known.append(trial.params)
        self._trials[run.id], self._reported[run.id] = trial, 0

    _asked: Any = None

    def observe(self, run: str, state: str, evaluations: Sequence[tuple[int, float]]) -> bool:
        """Tells what is known of a run; returns whether it is to be stopped early.

        Args:
          run: its ID.
          state: its state.
          evaluations: (step, value of the metric) so far.
        """
        trial = self._trials.get(run)
        if trial is None:
            return False
        stop = False
        for step, value in evaluations[self._reported[run] :]:
            trial.report(value, step)
            stop = stop or trial.should_prune()
        self._reported[run] = len(evaluations)
        if state in ENDED:
            self._tell(self._trials.pop(run), state, [value for _, value in evaluations])
        return stop

    def _tell(self, trial: Any, state: str, values: Sequence[float]) -> None:
        states = _optuna().trial.TrialState
        if state == DONE and values:
            self._study.tell(trial, self._best(values))
        else:
            self._study.tell(trial, state=states.PRUNED if state == PRUNED and values else states.FAIL)

    def _value(self, path: str, found: Any) -> Any:
        """A parameter of Optuna's as the path's value."""
        values = self._search.space[path].values
        return values[found] if values else found

    def _parameter(self, path: str, value: Any) -> Any:
        """A path's value, as JSON holds it, as a parameter of Optuna's."""
        values = self._search.space[path].values
        return [overrides.as_json(one) for one in values].index(value) if values else value


def _distribution(draw: Draw) -> Any:
    distributions = _optuna().distributions
    if draw.values:
        return distributions.CategoricalDistribution(range(len(draw.values)))
    return distributions.FloatDistribution(draw.low, draw.high, log=draw.logarithmic)


def described(search: Search) -> Mapping[str, Any]:
    """Returns what makes a search itself, as JSON holds it: another number of trials is the same search."""
    space = {path: {**vars(draw), "values": [overrides.as_json(value) for value in draw.values]} for path, draw in search.space.items()}
    return {"space": space, "sampler": search.sampler, "pruner": search.pruner, "seed": search.seed}
