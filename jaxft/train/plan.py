"""The plan of a run: what trains, and the memory, time and cost of its steps, from shapes alone: no weight is read or allocated."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.train import advice, devices
from jaxft.train.devices import Device
from jaxft.train.estimate import Material, Plan, describe, estimate, of_step, prepare
from jaxft.train.folds import is_cross_validation, one_fold
from jaxft.train.published import with_shapes
from jaxft.train.roofline import REACHED, REACHED_BY_CPU, Measured, measured
from jaxft.train.setup import own_tokenizer, print_trainable, with_own

_WITH_FRACTION = "yes*"
_SHARES = f"{REACHED:.0%} ({REACHED_BY_CPU:.0%} on a CPU)"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan is asked for."""

    devices: Sequence[str] = ()  # of `devices.DEVICES`; none: this machine's own
    count: int = 0  # of devices; 0: what the mesh takes, or this machine has
    mesh: str = ""  # as `devices.parse_mesh` takes it; empty: the configuration's own
    price: float = 0.0  # US dollars that one device costs an hour; 0: the table's
    full_rows: bool = False  # without rows and tokenizer


def plan(experiment: Experiment, asked: Asked = Asked(), workdir: pathlib.Path | None = None, arguments: Sequence[str] = ()) -> Plan:
    """Prints and returns the plan of an experiment: the parameter table, a step's memory and work, the run's time and cost, and what helps.

    On this machine the step is compiled for the run's own batch and asked what it needs. On another device it is told from the program's
    equations. Arrays are told by their shapes. Memory of generation, and of a method that looks at training batches before it begins,
    isn't in it.

    Args:
      experiment: of the run.
      asked: on which devices.
      workdir: where an earlier run may have measured its rate.
      arguments: the flags of the configuration, which the commands repeat.
    """
    folds = experiment.data.folds if is_cross_validation(experiment) else 1
    own = one_fold(experiment, 0) if folds > 1 else experiment  # folds are alike
    own, count = _on_mesh(own, asked)
    targets = [devices.named(name) for name in asked.devices]
    own = _typed(own) if targets else own
    with with_shapes(own.model) as model:
        known = dataclasses.replace(own, model=model)
        material, run = prepare(known, count, asked.full_rows, lambda _: own_tokenizer(own))
        print_trainable(*with_own(run, run.shapes, run.language_head.shapes))
        found = of_step(run, material) if count is None else estimate(run, material)
        targets = targets or [devices.this_device()]  # what measures it takes memory, which isn't the step's
        _say_memory(found, count is None)
        _say_work(found, folds)
        _say_time(found, folds, targets, asked.price, measured(workdir, own, found.count) if workdir else None)
        _say_advice(known, material, found, count is None, targets, _command(experiment, asked, arguments))
    return found


def _say_advice(
    experiment: Experiment, material: Material, found: Plan, compiled: bool, targets: Sequence[Device], command: Sequence[str]
) -> None:
    """Prints what makes it fit on devices, or need less there: changes are told from their programs.

    Where the plan was compiled, what it has beyond the one told from its own program is added to each of them.
    """

    def told(changed: Experiment) -> Plan:
        return estimate(describe(changed, material, found.count), material)

    before = told(experiment) if compiled else found
    beyond = found.memory_bytes - before.memory_bytes

    def planned(changed: Experiment) -> Plan:
        return dataclasses.replace(told(changed), process=beyond)

    # No named device is a CPU, which alone has other changes: those of the first are those of all.
    options = advice.changes(experiment, targets[0], found.mesh["data"] * found.mesh["fsdp"]) + advice.meshes(found.count, experiment)
    before = dataclasses.replace(before, process=beyond)
    advice.say(advice.lighter(experiment, options, planned, before), before, targets, command)


def _command(experiment: Experiment, asked: Asked, arguments: Sequence[str]) -> list[str]:
    """The words of the command that trains what was planned."""
    mesh = devices.parse_mesh(asked.mesh) if asked.mesh else {}
    sides = [f"--config.train.{name}_parallel={size}" for name, size in mesh.items()]
    return ["python", "launch.py", f"--experiment={experiment.name}", *overrides.merged(arguments, sides)]


