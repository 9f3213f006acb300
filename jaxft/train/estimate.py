"""What a step of a run needs: compiled for this machine's devices, or told from the program for others. From shapes alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console
from jaxft.config import Experiment
from jaxft.data.batches import SCORED_MULTIPLE
from jaxft.data.sources import SPLITS, is_on_hub
from jaxft.data.sources import load_rows as load_source
from jaxft.data.unlabelled import UNLABELLED, real_tokens, step_batch
from jaxft.errors import AbsentError, OutOfReachError, UserError
from jaxft.methods.base import Compose
from jaxft.methods.partition import distinct, partition, size
from jaxft.models.heads import CAUSAL_LM, LAST, SEQUENCE_CLASSIFICATION, SINGLE_LABEL
from jaxft.models.registry import family_of
from jaxft.models.segments import LAYERS
from jaxft.objectives.base import Step, objective_of
from jaxft.train import placement
from jaxft.train.data import load_rows, load_training_data
from jaxft.train.devices import Device
from jaxft.train.host_memory import give_back, resident_bytes
from jaxft.train.loop import jitted_step, step_function
from jaxft.train.roofline import Pace, pace
from jaxft.train.setup import (
    Described,
    begin_state,
    check,
    describe_model,
    describe_run,
    make_optimizer,
    own_tokenizer,
    shardings_of,
    with_own,
)
from jaxft.train.state import State
from jaxft.train.work import Work, work

_WITHOUT = (
    "A plan can do without rows and tokenizer: --plan.full_rows takes rows of config.data.max_length tokens, all of them scored, and needs "
    "of the model its config.json alone. Where the hub can be reached: `hf download OWNER/NAME config.json --local-dir FOLDER`; then "
    "here --config.model.source=FOLDER --plan.full_rows."
)


# What evaluation's programs take in a process, as a share of the step's: fitted to the whole runs of docs/plan.md, where it was 0.3 to 1.3.
_EVALUATION = 0.65


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of a run. Memory is in bytes on each device."""

    trainable_parameters: int
    total_parameters: int
    memory: dict[str, int]  # by part
    host: dict[str, int]  # the same, of what lies in the host's memory for each device
    work: Work  # of one device
    tokens: int  # in a step, without padding
    steps: int  # of the run; 0: not known
    mesh: dict[str, int]
    sent: int = 0  # bytes that each device sends to others in a step
    process: int = 0  # bytes of Python, programs, and the state's copy for a checkpoint, where they lie in the same memory: on a CPU

    @property
    def memory_bytes(self) -> int:
        """The memory of a step, with what the process itself has there."""
        return sum(self.memory.values()) + self.process

    @property
    def operations(self) -> int:
        """Floating-point operations of the products of one step, on all devices together."""
        return self.work.operations * self.mesh["data"] * self.mesh["fsdp"]

    @property
    def count(self) -> int:
        """The devices."""
        return int(np.prod(list(self.mesh.values())))

    def pace(self, device: Device) -> Pace:
        """A step's time on such devices."""
        return pace(self.work, device, self.sent, self.mesh["tensor"])


