"""The loop: steps, evaluation, checkpoints, early stopping; stopped anywhere, it goes on as if it had never been."""

import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import optax
from flax import linen as nn

from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.objectives.base import Supervised, objective_of
from jaxft.train import host_memory, loggers, placement
from jaxft.train.average import make_average
from jaxft.train.checkpoint import Checkpoints, Progress
from jaxft.train.evaluate import Evaluator
from jaxft.train.logs import Logs, figure
from jaxft.train.observed import Observed
from jaxft.train.optimizer import make_schedule
from jaxft.train.setup import TrainingSetup
from jaxft.train.state import State
from jaxft.train.step import make_step


def step_function(experiment: Experiment, model: nn.Module, optimizer: optax.GradientTransformation, steps: int) -> Any:
    """Returns the `make_step` of a run of so many steps."""
    train, penalty = experiment.train, experiment.method.penalty
    average = make_average(train, steps)
    return make_step(
        model,
        experiment.task,
        optimizer,
        train.seed,
        train.neftune_alpha,
        train.r_drop,
        penalty,
        average,
        train.mixout,
        objective_of(experiment),
        steps,
    )


def jitted_step(experiment: Experiment, model: nn.Module, optimizer: optax.GradientTransformation, sharding: State, steps: int) -> Any:
    """Returns the step of a run of so many, not compiled yet; the state that it takes is given up for the one it returns.

    What lies in the host's memory by `sharding` is on the devices during the step.
    """
    function = step_function(experiment, model, optimizer, steps)
    if experiment.optimizer.offload:
        function = _with_fetched(function, placement.in_device_memory(sharding.optimizer))
    mesh = jax.tree.leaves(sharding)[0].mesh
    return jax.jit(placement.on_mesh(function, mesh), donate_argnums=0, out_shardings=(sharding, None))


def _with_fetched(step: Any, places: Any) -> Any:
    """The step, of a state whose optimizer's part is first brought to `places`."""

    def fetching(state: State, *others: Any) -> Any:
        return step(dataclasses.replace(state, optimizer=jax.device_put(state.optimizer, places)), *others)

    return fetching


