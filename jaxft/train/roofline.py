"""How long a step takes: at best, by a device's own figures; and as an earlier run measured it."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from jaxft import overrides
from jaxft.config import Experiment
from jaxft.hub.load import compute_type
from jaxft.train.checkpoint import FREE
from jaxft.train.devices import Device
from jaxft.train.logs import METRICS
from jaxft.train.work import Work

# Share of the roofline that a step is taken to reach: Llama 3's training had 38 to 43% of the H100's peak (arXiv:2407.21783, table 4).
REACHED = 0.4
REACHED_BY_CPU = 0.8  # products fill it: lora_llama2's step took 1.16 times the sum of its products (benchmarks/results/sft.md)
# Fields that don't change how long a step takes.
_NO_MATTER = (
    *(name for name in FREE if name != "optimizer.offload"),  # which moves the state in each step
    "data.limit",
    "data.split",
    "data.test",
    "data.validation",
    "optimizer.decay",
    "optimizer.eps",
    "optimizer.final_scale",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "train.best_metric",
    "train.best_mode",
    "train.epochs",
    "train.eval_every",
    "train.seed",
    "train.steps",
)


@dataclasses.dataclass(frozen=True)
class Pace:
    """What a step's time is at least, in seconds. Kernels run one after the other; what devices send each other goes beside them."""

    kernels: float  # each the longer of its operations at the device's rate, and its bytes at its memory's bandwidth
    between: float  # of what a device sends to others
    reached: float = REACHED  # share of the roofline that a step is taken to reach

    @property
    def seconds(self) -> float:
        """At best."""
        return max(self.kernels, self.between)

    @property
    def likely(self) -> float:
        """At the share of the roofline that well-made training reaches."""
        return self.seconds / self.reached


def pace(work: Work, device: Device, sent: int = 0, shared: int = 1) -> Pace:
    """Returns a step's pace on a device.

    Args:
      work: of a step, on a device that computes its rows alone.
      device: with its rates.
      sent: bytes that each device sends to others in a step.
      shared: devices that share each product.
    """

    def seconds(operations: int, dtype: str, moved: int) -> float:
        rate = device.products.get(dtype, device.products["float32"])
        return max(operations / shared / rate, moved / shared / device.bandwidth)

    whole = sum(seconds(kernel.operations, kernel.dtype, kernel.bytes) * count for kernel, count in work.kernels.items())
    return Pace(whole, sent / device.between, REACHED_BY_CPU if device.platform == "cpu" else REACHED)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rate of an earlier run."""

    tokens_per_second: float  # median over its steps but the first
    steps: int
    kind: str  # what JAX calls its devices
    platform: str
    count: int


def measured(workdir: pathlib.Path, experiment: Experiment, count: int = 1) -> Measured | None:
    """Returns the rate of the run in a folder, or None where it holds none whose steps are this experiment's, on so many devices."""
    try:
        saved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (workdir / METRICS).read_text(encoding="utf-8").splitlines()]
        device = saved["device"]
        asked = _deciding(overrides.to_dict(experiment), jax.default_backend(), count)  # of other devices a plan names the type
        same = _deciding(saved["config"], device["platform"], device["count"]) == asked
        rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]  # the first also pays for the start
        found = Measured(statistics.median(rates), len(rates), device["kind"], device["platform"], device["count"]) if rates else None
    except (OSError, ValueError, KeyError, TypeError):  # no run, or none that got so far
        return None
    return found if same else None


def _deciding(config: Mapping[str, Any], platform: str, count: int) -> dict[str, Any]:
    """The fields that decide how long a step takes; with the defaults of those that came since, and what stands for itself resolved."""
    whole = overrides.to_dict(overrides.from_dict(config))
    whole["model"]["dtype"] = str(compute_type(whole["model"]["dtype"], platform))
    whole["train"] |= _sides(whole["train"], count)
    return {name: value for name, value in overrides.flat(whole) if not name.startswith(_NO_MATTER)}


def _sides(train: Mapping[str, Any], count: int) -> dict[str, int]:
    """The sides of the mesh, the one that takes what is left (-1) as it comes out on so many devices."""
    sides = {name: train[name] for name in ("data_parallel", "fsdp_parallel", "tensor_parallel")}
    known = math.prod(size for size in sides.values() if size != -1)
    return {name: count // known if size == -1 else size for name, size in sides.items()}