@dataclasses.dataclass(frozen=True)
class Material:
    """What all plans of one experiment share, whatever its settings."""

    read: Callable[[Experiment], Any]  # returns the tokenizer
    options: dict[str, Any]  # of `load_pretrained`
    batch: Mapping[str, Any]  # shapes of a step's batch, (accumulation, batch, ...)
    tokens: int
    steps: int
    slots: int

    def batch_of(self, experiment: Experiment, rows: int = 1) -> dict[str, Any]:
        """The shapes of the experiment's batch, on one of `rows` devices that share its rows."""
        train = experiment.train
        return _cut(self.batch, train.accumulation, train.batch_size // rows, (train.unlabelled_batch_size or train.batch_size) // rows)


def _cut(batch: Mapping[str, Any], accumulation: int, size: int, unlabelled: int) -> dict[str, Any]:
    return {
        name: _cut(value, accumulation, unlabelled, unlabelled)
        if name == UNLABELLED
        else jax.ShapeDtypeStruct((accumulation, size, *value.shape[2:]), value.dtype)
        for name, value in batch.items()
    }


def prepare(
    experiment: Experiment, count: int | None, full_rows: bool, read: Callable[[Experiment], Any] = own_tokenizer
) -> tuple[Material, Described]:
    """Returns what all plans of an experiment share, and the run as it is given.

    Where the rows or the tokenizer are out of reach, it says so and takes full rows.

    Args:
      experiment: of the run.
      count: of devices; None is this machine's.
      full_rows: whether to do without rows and tokenizer in any case.
      read: returns the tokenizer.

    Raises:
      UserError: what a run would refuse, or can't be had and be done without.
    """
    try:
        return _without_rows(experiment, count) if full_rows else _with_rows(experiment, count, read)
    except AbsentError as error:
        raise UserError(f"{error} {_WITHOUT}") from error


def _with_rows(experiment: Experiment, count: int | None, read: Callable[[Experiment], Any]) -> tuple[Material, Described]:
    try:
        run, rows = describe_run(experiment, count, read)
    except OutOfReachError as error:
        return _in_their_place(experiment, count, error)
    data = load_training_data(run.experiment, run.model, run.tokenizer, run.shapes, rows)
    whole = dict(step_batch(data.batches, data.unlabelled, 0))
    batch = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), whole)
    tokens = real_tokens(data.batches, data.unlabelled, 0)
    return Material(lambda _: run.tokenizer, run.options, batch, tokens, data.steps, data.slots), run


def _in_their_place(experiment: Experiment, count: int | None, absent: OutOfReachError) -> tuple[Material, Described]:
    """Full rows in the place of what is out of reach; raises `UserError` for the other sources as a run would."""
    if experiment.task.model_task == SEQUENCE_CLASSIFICATION and absent.what.startswith("rows"):
        raise _needing_rows(experiment, f"The {absent.what} aren't here. ")
    data = experiment.data
    given = [(getattr(data, name), name) for name in SPLITS] + [(data.unlabelled, "train"), (experiment.eval.general, "train")]
    for source, split in given:
        if source and not is_on_hub(source):
            load_source(source, split)
    found = _without_rows(experiment, count, f"The {absent.what} aren't here. ")
    console.say(f"The {absent.what} aren't here; rows are taken as full, {data.max_length:,} tokens each.\n")
    return found


def _without_rows(experiment: Experiment, count: int | None, because: str = "") -> tuple[Material, Described]:
    """What `prepare` returns, without tokens: of a classification the rows say what its labels are."""
    task, classifies = experiment.task, experiment.task.model_task == SEQUENCE_CLASSIFICATION
    if not (classifies or (task.model_task == CAUSAL_LM and task.generates)) or experiment.objective is not None:
        raise _needing_rows(experiment, because)
    parts = experiment.method.methods if isinstance(experiment.method, Compose) else (experiment.method,)
    if any(getattr(part, "text", "") for part in parts):
        raise UserError(f"{because}Full rows have no tokenizer for config.method.text. Give config.method.virtual_tokens in its place.")
    mesh = check(experiment, count)
    options = task.model_options(load_rows(experiment)["train"], experiment.data) if classifies else {}
    run = describe_model(experiment, mesh, options, lambda _: None)
    if run.model.pooling != LAST:
        raise _needing_rows(experiment, because)
    batch = _full(experiment, options)
    return Material(lambda _: None, options, batch, int(np.prod(batch["tokens"].shape)), experiment.train.steps, 0), run


def _needing_rows(experiment: Experiment, because: str) -> UserError:
    kind = type(experiment.task if experiment.objective is None else experiment.objective).__name__
    return UserError(
        f"{because}Full rows are for SFT, and for sequence classification by causal models, whose labels the rows say; {kind} needs the "
        "data. Give it."
    )


