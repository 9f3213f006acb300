"""The plan of a run: what trains, and the memory and work of one step, from shapes alone: no weight is read or allocated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console
from jaxft.config import Experiment
from jaxft.data.unlabelled import real_tokens, step_batch
from jaxft.methods.partition import distinct, partition, size
from jaxft.models.registry import family_of
from jaxft.objectives.base import Step, objective_of
from jaxft.train import placement
from jaxft.train.data import TrainingData, load_training_data
from jaxft.train.folds import is_cross_validation, one_fold
from jaxft.train.loop import jitted_step
from jaxft.train.programs import operations
from jaxft.train.setup import Described, begin_state, describe_run, make_optimizer, print_trainable, shardings_of, with_own
from jaxft.train.state import State


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of a run. Memory is in bytes on each device."""

    trainable_parameters: int
    total_parameters: int
    memory: dict[str, int]  # by part
    host: dict[str, int]  # the same, of what lies in the host's memory for each device
    operations: int  # floating-point operations of the products of one step, on all devices together
    tokens: int  # in a step, without padding
    steps: int

    @property
    def memory_bytes(self) -> int:
        """The memory of a step."""
        return sum(self.memory.values())


def plan(experiment: Experiment) -> Plan:
    """Prints and returns the plan of an experiment: the parameter table, and the memory and work of one step on this machine's devices.

    The step is compiled for the run's own batch and asked what it needs; arrays are told by their shapes. Memory of generation, and of a
    method that looks at training batches before it begins, isn't in it.
    """
    run, rows = describe_run(one_fold(experiment, 0) if is_cross_validation(experiment) else experiment)  # folds are alike
    data = load_training_data(run.experiment, run.model, run.tokenizer, run.shapes, rows)
    shapes, mask = with_own(run, run.shapes, run.language_head.shapes)
    print_trainable(shapes, mask)
    found = _of_step(run, data, shapes, mask)
    parts = [(part, gibibytes(count)) for part, count in found.memory.items()]
    devices = f" on each of {run.mesh.size} devices" if run.mesh.size > 1 else ""
    console.table(f"Memory of a step{devices}", ("part", "GiB"), [*parts, ("in all", gibibytes(found.memory_bytes))])
    for part, count in found.host.items():
        console.say(f"The host's memory holds {gibibytes(count)} GiB of {part}{' for each device' if run.mesh.size > 1 else ''}.\n")
    console.say(
        f"The products of a step take {found.operations / 1e9:,.1f} GFLOP, {found.operations / found.tokens / 1e9:,.3f} for each of its "
        f"{found.tokens:,} tokens; the run has {data.steps:,} steps.\n"
    )
    return found


def gibibytes(count: int) -> str:
    """Returns bytes as people read them.

    >>> gibibytes(3 * 2**29)
    '1.500'
    """
    return f"{count / 2**30:,.3f}"


def _of_step(run: Described, data: TrainingData, shapes: Any, mask: Any) -> Plan:
    optimizer, table = make_optimizer(run, data.steps), family_of(run.model.config.architecture).module.PLACEMENT
    places = placement.shardings(shapes, table, run.mesh)
    trainable, frozen = partition(_placed(shapes, places), mask)
    state = jax.eval_shape(lambda trainable: begin_state(run, trainable, optimizer, data.slots), trainable)
    sharding = shardings_of(run, state, partition(places, mask)[0], optimizer)
    state = _placed(state, sharding)
    start = state.trainable if run.experiment.train.mixout else None
    rows_over_devices = jax.NamedSharding(run.mesh, placement.BATCH)
    whole = dict(step_batch(data.batches, data.unlabelled, 0))
    batch = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows_over_devices), whole)
    traced = jitted_step(run.experiment, run.model, optimizer, sharding, data.steps).trace(state, frozen, batch, start)
    used = traced.lower().compile().memory_analysis()
    rows = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    kept, offloaded = (count // rows for count in _kept_for_backward(run, state, frozen, batch, data.steps))
    on_host, on_device = partition(state.optimizer, jax.tree.map(placement.is_in_host_memory, state.optimizer))
    memory = {
        "frozen weights": _bytes(frozen),
        "trainable weights": _bytes(state.trainable),
        **({} if state.average is None else {"average of the weights": _bytes(state.average)}),
        **({} if start is None else {"weights before training": _bytes(start)}),
        **({} if state.objective is None else {"the objective's arrays": _bytes(state.objective)}),
        "optimizer": _bytes(on_device),
        "batch": _bytes(batch),
        "activations": min(kept, used.temp_size_in_bytes),
        "workspace": max(used.temp_size_in_bytes - kept, 0) + used.output_size_in_bytes - used.alias_size_in_bytes,
    }
    host = {name: count for name, count in {"optimizer": _bytes(on_host), "activations": offloaded}.items() if count}
    return Plan(
        size(trainable),
        size(shapes),
        memory,
        host,
        operations(traced.jaxpr.jaxpr),
        real_tokens(data.batches, data.unlabelled, 0),
        data.steps,
    )


def _placed(shapes: Any, places: Any) -> Any:
    """Shapes with their shardings; one that stands in several places stays one."""
    made: dict[int, Any] = {}

    def once(leaf: Any, place: Any) -> Any:
        return made.setdefault(id(leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))

    return jax.tree.map(once, shapes, places)


def _bytes(shapes: Any) -> int:
    """Bytes of these arrays on each device."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize for leaf in distinct(shapes))


def _kept_for_backward(run: Described, state: State, frozen: Any, batch: Any, steps: int) -> tuple[int, int]:
    """Bytes of what the forward pass of one micro-batch keeps for the backward pass, on all devices and their hosts; without weights."""
    objective, task, number = objective_of(run.experiment), run.experiment.task, jnp.int32(0)
    rngs = dict.fromkeys(("mask", "objective"), jax.random.key(0))

    def loss(trainable: Any, frozen: Any, micro: Any, arrays: Any) -> Any:
        shared = objective.shared(jax.tree.map(lambda leaf: leaf[None], micro), arrays, number, steps)
        return objective.sums(Step(task, run.model, frozen, rngs, {}, number, steps, shared), trainable, micro, arrays)[0].loss

    def backward(trainable: Any, *others: Any) -> Callable[..., Any]:
        return jax.vjp(lambda trainable: loss(trainable, *others), trainable)[1]

    micro = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape[1:], value.dtype), batch)
    program = jax.make_jaxpr(backward)(state.trainable, frozen, micro, state.objective).jaxpr
    given = set(map(id, program.invars))
    kept = {id(value): value.aval for value in program.outvars if id(value) not in given}
    counts = {jax.memory.Space.Device: 0, jax.memory.Space.Host: 0}
    for aval in kept.values():
        counts[aval.memory_space] += int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize
    return counts[jax.memory.Space.Device], counts[jax.memory.Space.Host]
