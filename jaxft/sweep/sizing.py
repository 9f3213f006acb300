"""How many runs of a population step side by side, and how many a population has: the measured rules, in one place.

Measured on a CPU core (processor time of a LoRA step, of one run alone, of one and of four in the program of a population):

| model   | tokens a step | alone  | one place | four places, each run |
|---------|--------------:|-------:|----------:|----------------------:|
| MiniLM  | 256           | 0.22 s | 0.23 s    | 0.21 s                |
| MiniLM  | 1024          | 0.85 s | 0.84 s    | 0.85 s                |
| SmolLM2 | 384           |        | 2.55 s    | 2.49 s                |

Its products are full already, so that runs side by side gain nothing that a place without a run doesn't lose: there they follow each other
in one place. What a population then saves of each run but the first is its start, the reading of weights and rows (8 to 20 s of wall time
with other programs on the machine, against 1 to 2 s) and the compilation of the step (6 to 8 s of processor time). That never costs, so
all runs that fit each other are one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

MOST = 16  # runs of a population: more of them gain little, and a sweep on several machines needs several populations
# Tokens of a step from which more of them no longer make it faster, by platform. Accelerators': an estimate, not measured.
FULL = {"cpu": 0, "gpu": 16384, "tpu": 16384}
_ACTIVATIONS = (
    34 / 2
)  # numbers that a layer keeps of each token and feature, without attention's weights: Korthikanti 2022, arXiv:2205.05198
_USED = 0.9  # of a device's memory
_COPIES = 3  # of a run's state, at most: the old one, the new one, and gradients with updates


def side_by_side(tokens: int, bytes_each: int = 0, bytes_shared: int = 0) -> int:
    """Returns how many runs step at once.

    Args:
      tokens: of a run's micro-batch.
      bytes_each: of the device's memory, that a run takes beside the base.
      bytes_shared: of the base.
    """
    device = jax.local_devices()[0]
    filling = FULL.get(device.platform, 0) // max(tokens, 1)
    limit = (device.memory_stats() or {}).get("bytes_limit")  # not what is in use now: a population that goes on has as many places
    if bytes_each and limit:
        filling = min(filling, (int(_USED * limit) - bytes_shared) // bytes_each)
    return min(max(filling, 1), MOST)


def bytes_of(state: Any, tokens: int, shape: Any, itemsize: int) -> int:
    """Returns about how much memory a run takes while it steps, beside the base.

    Args:
      state: of the run.
      tokens: of its micro-batch.
      shape: the model's configuration.
      itemsize: bytes of a number of the type that it computes in.
    """
    held = sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
    return _COPIES * held + int(_ACTIVATIONS * tokens * shape.num_hidden_layers * shape.hidden_size * itemsize)


def cut(group: Sequence[int]) -> list[list[int]]:
    """Returns runs that fit each other as populations.

    >>> cut(range(3))
    [[0, 1, 2]]
    """
    return [list(group[start : start + MOST]) for start in range(0, len(group), MOST)]


def split(groups: Sequence[Sequence[Any]], count: int) -> list[list[Any]]:
    """Returns groups of runs, the largest halved until so many workers have about as many runs each.

    >>> split([[0, 1, 2], [3]], 3)
    [[0, 1], [2], [3]]
    """
    found = [list(group) for group in groups]
    most = -(-sum(map(len, found)) // count)
    while found and len(largest := max(found, key=len)) > 1 and (len(found) < count or len(largest) > most):
        place, half = found.index(largest), (len(largest) + 1) // 2
        found[place : place + 1] = [largest[:half], largest[half:]]
    return found
