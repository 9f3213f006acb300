"""What all tests share: two devices, no network, and a JAX that mixes no types of its own accord."""

import gc
import os
import pathlib

# Tiny models compile for longer than they run: without the compiler's last passes the suite takes a third less time, and with its
# older way to make code of a fused loop another third.
# A program whose devices wait for each other ends the process after 40 seconds, less than a crowded machine may take: here 800.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=800"
)
os.environ.setdefault("PJRT_NPROC", "4")  # threads: more than devices, so that those that wait leave some to work
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Two devices on two cores: programs that wait for each other's parts while others hold the threads end the process, by XLA's own timeout.
jax.config.update("jax_cpu_enable_async_dispatch", False)

LONGEST = ("train/test_run.py", "sweep/test_sweep.py", "train/test_placement.py", "hub/test_peft.py")  # files, the longest first


def pytest_collection_modifyitems(items):
    """Starts with the files that take longest, so that no worker is left with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: next((place for name, place in places.items() if item.path.as_posix().endswith(name)), len(places)))


MAPS = pathlib.Path("/proc/self/maps")  # Linux lets a process have 65,530 of them, and a compiled program takes several
MOST_MAPS = 10_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Gives compiled programs up between files where there are many: a process that can map no more memory ends by a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
