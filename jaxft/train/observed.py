"""What an objective does to a few training rows in the course of a run, kept in its folder, and drawn at the end."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from jaxft.data.batches import Batch, each_once
from jaxft.errors import UserError
from jaxft.objectives.base import Step, objective_of
from jaxft.train import placement
from jaxft.train.setup import TrainingSetup
from jaxft.train.state import State, key_for

ROWS, LOOKS = 4, 12  # rows that are looked at, and looks a run, evenly over its steps
_FOLDER = "observed"


class Observed:
    """Looks at the first rows of a run's training set; without an objective that has something to see, it does nothing."""

    def __init__(self, setup: TrainingSetup, workdir: pathlib.Path):
        self._setup, self._folder = setup, workdir / _FOLDER
        self._objective = objective_of(setup.experiment)
        self._steps = {round(step) for step in np.linspace(0, setup.steps, LOOKS)} if self._objective.observes else set()

    @functools.cached_property
    def batch(self) -> Batch:
        """The rows, leaves (rows, ...)."""
        shares = self._setup.mesh.shape["data"] * self._setup.mesh.shape["fsdp"]
        return next(each_once(self._setup.batches.layout, -(-ROWS // shares) * shares))[1]

    def look(self, state: State) -> None:
        """Keeps what is to see after the state's step, where it is time."""
        if not self._steps or (step := int(state.step)) not in self._steps:
            return
        found = jax.device_get(self._program(state, self._setup.frozen, self.batch))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.savez(self._folder / f"{step}.npz", **found)
        except OSError as error:
            raise UserError(f"{self._folder} can't be written ({error.strerror}). Make room, or choose another --workdir.") from error

    def pictures(self) -> dict[str, bytes]:
        """Returns the pictures of all looks, by their files' names."""
        kept = []
        for step in sorted(self._steps):
            if (path := self._folder / f"{step}.npz").is_file():
                with np.load(path) as found:
                    kept.append((step, dict(found)))
        return self._objective.pictures(kept, self.batch, self._setup.tokenizer) if kept else {}

    @functools.cached_property
    def _program(self) -> Any:
        """(state, frozen, batch) -> arrays by name; compiled once."""
        setup = self._setup
        experiment, objective = setup.experiment, self._objective

        def see(state: State, frozen: Any, batch: Any) -> Any:
            seed = experiment.train.seed
            rngs = {"objective": key_for(seed, _FOLDER, state.step), "run": key_for(seed, "run")}
            step = Step(experiment.task, setup.model, frozen, rngs, {}, state.step, setup.steps)
            return objective.observe(step, state.trainable, batch, state.objective)

        return jax.jit(placement.on_mesh(see, setup.mesh))
