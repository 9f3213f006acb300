"""Several examples a row: which examples share a row, and which tokens all of them begin with."""

from collections.abc import Sequence

import numpy as np


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


def common_prefix(rows: Sequence[np.ndarray], first_reads: np.ndarray) -> int:
    """Returns how many leading tokens all rows share, each keeping at least one token of its own, and none read before the last of them.

    The last one may be read: its hidden state is the same for every row, since a prefix attends to nothing but itself.

    Args:
        rows: (length,) tokens each.
        first_reads: (rows,) the first position of each whose hidden state the head reads.

    >>> common_prefix([np.array([1, 7, 8, 4]), np.array([1, 7, 8, 5, 6])], np.array([2, 2]))
    3
    >>> common_prefix([np.array([1, 7, 8, 4]), np.array([1, 7, 8, 5, 6])], np.array([1, 1]))
    2
    """
    if not len(rows):
        return 0
    first = rows[0]
    shared = min(len(first) - 1, int(first_reads.min()) + 1)
    for tokens in rows:
        shared = min(shared, len(tokens) - 1)
        differs = tokens[:shared] != first[:shared]
        if differs.any():
            shared = int(differs.argmax())
        if shared <= 0:
            return 0
    return shared
