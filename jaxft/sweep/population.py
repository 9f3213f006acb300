"""Populations: runs that differ in numbers alone train in one program, on one base; each one's folder ends as if it had run alone."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.methods.partition import size_in_bytes
from jaxft.sweep import sizing
from jaxft.sweep.members import Member, Members
from jaxft.sweep.numbers import likeness, varying
from jaxft.sweep.program import Program
from jaxft.train import host_memory, run
from jaxft.train.evaluate import Evaluator
from jaxft.train.folds import is_cross_validation
from jaxft.train.loop import Course, Outcome, StopRequest
from jaxft.train.setup import TrainingSetup
from jaxft.train.state import State
from jaxft.train.workdir import summary_of

# (number of the member, steps done, metrics on validation) -> whether it stops here
Pruner = Callable[[int, int, Mapping[str, float]], bool]
# (number of the member, what came of it, or None as it begins)
Teller = Callable[[int, Mapping[str, Any] | None], None]


def populations(experiments: Sequence[Experiment]) -> list[list[int]]:
    """Returns the runs that should train together, by their numbers in `experiments`; each stands in one list, alone where none fits.

    Runs that differ only in numbers (learning rate, seed, alpha, weight decay, dropout rate, data order) fit each other. Which of them
    step side by side, and how many there may be, `jaxft.sweep.sizing` says.
    """
    groups: dict[Any, list[int]] = {}
    for number, experiment in enumerate(experiments):
        groups.setdefault(likeness(experiment) if _can_share(experiment) else number, []).append(number)
    return [part for group in groups.values() for part in sizing.cut(group)]


def _can_share(experiment: Experiment) -> bool:
    """Whether a run's step is one that several can take at once."""
    return experiment.objective is None and not is_cross_validation(experiment) and not experiment.optimizer.offload


def train_population(
    experiments: Sequence[Experiment],
    workdirs: Sequence[pathlib.Path],
    prune: Pruner | None = None,
    places: int = 0,
    tell: Teller = lambda number, found: None,
) -> list[dict[str, Any]]:
    """Trains runs of one of `populations` in one program, each in its folder; returns what came of each.

    A run's folder holds what `jaxft.train.run.train` would leave; times in its summary are its share of the program's. The same call goes
    on with what was stopped or killed at any step, and leaves alone what is finished. A run that fails takes no other with it.

    Args:
      experiments: of the runs.
      workdirs: of each.
      prune: asked after each evaluation on validation; where it says True, the run ends there without a summary, and another takes its
        place.
      places: runs that step at once; 0 is what pays on this machine. The others wait for a place.
      tell: called as a run begins, and when it has ended, with what is returned of it.

    Returns:
      of each run its summary; {} where a signal stopped the program before its end; {"error": message} where it failed; {"pruned": steps}
      where it was pruned.

    Raises:
      UserError: runs that can't train in one program, or folders that aren't one for each.
    """
    if len({likeness(experiment) for experiment in experiments}) > 1 or not all(map(_can_share, experiments)):
        raise UserError(
            "These runs can't train together: they differ in more than numbers (learning rate, weight decay, seed, alpha, dropout rates), "
            "or have an objective, folds or an offloaded optimizer. jaxft.sweep.population.populations says which can."
        )
    if len({workdir.absolute() for workdir in workdirs}) != len(experiments):
        raise UserError(f"There are {len(experiments)} runs and {len({*workdirs})} folders; each run has a folder of its own.")
    return _Population(experiments, workdirs, prune, places, tell).train()


@dataclasses.dataclass
class _Seat:
    """A run in its place."""

    number: int
    member: Member
    begun: run.Begun
    course: Course
    elapsed: Callable[[], float]  # seconds that were spent on it
    index: int  # the next step
    first: int  # the step that it began with
    compile_seconds: float = 0.0
    prepared: Any = None  # the next step's batch

    @property
    def ended(self) -> bool:
        """Whether no step is left to do."""
        return self.index == self.member.setup.steps or self.course.given_up()

    def take(self) -> Any:
        """The next step's batch: prepared while the one before ran, or made now."""
        return self.member.setup.batch(self.index) if self.prepared is None else self.prepared

    def prepare(self) -> None:
        """Makes the batch of the step after the next one."""
        self.prepared = self.member.setup.batch(self.index + 1)

    def close(self) -> None:
        """Lets go of the run's folder. Of a run that failed, the error is told already."""
        self.course.close()
        with contextlib.suppress(UserError):
            self.begun.checkpoints.close()


