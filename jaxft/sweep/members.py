"""Runs that differ in numbers alone, set up on one base: the model's weights are read once, and the rows once for each seed."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxft.config import Experiment
from jaxft.methods.partition import combine, of_base, partition
from jaxft.train import loggers
from jaxft.train.data import TrainingData, load_training_data
from jaxft.train.setup import Described, TrainingSetup, begin_params, begin_run, describe_run, print_trainable, read_base, with_head_of


@dataclasses.dataclass(frozen=True)
class Member:
    """A run, ready to step beside others."""

    run: Described
    setup: TrainingSetup
    own: Any  # of the frozen leaves those of the method, which may be another run's in no other run
    shared: Any  # the others, the base's

    @property
    def form(self) -> Any:
        """What runs of one program have in common: the shapes of all that a step takes, and the number of steps."""
        setup = self.setup
        return jax.tree.structure((setup.state, self.own, self.shared, setup.start)), _shapes(self), setup.steps

    def fits(self, other: "Member") -> bool:
        """Returns whether this run can train in the other's program, on the other's base."""
        return self.form == other.form and all(
            one is two for one, two in zip(jax.tree.leaves(self.shared), jax.tree.leaves(other.shared), strict=True)
        )


def _shapes(member: Member) -> Any:
    setup = member.setup
    given = (setup.state, member.own, member.shared, setup.start, dict(setup.batch(0)))
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(given)]


class Members:
    """Sets up the runs of a population."""

    def __init__(self) -> None:
        self._base: tuple[dict[str, Any], Any] | None = None  # what the rows said of the model, and the base as it was read
        self._data: dict[int, TrainingData] = {}  # by seed
        self._shared: Any = None  # the base's leaves, as the first run has them

    def set_up(self, experiment: Experiment) -> Member:
        """Returns a run; leaves of its base that are equal to those of the first one's are those."""
        loggers.check_installed(experiment.train.loggers)
        run, rows = describe_run(experiment)
        seed = experiment.train.seed
        if seed not in self._data:
            self._data[seed] = load_training_data(run.experiment, run.model, run.tokenizer, run.shapes, rows)
        params, mask = begin_params(run, self._data[seed], self._base_of(run))
        if self._shared is None:
            print_trainable(params, mask)
        setup = begin_run(run, self._data[seed], params, mask)
        own, shared = partition(setup.frozen, of_base(setup.frozen))[::-1]
        if self._shared is None:
            self._shared = shared
        elif jax.tree.map(lambda _: 0, shared) == jax.tree.map(lambda _: 0, self._shared):
            shared = jax.tree.map(_first_of_equals, self._shared, shared)
        return Member(run, dataclasses.replace(setup, frozen=combine(own, shared)), own, shared)

    def _base_of(self, run: Described) -> Any:
        if self._base is None or self._base[0] != run.options:
            self._base = run.options, read_base(run)
            return self._base[1]
        return with_head_of(run, self._base[1])


def _first_of_equals(one: jax.Array, two: jax.Array) -> jax.Array:
    """Returns `one` where both arrays are the same, so that the second one's memory is given up."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return two
    return one if _is_same_buffer(one, two) or np.array_equal(one, two) else two


def _is_same_buffer(one: jax.Array, two: jax.Array) -> bool:
    parts = [[part.data.unsafe_buffer_pointer() for part in array.addressable_shards] for array in (one, two)]
    return parts[0] == parts[1]
