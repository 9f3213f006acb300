"""One step of several runs: a program that they share, their states with a leading axis, one base for all."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.methods.partition import combine
from jaxft.models.mesh import ROWS
from jaxft.sweep.members import Member
from jaxft.sweep.numbers import Varying, with_values
from jaxft.train import placement
from jaxft.train.loop import step_function
from jaxft.train.setup import make_optimizer
from jaxft.train.state import State

_BATCH = P(None, None, ROWS)  # (places, accumulation, batch, ...)


class Program:
    """The step of runs that stand in so many places, compiled once; a run is put in the place of another without compiling again."""

    def __init__(self, members: Sequence[Member], places: int, varying: Varying):
        """Compiles the step, and puts the members in the first places.

        Args:
          members: of one form, one or more, at most `places`.
          places: runs that step at once.
          varying: the numbers that are arguments.
        """
        first = members[0]
        self._varying, self._mesh, self._shared = varying, first.setup.mesh, first.shared
        self._values = [varying.values(first.run)] * places
        filled = [*members, *[first] * (places - len(members))]  # a place that no run needs steps as the first one does
        self._held = _stacked([self._of(member) for member in filled], self._mesh)
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=_placed(self._held))
        self._get = jax.jit(lambda held, place: jax.tree.map(lambda leaf: leaf[place], held))
        for place, member in enumerate(members):
            self._values[place] = varying.values(member.run)
        self._step = self._compiled(first)

    def put(self, place: int, member: Member) -> None:
        """Gives a place to another run, at its first state."""
        self._values[place] = self._varying.values(member.run)
        self._held = self._put(self._held, self._of(member), place)

    def set_state(self, place: int, state: State) -> None:
        """Puts a state in the place of a run's own: that of a checkpoint, or what an objective made of it."""
        self._held = self._put(self._held, (state, *self._get(self._held[1:], place)), place)

    def state(self, place: int, like: State) -> State:
        """Returns the state of the run in a place, on buffers of its own; `like` says where it lies."""
        found: State = jax.device_put(self._get(self._held[0], place), like)
        return found

    def step(self, batches: Sequence[Any]) -> Any:
        """Steps the runs in all places, each with its batch; returns the metrics, (places,) each, on the devices."""
        state, own, start = self._held
        values = jax.device_put(_stacked_on_host(self._values), NamedSharding(self._mesh, P()))
        state, metrics = self._step(values, state, own, self._shared, self._placed_batch(batches), start)
        self._held = (state, own, start)
        return metrics

    @staticmethod
    def _of(member: Member) -> tuple[Any, Any, Any]:
        return member.setup.state, member.own, member.setup.start

    def _placed_batch(self, batches: Sequence[Any]) -> Any:
        return placement.place_batch(_stacked_on_host([dict(batch) for batch in batches]), self._mesh, _BATCH)

    def _compiled(self, first: Member) -> Any:
        run, steps = first.run, first.setup.steps

        def one(values: Any, state: State, own: Any, shared: Any, batch: Any, start: Any) -> Any:
            given = with_values(run, values)
            step = step_function(given.experiment, given.model, make_optimizer(given, steps), steps)
            return step(state, combine(own, shared), batch, start)

        function = placement.on_mesh(jax.vmap(one, in_axes=(0, 0, 0, None, 0, 0)), self._mesh)
        state, own, start = self._held
        jitted = jax.jit(function, donate_argnums=1, out_shardings=(_placed(state), None))
        values = jax.device_put(_stacked_on_host(self._values), NamedSharding(self._mesh, P()))
        batch = self._placed_batch([first.setup.batch(0)] * len(self._values))
        return jitted.lower(values, state, own, self._shared, batch, start).compile()


def _put(held: Any, member: Any, place: Any) -> Any:
    return jax.tree.map(lambda leaf, own: leaf.at[place].set(own), held, member)


def _stacked_on_host(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _stacked(trees: Sequence[Any], mesh: Any) -> Any:
    """The trees as one, each leaf where it lay, with an axis more that all devices have whole."""

    def stack(*leaves: Any) -> jax.Array:
        spec = leaves[0].sharding.spec if isinstance(leaves[0].sharding, NamedSharding) else ()
        return jax.device_put(jnp.stack(leaves), NamedSharding(mesh, P(None, *spec)))

    return jax.tree.map(stack, *trees)


def _placed(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
