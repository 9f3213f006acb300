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
program = jax.jit(lambda x: jnp.sort(x, axis=-1)[:, ::3].sum())  # a block of 32 MiB beside what it is given
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
    held = host_memory.resident_bytes()
    with host_memory.kept():
        pass  # an evaluation between two steps
    again = [faults(memory) for _ in range(7)]
    host_memory.give_back()
    given = held - host_memory.resident_bytes()
after = [faults() for _ in range(4)]
print(min(plain), sorted(kept)[4], sorted(again)[4], given, min(after))
"""


@pytest.mark.skipif(host_memory._glibc() is None, reason="glibc and a CPU are what it is about")
def test_a_programs_memory_is_kept_for_its_next_call_and_given_back_when_asked():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, kept, again, given, after = map(int, done.stdout.split())
    pages = 2**25 // 4096
    assert plain > 0.9 * pages  # each call has all pages of the block mapped anew
    assert max(kept, again) < 0.05 * pages  # of most calls: something else may get in between
    assert given > 0.9 * 2**25
    assert after > 0.9 * pages  # as before