def _full(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a step's batch of full rows: every token is scored, or, with labels, one text a row."""
    train, length = experiment.train, experiment.data.max_length
    rows, slots = (train.accumulation, train.batch_size), SCORED_MULTIPLE if options else length
    numbers = (len(options["labels"]),) if options and options["problem_type"] != SINGLE_LABEL else ()  # of each text
    return {
        **{name: jax.ShapeDtypeStruct((*rows, length), "int32") for name in ("tokens", "segment_ids", "positions")},
        "scored": jax.ShapeDtypeStruct((*rows, slots), "int32"),
        "targets": jax.ShapeDtypeStruct((*rows, slots, *numbers), "float32" if numbers else "int32"),
        "weights": jax.ShapeDtypeStruct((*rows, slots), "float32"),
    }


def describe(experiment: Experiment, material: Material, count: int | None) -> Described:
    """Returns the run of an experiment that differs from the material's own in its settings alone; raises `UserError` as a run would."""
    return describe_model(experiment, check(experiment, count), material.options, material.read)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """What a step is given, as shapes with their places, and the optimizer."""

    state: State
    frozen: Any
    start: Any
    sharding: State
    optimizer: Any
    whole: Any  # the parameters' shapes


def _arrays(run: Described, material: Material) -> _Arrays:
    shapes, mask = with_own(run, run.shapes, run.language_head.shapes)
    optimizer, table = make_optimizer(run, material.steps or 1), family_of(run.model.config.architecture).module.PLACEMENT
    places = placement.shardings(shapes, table, run.mesh)
    trainable, frozen = partition(_placed(shapes, places), mask)
    state = jax.eval_shape(lambda trainable: begin_state(run, trainable, optimizer, material.slots), trainable)
    sharding = shardings_of(run, state, partition(places, mask)[0], optimizer)
    state = _placed(state, sharding)
    return _Arrays(state, frozen, state.trainable if run.experiment.train.mixout else None, sharding, optimizer, shapes)


def of_step(run: Described, material: Material) -> Plan:
    """Returns the plan on this machine's devices: the step, compiled, says what it needs."""
    arrays, steps = _arrays(run, material), material.steps
    state, frozen, start = arrays.state, arrays.frozen, arrays.start
    rows_over_devices = jax.NamedSharding(run.mesh, placement.BATCH)
    whole = material.batch_of(run.experiment)
    batch = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows_over_devices), whole)
    step = jitted_step(run.experiment, run.model, arrays.optimizer, arrays.sharding, steps)
    before = resident_bytes()
    used = step.trace(state, frozen, batch, start).lower().compile().memory_analysis()
    grown = max(resident_bytes() - before, 0)
    give_back()  # what compiling left free, as a run does before its first step
    held = resident_bytes()
    rows = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    kept, offloaded = (count // rows for count in _kept_for_backward(run, state, frozen, whole, steps))
    rest = {
        "activations": min(kept, used.temp_size_in_bytes),
        "workspace": max(used.temp_size_in_bytes - kept, 0) + used.output_size_in_bytes - used.alias_size_in_bytes,
    }
    found = _plan(run, material, arrays, _work(run, material, arrays), _bytes(batch), rest, offloaded)
    own = held + int(_EVALUATION * grown) + _bytes(state) if jax.default_backend() == "cpu" else 0
    return dataclasses.replace(found, process=own)


def estimate(run: Described, material: Material) -> Plan:
    """Returns the plan on devices that needn't be here: what the step makes is told from its equations.

    Of a product that several devices share, activations are counted whole on each, which is the most that it can be.
    """
    arrays = _arrays(run, material)
    local = material.batch_of(run.experiment, run.mesh.shape["data"] * run.mesh.shape["fsdp"])
    kept, offloaded = _kept_for_backward(run, arrays.state, arrays.frozen, local, material.steps)
    done = _work(run, material, arrays)
    made = _shared(done.peak_bytes, kept, _whole_bytes(arrays.state.trainable), _bytes(arrays.state.trainable))
    if run.experiment.optimizer.offload:
        made += _bytes(arrays.state.optimizer)
    rest = {"activations": min(kept, max(made, 0)), "workspace": max(made - kept, 0) + _gathered(run, arrays)}
    batch = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(local))
    return _plan(run, material, arrays, done, batch, rest, offloaded)


def _shared(peak: int, kept: int, whole: int, own: int) -> int:
    """Bytes that one device makes of a step's peak, told for one that has all of what trains.

    Args:
      peak: the most that is made at one time.
      kept: of it, for the backward pass.
      whole: of what trains.
      own: a device's part of that.
    """
    if whole <= kept:  # the peak is in the backward pass: a gradient lies beside what is kept
        return peak - (whole - own)
    return kept + (peak - kept) * own // whole  # it is at the update: all beside what is kept has the form of what trains