class StopRequest:
    """Remembers SIGTERM or Ctrl-C, so that the loop ends between two steps; a second one ends it at once."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    state: State
    progress: Progress
    compile_seconds: float
    logs: Logs  # open still where it came to its end: the last figures are to come
    stopped: str = ""  # the signal that stopped it before its end


class Course:
    """One run between its steps: what is checked, logged, measured and kept after each, and whether it ends early."""

    def __init__(
        self,
        setup: TrainingSetup,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        evaluator: Evaluator,
        progress: Progress,
        start: int,
        elapsed: Callable[[], float],
    ):
        """Opens the run's logs.

        Args:
          setup: of the run.
          workdir: the run's folder.
          checkpoints: in that folder.
          evaluator: of the run.
          progress: what it knows at its start.
          start: the steps done then.
          elapsed: returns the run's seconds so far.
        """
        self.progress = progress
        self.measured: dict[str, float] | None = None  # on validation after the newest step, where it was then
        self.logs = Logs(workdir, start, setup.steps, loggers.opened(setup.experiment, workdir, start))
        self._setup, self._workdir, self._checkpoints, self._evaluator = setup, workdir, checkpoints, evaluator
        self._train, self._elapsed = setup.experiment.train, elapsed
        self._schedule = make_schedule(setup.experiment.optimizer, setup.steps)
        self._observed = Observed(setup, workdir)

    def observe(self, state: State) -> None:
        """Lets the objective see what it looks at after the state's step."""
        self._observed.look(state)

    def given_up(self) -> bool:
        """Returns whether the run ends here, before its last step, and says why."""
        if not self._train.patience or self.progress.stale < self._train.patience:
            return False
        self.logs.say(f"Stopped early: {self._train.best_metric} hasn't improved for {self.progress.stale} evaluations.")
        return True

    def log(self, index: int, metrics: dict[str, float], seconds: float, timed: bool) -> None:
        """Writes what the step with this number gave; raises `UserError` on one that isn't finite.

        Args:
          index: of the step, from 0.
          metrics: of the step.
          seconds: that it took.
          timed: whether they count: a first step also pays for what starts only once.
        """
        self._check_finite(metrics, index)
        tokens = self._setup.real_tokens(index)
        self.progress = dataclasses.replace(self.progress, train_loss=metrics["loss"])
        if timed:
            seconds_before, tokens_before = self.progress.seconds, self.progress.tokens
            self.progress = dataclasses.replace(self.progress, seconds=seconds_before + seconds, tokens=tokens_before + tokens)
        self._write(index + 1, metrics, tokens, seconds)

    def is_due(self, step: int) -> bool:
        """Returns whether `after` has something to do with the state after so many steps; with an objective it always has."""
        observing = self._setup.experiment.objective is not None and not isinstance(self._setup.experiment.objective, Supervised)
        return observing or self._is_measured(step) or self._is_kept(step)

    def after(self, state: State, step: int, stopping: Callable[[], bool]) -> State:
        """Measures, and writes a checkpoint, where it is time after so many steps, or `stopping` says that there will be no other.

        Returns the state that the run goes on with: the objective hears of the figures.
        """
        self._observed.look(state)
        if warning := objective_of(self._setup.experiment).warning(state.objective, step, self._setup.steps):
            self.logs.say(f"Warning: {warning}")
        self.measured = None
        if self._is_measured(step):
            state = self._measure(state, step)
        if self.measured or self._is_kept(step) or stopping():
            self.keep(state)
        return state

    def keep(self, state: State) -> None:
        """Writes a checkpoint, where there is none of this step."""
        host_memory.give_back()
        self._checkpoints.save(state, dataclasses.replace(self.progress, elapsed=self._elapsed()))

    def close(self) -> None:
        """Closes the logs of a run that didn't come to its end."""
        self.logs.close()

    def _is_kept(self, step: int) -> bool:
        return step == self._setup.steps or step % self._train.checkpoint_every == 0

    def _is_measured(self, step: int) -> bool:
        every = self._train.eval_every
        return "validation" in self._setup.examples and (step == self._setup.steps or bool(every and step % every == 0))

    def _write(self, step: int, metrics: dict[str, float], tokens: int, seconds: float) -> None:
        metrics.pop("finite")
        metrics["learning_rate"] = float(self._schedule(step - 1))
        metrics["tokens_per_second"] = tokens / seconds
        self.logs.advance(metrics["loss"], metrics["tokens_per_second"])
        if step % self._train.log_every == 0 or step == self._setup.steps:
            self.logs.write(step, metrics)

    def _check_finite(self, metrics: dict[str, float], index: int) -> None:
        if metrics["finite"]:
            return
        self._checkpoints.wait()
        newest = self._checkpoints.latest()
        kept = f"The checkpoint of step {newest} is kept" if newest else "No checkpoint was written before it"
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        overflow = "; it is the update that overflows" if math.isfinite(loss) and math.isfinite(norm) else ""
        rows, numbers = self._setup.rows["train"], self._setup.examples["train"].rows
        places = ", ".join(dict.fromkeys(rows.place(int(numbers[example])) for example in self._setup.batches.examples_of(index)))
        raise UserError(
            f"Step {index + 1} isn't finite: the loss is {loss:g} and the gradient's norm {norm:g}{overflow}. {kept} in {self._workdir}. "
            f"Lower optimizer.learning_rate, set optimizer.clip_norm, or look at the rows of its batch: {places}."
        )

    def _measure(self, state: State, step: int) -> State:
        """Measures on validation; the objective hears of it."""
        found = self.measured = self._evaluator.measure(state, self._setup.examples["validation"]).metrics
        self.logs.say(f"Step {step}: validation {', '.join(figure(name, value) for name, value in found.items())}")
        apart = self._measure_gap(state, step, found["loss"])
        self.logs.write(step, {f"validation_{name}": value for name, value in found.items()} | apart)
        metric, best = found[self._train.best_metric], self.progress.best
        sign = 1 if self._train.best_mode == "min" else -1
        better = best is None or math.isnan(best) or sign * metric < sign * best  # the first one stands until there is a number
        changed = {"best": metric, "best_step": step, "stale": 0} if better else {"stale": self.progress.stale + 1}
        self.progress = dataclasses.replace(self.progress, **changed)
        return self._told(state, found)

    def _told(self, state: State, found: Mapping[str, float]) -> State:
        """The state with the objective's arrays after an evaluation, where the step expects them."""
        if state.objective is None:
            return state
        arrays = objective_of(self._setup.experiment).evaluated(state.objective, found)
        return dataclasses.replace(state, objective=jax.device_put(arrays, self._setup.state_sharding.objective))

    def _measure_gap(self, state: State, step: int, validation: float) -> dict[str, float]:
        """The loss on training examples measured as on validation, and how far they are apart; both are remembered."""
        if not self._setup.experiment.eval.gap:
            return {}
        training = self._evaluator.loss(state, self._setup.examples["train"], self._evaluator.gap_sample)
        gap = self.progress.gap.after(step, validation, training)
        if gap.warned and not self.progress.gap.warned:
            self.logs.say(gap.warning(validation, training))
        self.progress = dataclasses.replace(self.progress, gap=gap)
        return {"train_eval_loss": training, "gap": validation - training}


