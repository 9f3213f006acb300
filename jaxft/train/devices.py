"""Devices as their makers describe them: memory, rates of products, bandwidths; and what an hour of one costs."""

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError, unknown

GB, TERA = 10**9, 10**12
_GIB = 2**30
# JAX takes this share of a GPU's memory at its start, and no more: https://docs.jax.dev/en/latest/gpu_memory_allocation.html
GPU_SHARE = 0.75
GPU_SHARE_AT_MOST = 0.95  # what is left to the driver and CUDA's own libraries with XLA_CLIENT_MEM_FRACTION=.95
MEMORY_FRACTION = f"XLA_CLIENT_MEM_FRACTION={GPU_SHARE_AT_MOST:.2f}"


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's processor."""

    name: str
    platform: str  # gpu, tpu, cpu
    memory: int  # bytes
    products: Mapping[str, float]  # operations a second of dense products, by the factors' type
    bandwidth: float  # bytes a second of its memory
    between: float  # bytes a second, in one direction, to the other devices of its machine
    price: float  # US dollars an hour; 0: none known
    kinds: tuple[str, ...] = ()  # what JAX calls it, in lower case

    @property
    def room(self) -> int:
        """The bytes that a run can have without further settings."""
        return int(self.memory * (GPU_SHARE if self.platform == "gpu" else 1.0))

    @property
    def most_room(self) -> int:
        """The bytes that a run can have at most."""
        return int(self.memory * (GPU_SHARE_AT_MOST if self.platform == "gpu" else 1.0))


def _gpu(
    name: str, gib: float, half: float, single: float, gigabytes: float, between: float, price: float, kinds: str, bfloat16: bool = True
) -> Device:
    """A GPU.

    Args:
      name: here.
      gib: its memory, as the driver counts it: error correction takes a part of what the maker names.
      half: teraoperations a second of dense products in bfloat16 and float16, summed in float32.
      single: the same of float32 as JAX multiplies it by default: TF32 where the GPU has that (documentation of jax.lax.Precision).
      gigabytes: a second, of its memory.
      between: gigabytes a second in one direction: half of NVLink's figure, or a PCIe slot's.
      price: US dollars an hour.
      kinds: JAX's names for it, with commas between them: whole ones, since parts of a card, and other cards, have longer ones.
      bfloat16: whether its product units take bfloat16; else XLA multiplies that in float32.
    """
    rates = {"float32": single * TERA, "float16": half * TERA, "bfloat16": (half if bfloat16 else single) * TERA}
    return Device(name, "gpu", int(gib * _GIB), rates, gigabytes * GB, between * GB, price, tuple(kinds.split(",")))


def _tpu(name: str, gib: float, half: float, gigabytes: float, between: float, price: float, kinds: str) -> Device:
    """A chip of a TPU; by default it multiplies float32 as bfloat16 (documentation of jax.lax.Precision). `between`: of all its links."""
    rates = dict.fromkeys(("float32", "float16", "bfloat16"), half * TERA)
    return Device(name, "tpu", int(gib * _GIB), rates, gigabytes * GB, between * GB, price, tuple(kinds.split(",")))