def _plan(run: Described, material: Material, arrays: _Arrays, done: Work, batch: int, rest: dict[str, int], offloaded: int) -> Plan:
    state = arrays.state
    on_host, on_device = partition(state.optimizer, jax.tree.map(placement.is_in_host_memory, state.optimizer))
    memory = {
        "frozen weights": _bytes(arrays.frozen),
        "trainable weights": _bytes(state.trainable),
        **({} if state.average is None else {"average of the weights": _bytes(state.average)}),
        **({} if arrays.start is None else {"weights before training": _bytes(arrays.start)}),
        **({} if state.objective is None else {"the objective's arrays": _bytes(state.objective)}),
        "optimizer": _bytes(on_device),
        "batch": batch,
        **rest,
    }
    host = {name: count for name, count in {"optimizer": _bytes(on_host), "activations": offloaded}.items() if count}
    return Plan(
        size(state.trainable),
        size(arrays.whole),
        memory,
        host,
        done,
        material.tokens,
        material.steps,
        dict(run.mesh.shape),
        _sent(run, arrays, material),
    )


def _work(run: Described, material: Material, arrays: _Arrays) -> Work:
    """What one device does in a step, with its share of the rows."""
    local = material.batch_of(run.experiment, run.mesh.shape["data"] * run.mesh.shape["fsdp"])
    step = step_function(run.experiment, run.model, arrays.optimizer, material.steps)
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (arrays.state, arrays.frozen, local, arrays.start))
    return work(step, *given)


def _gathered(run: Described, arrays: _Arrays) -> int:
    """Bytes of one layer's weights, which devices that share weights gather while they compute it."""
    sides = run.mesh.shape
    if sides["fsdp"] == 1:
        return 0
    stacks = [stack for part in (arrays.frozen, arrays.state.trainable) for stack in part.get(LAYERS, {}).values()]
    return sum(map(_whole_bytes, stacks)) // run.model.config.num_hidden_layers // sides["tensor"]


def _sent(run: Described, arrays: _Arrays, material: Material) -> int:
    """Bytes that each device sends to others in a step: shared weights in both passes, gradients, and what shared products add up."""
    sides, train, config = run.mesh.shape, run.experiment.train, run.model.config
    rows, shared = sides["data"] * sides["fsdp"], sides["tensor"]
    weights = (_whole_bytes(arrays.frozen) + _whole_bytes(arrays.state.trainable)) // shared
    gathered = 2 * train.accumulation * weights * (sides["fsdp"] - 1) // sides["fsdp"]
    gradients = 2 * _whole_bytes(arrays.state.trainable) * (rows - 1) // rows
    tokens = int(np.prod(material.batch["tokens"].shape)) // rows
    sums = (6 if train.remat == "full" else 4) * config.num_hidden_layers  # two sub-layers, forward and backward, and again
    added = sums * tokens * config.hidden_size * np.dtype(run.model.dtype).itemsize * 2 * (shared - 1) // shared
    return gathered + gradients + added


def _placed(shapes: Any, places: Any) -> Any:
    """Shapes with their shardings; one that stands in several places stays one."""
    made: dict[int, Any] = {}

    def once(leaf: Any, place: Any) -> Any:
        return made.setdefault(id(leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))

    return jax.tree.map(once, shapes, places)


def _bytes(shapes: Any) -> int:
    """Bytes of these arrays on each device."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize for leaf in distinct(shapes))


def _whole_bytes(shapes: Any) -> int:
    """Bytes of these arrays on all devices together."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in distinct(shapes))


def _kept_for_backward(run: Described, state: State, frozen: Any, batch: Any, steps: int) -> tuple[int, int]:
    """Bytes of what the forward pass of one micro-batch keeps for the backward pass, on all devices and their hosts; without weights."""
    objective, task, number = objective_of(run.experiment), run.experiment.task, jnp.int32(0)
    rngs = dict.fromkeys(("mask", "objective", "run"), jax.random.key(0))

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
