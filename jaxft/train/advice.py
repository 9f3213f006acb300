"""What makes a run fit, or need less: each change to its settings, planned."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.methods import LoRA
from jaxft.train.devices import Device
from jaxft.train.estimate import Plan

_SHOWN = 8  # changes


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings in the place of others."""

    flags: tuple[str, ...]  # of the command
    same: bool  # whether the run computes what it did, but for rounding

    def __add__(self, other: "Change") -> "Change":
        return Change(self.flags + other.flags, self.same and other.same)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A change, and what comes of it."""

    change: Change
    plan: Plan


def changes(experiment: Experiment, device: Device, rows: int = 1) -> list[Change]:
    """Returns what may be changed, one at a time and the strongest together.

    Args:
      experiment: as it is given.
      device: that it runs on.
      rows: devices that share the rows of a batch.
    """
    again, fewer = list(_remat(experiment)), list(_fewer_rows(experiment, rows))
    held, others = list(_quantized(experiment)), [*_moments(experiment), *_host(experiment, device), *_smaller(experiment)]
    together = [again[-1:] + fewer[-1:], again[-1:] + held, again[-1:] + fewer[-1:] + held]
    sums = [sum(parts[1:], start=parts[0]) for parts in together if len(parts) > 1]
    found = [*again, *fewer, *held, *others, *sums]
    return list(dict.fromkeys(found))


def _flag(path: str, value: object) -> str:
    return f"--config.{path}={value}"


def _remat(experiment: Experiment) -> Iterator[Change]:
    order = ("none", "dots", "full")
    for name in order[order.index(experiment.train.remat) + 1 :] if experiment.train.remat in order else ("full",):
        yield Change((_flag("train.remat", name),), True)


def _fewer_rows(experiment: Experiment, rows: int) -> Iterator[Change]:
    """Fewer rows at a time, and as many more times; half of them, and as few as there can be."""
    train = experiment.train
    if train.unlabelled_batch_size:
        return
    sizes = [size for size in range(train.batch_size - 1, 0, -1) if train.batch_size % size == 0 and size % rows == 0]
    for size in dict.fromkeys((*sizes[:1], *sizes[-1:])):
        accumulation = train.accumulation * train.batch_size // size
        yield Change((_flag("train.batch_size", size), _flag("train.accumulation", accumulation)), True)


def _quantized(experiment: Experiment) -> Iterator[Change]:
    if experiment.model.quantization == "none":
        yield Change((_flag("model.quantization", "nf4"),), False)


def _moments(experiment: Experiment) -> Iterator[Change]:
    if experiment.optimizer.name in ("adamw", "lion") and experiment.optimizer.moments == "float32":
        yield Change((_flag("optimizer.moments", "int8"),), False)


def _host(experiment: Experiment, device: Device) -> Iterator[Change]:
    """What the host's memory may hold, where that isn't the device's own."""
    if device.platform == "cpu":
        return
    if not experiment.optimizer.offload:
        yield Change(("--config.optimizer.offload",), True)
    if experiment.train.remat != "offload":
        yield Change((_flag("train.remat", "offload"),), True)


def _smaller(experiment: Experiment) -> Iterator[Change]:
    """A method that trains less."""
    rank = getattr(experiment.method, "rank", 0)
    if isinstance(rank, int) and rank > 1:
        yield Change((_flag("method.rank", rank // 2),), False)
    if not hasattr(experiment.method, "rank"):
        yield Change((_flag("method", f"LoRA(rank={LoRA().rank})"),), False)


def meshes(count: int, experiment: Experiment) -> list[Change]:
    """Returns how else so many devices may share a run: the weights between all of them."""
    train = experiment.train
    whole = (1, count, 1)
    if count < 2 or (train.data_parallel, train.fsdp_parallel, train.tensor_parallel) in (whole, (1, -1, 1)):
        return []
    names = ("train.data_parallel", "train.fsdp_parallel", "train.tensor_parallel")
    return [Change(tuple(_flag(name, side) for name, side in zip(names, whole, strict=True)), True)]


def lighter(experiment: Experiment, options: Sequence[Change], planned: Callable[[Experiment], Plan], before: Plan) -> list[Planned]:
    """Returns the changes that need less memory, planned; one that the run refuses is left out."""
    found = []
    for change in options:
        try:
            plan = planned(overrides.parse_flags(experiment, change.flags))
        except UserError:
            continue
        if plan.memory_bytes < before.memory_bytes:
            found.append(Planned(change, plan))
    return found


def ranked(found: Sequence[Planned], device: Device) -> list[Planned]:
    """Returns the changes for a device: those that fit first, of these what computes the same, then by time and memory."""

    def order(one: Planned) -> tuple[bool, bool, float, int]:
        misfit = one.plan.memory_bytes > device.most_room
        return misfit, not one.change.same and not misfit, 0.0 if misfit else one.plan.pace(device).seconds, one.plan.memory_bytes

    return sorted(found, key=order)


def say(found: Sequence[Planned], before: Plan, targets: Sequence[Device], command: Sequence[str]) -> None:
    """Prints the changes as commands: for each device that the run doesn't fit on, or, where it fits on all, for the first one.

    Args:
      found: of `lighter`.
      before: the plan as it is.
      targets: the devices that the run is planned for.
      command: the words of a command that a change is put into.
    """
    misfits = [device for device in targets if before.memory_bytes > device.most_room]
    shared: dict[tuple[str, ...], list[str]] = {}  # the names of devices with the same lines
    for device in misfits or targets[:1]:
        shared.setdefault(tuple(_lines(ranked(found, device)[:_SHOWN], before, device, command)), []).append(device.name)
    for lines, names in shared.items():
        where = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
        if not lines:
            console.say(f"Nothing that jaxft knows makes it {'fit' if misfits else 'need less memory'} on {where}.\n")
            continue
        what = "makes it fit, or come nearer," if misfits else "needs less memory"
        console.say("\n".join((f"What {what} on {where} (* changes what is learned):", *lines, "")))


def _lines(found: Sequence[Planned], before: Plan, device: Device, command: Sequence[str]) -> Iterator[str]:
    """Two lines for each change: what comes of it, and the command."""
    fits = before.memory_bytes <= device.most_room
    for number, one in enumerate(found, start=1):
        memory, seconds = one.plan.memory_bytes / 2**30, one.plan.pace(device).seconds / before.pace(device).seconds
        fit = "" if fits else "fits, " if one.plan.memory_bytes <= device.most_room else "doesn't fit, "
        star = "" if one.change.same else " *"
        yield f"{number}. {memory:,.2f} GiB, {fit}{seconds:.2f} of the step's time at best{star}"
        yield f"   {shlex.join(overrides.merged(command, one.change.flags))}"
