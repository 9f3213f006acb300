"""Memory that a program on a CPU gives back: in a process of its own, since glibc's settings are the process's."""

import subprocess
import sys

import pytest

from jaxft.train import host_memory

PROGRAM = """
import resource
import jax, jax.numpy as jnp
from jaxft.train import host_memory

host_memory.run_in_calling_thread()
start = jnp.arange(2**23, dtype=jnp.float32).reshape(64, -1) % 997
program = jax.jit(lambda x: (jax.lax.optimization_barrier(x * 2) * x[::-1]).sum())  # a block of 32 MiB beside what it is given
program(start).block_until_ready()

def faults(memory=None):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(start).block_until_ready()
    if memory is not None:
        memory.settle()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [faults() for _ in range(4)]
with host_memory.kept() as memory:
    kept = [faults(memory) for _ in range(9)]
    with host_memory.kept():
        pass  # an evaluation between two steps
    again = [faults(memory) for _ in range(7)]
    held = host_memory.resident_bytes()
    host_memory.give_back()
    given = held - host_memory.resident_bytes()
few = sum(count < 400 for count in [*kept, *again])  # of the block's 8192 pages
print(min(plain), few, given)
"""


def test_a_programs_memory_is_kept_for_its_next_call_and_given_back_when_asked():
    if host_memory._glibc() is None:
        pytest.skip("glibc and a CPU are what it is about")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, few, given = map(int, done.stdout.split())
    assert plain > 0.9 * 8192  # each call has all pages of the block mapped anew
    assert few >= 6  # of 16; four map it anew since all was given back before, and others where something took a part of the block
    assert given > 0.9 * 2**25