class Loop:
    """Trains one run to its end, or to a signal."""

    def __init__(self, setup: TrainingSetup, workdir: pathlib.Path, checkpoints: Checkpoints, evaluator: Evaluator, began: float):
        self._began = began  # time.perf_counter() when the program started
        self._setup, self._checkpoints, self._evaluator = setup, checkpoints, evaluator
        self._workdir = workdir
        self._prepared: dict[int, dict[str, jax.Array]] = {}  # the next step's batch

    def run(self, state: State, progress: Progress) -> Outcome:
        """Runs from `state` to the last step; raises `UserError` on a loss that isn't finite."""
        setup, start = self._setup, int(state.step)
        began, before = time.perf_counter(), progress.elapsed
        step = self._compile(state)
        compile_seconds = time.perf_counter() - began

        def elapsed() -> float:
            return before + time.perf_counter() - self._began

        course = Course(setup, self._workdir, self._checkpoints, self._evaluator, progress, start, elapsed)
        complete = False
        try:
            course.observe(state)
            with StopRequest() as request, host_memory.kept() as memory:
                for index in range(start, setup.steps):
                    if course.given_up():
                        break
                    state = self._advance(step, state, index, index > start, course)
                    memory.settle()
                    state = course.after(state, index + 1, lambda: bool(request.name))
                    if request.name:
                        break
            self._checkpoints.wait()
            complete = not request.name
            return Outcome(state, course.progress, compile_seconds, course.logs, request.name)
        finally:
            if not complete:
                course.close()

    def _advance(self, step: Any, state: State, index: int, timed: bool, course: Course) -> State:
        """One step, and what is written of it."""
        began = time.perf_counter()
        state, on_device = step(state, self._setup.frozen, self._take(index), self._setup.start)
        if index + 1 < self._setup.steps:
            self._prepared = {index + 1: self._batch(index + 1)}  # while an accelerator works
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        course.log(index, metrics, time.perf_counter() - began, timed)
        return state

    def _compile(self, state: State) -> Any:
        """The step's one program: compiled ahead, so that it can't be compiled again."""
        setup = self._setup
        jitted = jitted_step(setup.experiment, setup.model, setup.optimizer, setup.state_sharding, setup.steps)
        return jitted.lower(state, setup.frozen, self._batch(0), setup.start).compile()

    def _take(self, index: int) -> dict[str, jax.Array]:
        """The step's batch: prepared while the one before ran, or made now."""
        return self._prepared.pop(index, None) or self._batch(index)

    def _batch(self, index: int) -> dict[str, jax.Array]:
        return placement.place_batch(self._setup.batch(index), self._setup.mesh, placement.BATCH)
