"""Several examples a row: which examples share a row, and which tokens all of them begin with."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TokenRows(Protocol):
    """What `common_prefix` reads: indexed pairs of (length,) tokens and (length,) scored."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]: ...


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of example indices: each example, in the given order, into the first row that has room for it.

    First-fit needs at most 1.7 times the fewest rows possible (Dósa and Sgall 2013). A segment tree over the rows' free room finds the
    row, in O(n log n) altogether.

    Args:
        lengths: (n,) tokens of each example.
        capacity: tokens a row holds.

    Raises:
        ValueError: an example is longer than a row, or has no tokens.

    >>> pack([3, 4, 2, 5, 1], capacity=6)
    [[0, 2, 4], [1], [3]]
    """
    sizes: list[int] = np.asarray(lengths, dtype=np.int64).tolist()  # Python's own numbers: the loop below is several times faster
    if sizes and not 0 < min(sizes) <= max(sizes) <= capacity:
        raise ValueError(f"Lengths from {min(sizes)} to {max(sizes)} don't all lie in 1 to {capacity}, the capacity of a row.")
    # All rows but one are more than half full, so this many always suffice.
    most = min(len(sizes), 2 * sum(sizes) // max(capacity, 1) + 2)
    leaves = 1 << max(most - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # room[node] is the largest free room below the node; row r is the leaf leaves + r
    rows: list[list[int]] = []
    for example, length in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        room[node] -= length
        while node > 1:
            parent = node >> 1
            largest = max(room[node], room[node ^ 1])
            if room[parent] == largest:
                break
            room[parent] = largest
            node = parent
    return rows


def common_prefix(examples: TokenRows) -> int:
    """Returns how many leading tokens all examples share and none scores, leaving every example at least one token of its own.

    The token after the prefix may be scored: the prefix's last position predicts it, with the same hidden state for every example,
    since a prefix attends to nothing but itself.

    >>> tokens = [np.array([1, 7, 8, 4]), np.array([1, 7, 8, 5, 6])]
    >>> common_prefix([(row, np.arange(len(row)) >= 3) for row in tokens])
    3
    >>> common_prefix([(row, np.arange(len(row)) >= 2) for row in tokens])
    2
    """
    if not len(examples):
        return 0
    first, _ = examples[0]
    shared = len(first)
    for i in range(len(examples)):
        tokens, scored = examples[i]
        shared = min(shared, len(tokens) - 1)
        differs = (tokens[:shared] != first[:shared]) | scored[:shared]
        if differs.any():
            shared = int(differs.argmax())
        if shared == 0:
            break
    return shared