class _Shares:
    """The program's time, dealt out among the runs that it was spent on."""

    def __init__(self) -> None:
        self._since, self._for = time.perf_counter(), [0]
        self._spent: dict[int, float] = collections.defaultdict(float)

    def spend_on(self, numbers: Sequence[int]) -> None:
        """Time from now on is these runs'."""
        self._settle()
        self._for = list(numbers) or self._for

    def of(self, number: int) -> float:
        """Returns the seconds of a run so far."""
        self._settle()
        return self._spent[number]

    def _settle(self) -> None:
        now = time.perf_counter()
        for number in self._for:
            self._spent[number] += (now - self._since) / len(self._for)
        self._since = now


class _Population:
    """Trains all runs: as many at once as there are places, the others as places fall free."""

    def __init__(
        self, experiments: Sequence[Experiment], workdirs: Sequence[pathlib.Path], prune: Pruner | None, places: int, tell: Teller
    ):
        self._experiments, self._workdirs, self._prune, self._places, self._tell = experiments, workdirs, prune, places, tell
        self._members, self._shares = Members(), _Shares()
        self._evaluator: Evaluator | None = None  # the first one, whose program all have
        self._before: dict[str, dict[str, float]] = {}  # evaluations before training
        self._found: dict[int, dict[str, Any]] = {}
        self._waiting: collections.deque[int] = collections.deque()
        self._begun: set[int] = set()

    def train(self) -> list[dict[str, Any]]:
        """Trains them; returns what came of each."""
        others = list(range(len(self._experiments)))
        while others:
            self._waiting, others = collections.deque(others), []
            if self._train_alike(others):
                break
        return [self._found.get(number, {}) for number in range(len(self._experiments))]

    def _train_alike(self, others: list[int]) -> str:
        """Trains those of the waiting runs that fit the first of them in all shapes, and notes the others; returns a signal's name."""
        self._shares.spend_on(self._waiting)
        first = self._next(None, others)
        if first is None:
            return ""
        # However many are left, the program is the same: with other places the same run would end with other last bits.
        places = min(self._places or _places_for(first.member.setup), len(self._experiments))
        seats = [first]
        while len(seats) < places and (seat := self._next(first.member, others)) is not None:
            seats.append(seat)
        together = [*(seat.number for seat in seats), *self._waiting]
        self._shares.spend_on(together)
        began = time.perf_counter()
        varied = varying(self._experiments, first.member.run)
        program = Program([seat.member for seat in seats], places, varied)
        compile_seconds = (time.perf_counter() - began) / len(together)
        table: list[_Seat | None] = [*seats, *[None] * (places - len(seats))]
        for place, seat in enumerate(seats):
            self._sit(program, place, seat, compile_seconds)
        with StopRequest() as request, host_memory.kept() as memory:
            while any(table) and not request.name:
                self._step(program, table, memory)
                for place, seat in enumerate(table):
                    if seat is None and not request.name and (new := self._next(first.member, others)) is not None:
                        program.put(place, new.member)
                        self._sit(program, place, new, compile_seconds)
                        table[place] = new
        for place, seat in enumerate(table):
            if seat is not None:
                seat.course.keep(program.state(place, seat.member.setup.state_sharding))
                seat.close()
        if request.name:
            console.say(f"\nStopped by {request.name}. The same command goes on from there.")
        return request.name

    def _next(self, like: Member | None, others: list[int]) -> _Seat | None:
        """The next of the waiting runs that has steps to do, where it fits `like`; what doesn't fit is put to the others."""
        while self._waiting:
            number = self._waiting.popleft()
            if like is not None:
                self._shares.spend_on([number])
            try:
                run.prepare(self._experiments[number], self._workdirs[number])
                if summary := summary_of(self._workdirs[number]):
                    self._end(number, summary)
                    continue
                console.say(f"Run {number + 1} of {len(self._experiments)}, in {self._workdirs[number]}.\n")
                member = self._members.set_up(self._experiments[number])
                if like is not None and not member.fits(like):
                    others.append(number)
                    continue
                self._tell_begin(number)
                seat = self._begin(number, member)
                if not seat.ended:
                    return seat
                self._finish(seat, seat.begun.state)
            except UserError as error:
                self._fail(number, error)
        return None

    def _begin(self, number: int, member: Member) -> _Seat:
        """Opens a run's folder."""
        experiment, workdir = self._experiments[number], self._workdirs[number]
        evaluator = Evaluator(member.setup, self._evaluator)
        self._evaluator = self._evaluator or evaluator
        same = _start_of(experiment)
        begun = run.begin(experiment, member.setup, workdir, evaluator, self._before.get(same))
        self._before.setdefault(same, begun.progress.before)
        start, before = int(begun.state.step), begun.progress.elapsed

        def elapsed() -> float:
            return before + self._shares.of(number)

        course = Course(member.setup, workdir, begun.checkpoints, evaluator, begun.progress, start, elapsed)
        return _Seat(number, member, begun, course, elapsed, start, start)

    def _sit(self, program: Program, place: int, seat: _Seat, compile_seconds: float) -> None:
        """Puts the run's state in its place, and gives up what it was made of."""
        if seat.index:
            program.set_state(place, seat.begun.state)
        seat.compile_seconds = compile_seconds
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), seat.begun.state)
        setup = dataclasses.replace(seat.member.setup, state=abstract, start=None)
        seat.member = dataclasses.replace(seat.member, setup=setup)
        seat.begun = dataclasses.replace(seat.begun, setup=setup, state=abstract)

    def _step(self, program: Program, table: list[_Seat | None], memory: host_memory.Kept) -> None:
        """One step of the runs in all places, and what each does after it; those that end leave their places."""
        seats = {place: seat for place, seat in enumerate(table) if seat is not None}
        self._shares.spend_on([seat.number for seat in seats.values()])
        began, batches = time.perf_counter(), {place: seat.take() for place, seat in seats.items()}
        any_batch = next(iter(batches.values()))  # for places that nobody needs
        on_devices = program.step([batches.get(place, any_batch) for place in range(len(table))])
        for seat in seats.values():
            seat.prepare()  # while an accelerator works
        metrics = jax.device_get(on_devices)
        memory.settle()
        seconds = (time.perf_counter() - began) / len(seats)
        for place, seat in seats.items():
            self._shares.spend_on([seat.number])
            own = {name: float(value[place]) for name, value in metrics.items()}
            try:
                over = self._after(program, place, seat, own, seconds)
            except UserError as error:
                self._fail(seat.number, error)
                seat.close()
                over = True
            if over:
                table[place] = None

    def _after(self, program: Program, place: int, seat: _Seat, metrics: dict[str, float], seconds: float) -> bool:
        """What a run does after its step; returns whether it leaves its place."""
        sharding = seat.member.setup.state_sharding
        seat.course.log(seat.index, metrics, seconds, seat.index > seat.first)
        seat.index += 1
        if seat.course.is_due(seat.index):
            seat.course.after(program.state(place, sharding), seat.index, lambda: False)
            if self._is_pruned(seat):
                self._end(seat.number, {"pruned": seat.index})
                seat.close()
                return True
        if not seat.ended:
            return False
        self._finish(seat, program.state(place, sharding))
        return True

    def _is_pruned(self, seat: _Seat) -> bool:
        measured = seat.course.measured
        if self._prune is None or measured is None or seat.index == seat.member.setup.steps:
            return False
        return self._prune(seat.number, seat.index, measured)

    def _finish(self, seat: _Seat, state: State) -> None:
        """Measures, exports and reports a run that has come to its end."""
        seat.begun.checkpoints.wait()
        outcome = Outcome(state, seat.course.progress, seat.compile_seconds, seat.course.logs)
        self._end(seat.number, run.finish(seat.begun, outcome, seat.elapsed))

    def _tell_begin(self, number: int) -> None:
        if number not in self._begun:
            self._begun.add(number)
            self._tell(number, None)

    def _end(self, number: int, found: dict[str, Any]) -> None:
        """Notes and tells what came of a run."""
        self._tell_begin(number)
        self._found[number] = found
        self._tell(number, found)

    def _fail(self, number: int, error: UserError) -> None:
        self._end(number, {"error": str(error)})
        console.say(f"\nRun {number + 1} of {len(self._experiments)}, in {self._workdirs[number]}, failed: {error}\n")


def _places_for(setup: TrainingSetup) -> int:
    """As many places as pay on this machine, and fit it."""
    model: Any = setup.model
    tokens = setup.batches.tokens_per_row * setup.experiment.train.batch_size
    each = sizing.bytes_of(setup.state, tokens, model.config, np.dtype(model.dtype).itemsize)
    return sizing.side_by_side(tokens, each, size_in_bytes(setup.frozen))


def _start_of(experiment: Experiment) -> str:
    """What decides on a run's model before training, among runs of one likeness."""
    method = overrides.to_dict(experiment)["method"]
    return json.dumps([experiment.train.seed, method], sort_keys=True)