def _on_mesh(experiment: Experiment, asked: Asked) -> tuple[Experiment, int | None]:
    """The experiment with the mesh that is asked for, and the number of devices, or None for this machine's own."""
    if not 0.0 <= asked.price < math.inf:
        raise UserError(f"--plan.price is US dollars an hour, 0 or more, not {asked.price:g}.")
    if asked.count < 0:
        raise UserError(f"--plan.count is 1 device or more, not {asked.count}.")
    if asked.mesh:
        sides = devices.parse_mesh(asked.mesh)
        fields: dict[str, Any] = {f"{name}_parallel": size for name, size in sides.items()}
        experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **fields))
    if not (asked.devices or asked.count or asked.mesh):
        return experiment, None
    train = experiment.train
    known = [side for side in (train.data_parallel, train.fsdp_parallel, train.tensor_parallel) if side != -1]
    return experiment, asked.count or int(np.prod(known))


def _typed(experiment: Experiment) -> Experiment:
    """The experiment with the compute type that a run on an accelerator has."""
    if experiment.model.dtype != "auto":
        return experiment
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, dtype="bfloat16"))


def _say_memory(found: Plan, compiled: bool) -> None:
    parts = [(part, gibibytes(count)) for part, count in found.memory.items()]
    each = f" on each of {found.count} devices" if found.count > 1 else ""
    told = "" if compiled else ", told from the program"
    if found.process:
        parts.append(("Python, programs, a checkpoint's copy", gibibytes(found.process)))
    console.table(f"Memory of a step{each}{told}", ("part", "GiB"), [*parts, ("in all", gibibytes(found.memory_bytes))])
    for part, count in found.host.items():
        console.say(f"The host's memory holds {gibibytes(count)} GiB of {part}{' for each device' if found.count > 1 else ''}.\n")


def _say_work(found: Plan, folds: int) -> None:
    run = f"each of the {folds} folds" if folds > 1 else "the run"
    steps = f"; {run} has {found.steps:,} steps" if found.steps else ""
    console.say(
        f"The products of a step take {found.operations / 1e9:,.1f} GFLOP, {found.operations / found.tokens / 1e9:,.3f} for each of its "
        f"{found.tokens:,} tokens{steps}.\n"
    )


def _say_time(found: Plan, folds: int, targets: Sequence[Device], price: float, rate: Measured | None) -> None:
    """Prints time and cost on each device, by its figures, and by an earlier run's where it ran on such devices."""
    of = ("all folds" if folds > 1 else "the run") if found.steps else "a million tokens"
    columns = ("device", "fits", "of its memory", "a step at best, s", "a step, s", f"{of}, h", "US dollars")
    rows = [_figures(found, folds, device, price, rate) for device in targets]
    console.table("Time and cost, evaluation and compilation aside", columns, rows)
    if any(fitting(found.memory_bytes, device) == _WITH_FRACTION for device in targets):
        console.say(f"* with {devices.MEMORY_FRACTION}\n")
    console.say(_explained(rate))


def _figures(found: Plan, folds: int, device: Device, price: float, rate: Measured | None) -> tuple[str, ...]:
    """A row of the table."""
    expected, amount = found.pace(device), (price or device.price) * found.count
    known = rate if rate is not None and _is_on(rate, device, found.count) else None
    seconds = found.tokens / known.tokens_per_second if known else expected.likely
    hours = seconds * (folds * found.steps or 1e6 / found.tokens) / 3600
    return (
        f"{found.count} x {device.name}" if found.count > 1 else device.name,
        fitting(found.memory_bytes, device),
        f"{found.memory_bytes / device.memory:.0%}",
        f"{expected.seconds:,.3f}",
        f"{seconds:,.3f}" + (" measured" if known else ""),
        f"{hours:,.2f}",
        f"{hours * amount:,.2f}" if amount else "?",
    )


def _explained(rate: Measured | None) -> str:
    told = f"At best: by each product's operations and bytes and the device's figures; a step: what reaches {_SHARES} of that"
    return f"{told}, or what the run in this folder measured ({rate.steps} steps).\n" if rate else f"{told}.\n"


def _is_on(rate: Measured, device: Device, count: int) -> bool:
    known = devices.kind_of(rate.kind)
    return rate.count == count and (known == device if known else rate.kind == device.name)


def fitting(memory: int, device: Device) -> str:
    """Returns whether a step of so many bytes fits on a device: yes, with a star where it takes `devices.MEMORY_FRACTION`, or no."""
    if memory <= device.room:
        return "yes"
    return _WITH_FRACTION if memory <= device.most_room else "no"


def gibibytes(count: int) -> str:
    """Returns bytes as people read them.

    >>> gibibytes(3 * 2**29)
    '1.500'
    """
    return f"{count / 2**30:,.3f}"
