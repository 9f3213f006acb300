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


def ranked(
    experiment: Experiment, options: Sequence[Change], planned: Callable[[Experiment], Plan], before: Plan, device: Device
) -> list[Planned]:
    """Returns the changes that need less memory, planned: those that fit first, of these what computes the same, then by time and memory.

    A change that the run refuses is left out.
    """
    found = []
    for change in options:
        try:
            plan = planned(overrides.parse_flags(experiment, change.flags))
        except UserError:
            continue
        if plan.memory_bytes < before.memory_bytes:
            found.append(Planned(change, plan))

    def order(one: Planned) -> tuple[bool, bool, float, int]:
        misfit = one.plan.memory_bytes > device.most_room
        return misfit, not one.change.same and not misfit, 0.0 if misfit else one.plan.pace(device).seconds, one.plan.memory_bytes

    return sorted(found, key=order)


def say(found: Sequence[Planned], before: Plan, device: Device, command: Sequence[str]) -> None:
    """Prints the changes as commands.

    Args:
      found: ranked.
      before: the plan as it is.
      device: that the run is planned for.
      command: the words of a command that a change is added to.
    """
    fits = before.memory_bytes <= device.most_room
    if not found:
        console.say(
            "Nothing that jaxft knows makes it need less memory here.\n" if fits else "Nothing that jaxft knows makes it fit here.\n"
        )
        return
    console.say(f"What {'needs less memory' if fits else 'makes it fit, or come nearer'} (* changes what is learned):")
    for number, one in enumerate(found[:_SHOWN], start=1):
        memory, seconds = one.plan.memory_bytes / 2**30, one.plan.pace(device).seconds / before.pace(device).seconds
        fit = "" if fits else "fits, " if one.plan.memory_bytes <= device.most_room else "doesn't fit, "
        star = "" if one.change.same else " *"
        console.say(f"{number}. {memory:,.2f} GiB, {fit}{seconds:.2f} of the step's time at best{star}")
        console.say(f"   {shlex.join([*command, *one.change.flags])}")
    console.say()
