"""The loop: steps, evaluation, checkpoints, early stopping; stopped anywhere, it goes on as if it had never been."""

import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jax
import optax
from flax import linen as nn

from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.objectives.base import objective_of
from jaxft.train import loggers, placement
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
    stopped: str = ""  # the signal that stopped it before its end


class Loop:
    """Trains one run to its end, or to a signal."""

    def __init__(self, setup: TrainingSetup, workdir: pathlib.Path, checkpoints: Checkpoints, evaluator: Evaluator, began: float):
        self._began = began  # time.perf_counter() when the program started
        self._setup, self._checkpoints, self._evaluator = setup, checkpoints, evaluator
        self._workdir = workdir
        self._train = setup.experiment.train
        self._schedule = make_schedule(setup.experiment.optimizer, setup.steps)
        self._observed = Observed(setup, workdir)
        self._prepared: dict[int, dict[str, jax.Array]] = {}  # the next step's batch

    def run(self, state: State, progress: Progress) -> Outcome:
        """Runs from `state` to the last step; raises `UserError` on a loss that isn't finite."""
        start = int(state.step)
        began, before = time.perf_counter(), progress.elapsed
        step = self._compile(state)
        compile_seconds = time.perf_counter() - began
        logs = Logs(self._workdir, start, self._setup.steps, loggers.opened(self._setup.experiment, self._workdir, start))
        self._observed.look(state)
        complete = False
        try:
            with StopRequest() as request:
                for index in range(start, self._setup.steps):
                    if self._given_up(progress):
                        logs.say(f"Stopped early: {self._train.best_metric} hasn't improved for {progress.stale} evaluations.")
                        break
                    state, progress, measured = self._advance(step, state, progress, index, index > start, logs)
                    last = index + 1 == self._setup.steps
                    due = (index + 1) % self._train.checkpoint_every == 0
                    if measured or last or due or request.name:
                        elapsed = before + time.perf_counter() - self._began
                        self._checkpoints.save(state, dataclasses.replace(progress, elapsed=elapsed))
                    if request.name:
                        break
            self._checkpoints.wait()
            complete = not request.name
            return Outcome(state, progress, compile_seconds, request.name)
        finally:
            logs.close(complete)

    def _given_up(self, progress: Progress) -> bool:
        return bool(self._train.patience) and progress.stale >= self._train.patience

    def _advance(self, step: Any, state: State, progress: Progress, index: int, timed: bool, logs: Logs) -> tuple[State, Progress, bool]:
        """One step, what is written of it, and the evaluation where it is time: whether it was."""
        began = time.perf_counter()
        state, on_device = step(state, self._setup.frozen, self._take(index), self._setup.start)
        if index + 1 < self._setup.steps:
            self._prepared = {index + 1: self._batch(index + 1)}  # while the devices work
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        seconds = time.perf_counter() - began
        self._check_finite(metrics, index)
        tokens = self._setup.real_tokens(index)
        progress = dataclasses.replace(progress, train_loss=metrics["loss"])
        if timed:  # the first one also pays for what starts only once
            progress = dataclasses.replace(progress, seconds=progress.seconds + seconds, tokens=progress.tokens + tokens)
        self._log(logs, index + 1, metrics, tokens, seconds)
        self._observed.look(state)
        if warning := objective_of(self._setup.experiment).warning(state.objective, index + 1, self._setup.steps):
            logs.say(f"Warning: {warning}")
        return self._evaluate(state, progress, index + 1, logs)

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

    def _log(self, logs: Logs, step: int, metrics: dict[str, float], tokens: int, seconds: float) -> None:
        metrics.pop("finite")
        metrics["learning_rate"] = float(self._schedule(step - 1))
        metrics["tokens_per_second"] = tokens / seconds
        logs.advance(metrics["loss"], metrics["tokens_per_second"])
        if step % self._train.log_every == 0 or step == self._setup.steps:
            logs.write(step, metrics)

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

    def _evaluate(self, state: State, progress: Progress, step: int, logs: Logs) -> tuple[State, Progress, bool]:
        """Measures on validation where it is time, and says whether it was; the objective hears of it."""
        examples = self._setup.examples.get("validation")
        every = self._train.eval_every
        if examples is None or not (step == self._setup.steps or (every and step % every == 0)):
            return state, progress, False
        found = self._evaluator.measure(state, examples).metrics
        logs.say(f"Step {step}: validation {', '.join(figure(name, value) for name, value in found.items())}")
        apart, progress = self._measure_gap(state, progress, step, found["loss"], logs)
        logs.write(step, {f"validation_{name}": value for name, value in found.items()} | apart)
        state = self._told(state, found)
        metric = found[self._train.best_metric]
        sign = 1 if self._train.best_mode == "min" else -1
        if progress.best is None or sign * metric < sign * progress.best:
            return state, dataclasses.replace(progress, best=metric, best_step=step, stale=0), True
        return state, dataclasses.replace(progress, stale=progress.stale + 1), True

    def _told(self, state: State, found: Mapping[str, float]) -> State:
        """The state with the objective's arrays after an evaluation, where the step expects them."""
        if state.objective is None:
            return state
        arrays = objective_of(self._setup.experiment).evaluated(state.objective, found)
        return dataclasses.replace(state, objective=jax.device_put(arrays, self._setup.state_sharding.objective))

    def _measure_gap(self, state: State, progress: Progress, step: int, validation: float, logs: Logs) -> tuple[dict[str, float], Progress]:
        """The loss on training examples measured as on validation, how far they are apart, and what is remembered of it."""
        if not self._setup.experiment.eval.gap:
            return {}, progress
        training = self._evaluator.loss(state, self._setup.examples["train"], self._evaluator.gap_sample)
        gap = progress.gap.after(step, validation, training)
        if gap.warned and not progress.gap.warned:
            logs.say(gap.warning(validation, training))
        return {"train_eval_loss": training, "gap": validation - training}, dataclasses.replace(progress, gap=gap)