# Rates and bandwidths are the makers' own, without sparsity:
#   V100, T4, A10: NVIDIA's data sheets of each (V100: SXM2). A100: NVIDIA A100 data sheet (SXM); 1,555 GB/s of the 40 GB card: A100
#   architecture white paper. RTX 3090, A6000: NVIDIA Ampere GA102 white paper. RTX 4090: NVIDIA Ada white paper. L4, L40S: data sheets.
#   H100, H200: data sheets (SXM; h100-pcie: PCIe). RTX 5090: NVIDIA RTX Blackwell white paper. B200: DGX B200 data sheet, an eighth of it.
#   TPU: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (of a chip; all its links in one direction).
# Prices are public prices of one device on demand, in US dollars, listed from 2025 to the middle of 2026: Lambda's (V100, A10, A6000,
# A100 40 GB), RunPod's (the other GPUs), Google Cloud's (T4; TPUs in its cheapest region). They change, and differ between sellers by more
# than twice: --plan.price gives yours.
_TABLE = (
    _gpu("v100-16g", 15.8, 125, 15.7, 900, 150, 0.55, "tesla v100-sxm2-16gb", bfloat16=False),
    _gpu("v100-32g", 31.7, 125, 15.7, 900, 150, 0.79, "tesla v100-sxm2-32gb", bfloat16=False),
    _gpu("t4", 15, 65, 8.1, 320, 16, 0.35, "tesla t4", bfloat16=False),
    _gpu("a10", 22.5, 125, 62.5, 600, 32, 0.86, "nvidia a10"),
    _gpu("rtx3090", 24, 71, 35.6, 936, 32, 0.22, "nvidia geforce rtx 3090"),
    _gpu("a6000", 48, 154.8, 77.4, 768, 32, 0.80, "nvidia rtx a6000"),
    _gpu("a100-40g", 40, 312, 156, 1555, 300, 1.48, "nvidia a100-sxm4-40gb,nvidia a100-pcie-40gb"),
    _gpu("a100-80g", 80, 312, 156, 2039, 300, 1.39, "nvidia a100-sxm4-80gb,nvidia a100 80gb pcie"),
    _gpu("l4", 22.5, 121, 60, 300, 32, 0.44, "nvidia l4"),
    _gpu("rtx4090", 24, 165.2, 82.6, 1008, 32, 0.34, "nvidia geforce rtx 4090"),
    _gpu("l40s", 45, 362, 183, 864, 32, 0.79, "nvidia l40s"),
    _gpu("rtx5090", 31.8, 209.5, 104.8, 1792, 64, 0.69, "nvidia geforce rtx 5090"),
    _gpu("h100-pcie", 79.6, 756, 378, 2000, 64, 1.99, "nvidia h100 pcie"),
    _gpu("h100", 79.6, 989, 494, 3350, 450, 2.69, "nvidia h100 80gb hbm3"),
    _gpu("h200", 141 * GB / _GIB, 989, 494, 4800, 450, 3.59, "nvidia h200"),
    _gpu("b200", 180 * GB / _GIB, 2250, 1120, 8000, 900, 5.98, "nvidia b200"),
    _tpu("v4", 32, 275, 1228, 300, 3.22, "tpu v4"),
    _tpu("v5e", 16, 197, 819, 200, 1.20, "tpu v5 lite,tpu v5e"),
    _tpu("v5p", 95, 459, 2765, 600, 4.20, "tpu v5p,tpu v5"),
    _tpu("v6e", 32, 918, 1640, 400, 2.70, "tpu v6 lite,tpu v6e"),
)
DEVICES = {device.name: device for device in _TABLE}


def named(name: str) -> Device:
    """Returns a device of the table; raises `UserError` where there is none of this name.

    >>> named("a100-80g").memory // 2**30
    80
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def kind_of(kind: str) -> Device | None:
    """Returns the device that JAX calls by this name, or None where the table hasn't it.

    >>> kind_of("NVIDIA H100 80GB HBM3").name, kind_of("TPU v5 lite").name, kind_of("cpu")
    ('h100', 'v5e', None)
    """
    return next((device for device in _TABLE if kind.lower() in device.kinds), None)


@functools.cache
def this_device() -> Device:
    """Returns one of this machine's devices; what the table hasn't is measured, in a second."""
    device = jax.devices()[0]
    counted = (device.memory_stats() or {}).get("bytes_limit")
    if (found := kind_of(device.device_kind)) is not None:
        return found
    memory = int(counted or _host_memory())
    rates, bandwidth = _measured()
    return Device(device.device_kind, device.platform, memory, rates, bandwidth, bandwidth, 0.0)


def _host_memory() -> int:
    """Bytes of this machine's memory, or of what its container may have of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(whole, int(file.read()))
    except (OSError, ValueError):  # there is none, or it says max
        return whole


_SIDE, _READ, _TIMES = 512, 2**26, 10  # of the factors measured; bytes of an array read; the best of so many counts


def _measured() -> tuple[dict[str, float], float]:
    """Operations a second of a product by type, and bytes a second of reading an array, on this machine's first device."""
    rates = {}
    for dtype in ("float32", "bfloat16", "float16"):
        factor = jnp.ones((_SIDE, _SIDE), dtype)
        rates[dtype] = 2 * _SIDE**3 / _seconds(jax.jit(lambda a: a @ a), factor)
    array = jnp.ones(_READ // 4, jnp.float32)
    return rates, _READ / _seconds(jax.jit(jnp.sum), array)


def _seconds(function: Any, array: jax.Array) -> float:
    jax.block_until_ready(function(array))
    found = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        jax.block_until_ready(function(array))
        found.append(time.perf_counter() - began)
    return min(found)


AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sides of a mesh that `--plan.mesh` gives; raises `UserError` for another form.

    >>> parse_mesh("fsdp:8")
    {'data': 1, 'fsdp': 8, 'tensor': 1}
    """
    sides, given = dict.fromkeys(AXES, 1), set[str]()
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES:
            raise unknown("axis of the mesh", name, AXES)
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--plan.mesh: {name} has 1 device or more, not '{size}'. Write it as data:1,fsdp:8,tensor:1.")
        if name in given:
            raise UserError(f"--plan.mesh gives {name} twice.")
        given.add(name)
        sides[name] = int(size)
    return sides
