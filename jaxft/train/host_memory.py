"""Where a program on a CPU has its memory from: between two calls it is kept for the next, as far as glibc is asked to.

A program takes its temporary memory as one block. glibc maps a block of that size for the call and unmaps it behind, so that the system
clears and maps each of its pages anew in every step. Inside of `kept` such blocks come from the heap and stay in it. That takes a program
which runs in the thread that calls it: blocks of other threads are mapped all the same (mallopt(3), malloc/arena.c). So the next batch is
made after the step, not beside it. Behind the last `kept` glibc's thresholds stand where its own adjustment, which then stays off, would
end; MALLOC_ settings of the environment are overwritten.
"""

import contextlib
import ctypes
import pathlib
import resource
import sys
from collections.abc import Iterator
from typing import Any

import jax

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt
# What glibc starts with, and where its own adjustment of the other two ends
_MAPPED, _LARGEST_THRESHOLD = 65536, 2**25
_FIRST = 2  # calls after which all that is free is given back: others take a part of the block meanwhile, and the next one is beside it
_GROWTH, _SLACK = 1.1, 2**26  # more than is usual after a call: the block was broken up again

_depth = 0  # of `kept`: in the module, since glibc's settings are the process's


def run_in_calling_thread() -> None:
    """Has programs on a CPU run in the thread that calls them, where no backend has started yet."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


class Kept:
    """What of the process's memory is usual after a call."""

    def __init__(self, libc: Any):
        self._libc, self._calls, self._usual = libc, 0, 0

    def settle(self) -> None:
        """Gives free memory back where there is more than usual; called after each call of the program."""
        if self._libc is None:
            return
        self._calls += 1
        resident = resident_bytes()
        if self._calls <= _FIRST or (self._usual and resident > _GROWTH * self._usual + _SLACK):
            self._libc.malloc_trim(0)
            self._usual = 0
        else:
            self._usual = self._usual or resident


@contextlib.contextmanager
def kept() -> Iterator[Kept]:
    """Keeps what programs give back for their next call, on a CPU with glibc; elsewhere nothing is changed."""
    global _depth
    libc = _glibc()
    if libc is None:
        yield Kept(None)
        return
    if not _depth:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.malloc_trim(0)
    _depth += 1
    try:
        yield Kept(libc)
    finally:
        _depth -= 1
        if not _depth:
            libc.mallopt(_MMAP_MAX, _MAPPED)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.malloc_trim(0)


def give_back() -> None:
    """Gives all free memory back, before something that needs much: a copy of the state."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, where it is glibc and programs run on a CPU; else None."""
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def resident_bytes() -> int:
    """Returns the memory that this process has; where the system doesn't say, the most that it had."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()
