"""Examples as batches of static shape, at random access: the state of the stream is the step."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.examples import Examples
from jaxft.data.packing import common_prefix, pack
from jaxft.models.attention import PADDING, SHARED

_LENGTH_MULTIPLE = 64  # tokens: what attention kernels and vector units divide evenly
SCORED_MULTIPLE = 8  # scored positions a row
_EMPTY = -1  # stands for a row of padding
_BALANCED_EPOCHS = 8  # draws of what balanced classes repeat; then the first again

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Room:
    """Places that the model fills with virtual tokens, before each example of a row."""

    tokens: int = 0
    read: bool = False  # whether the head reads the first of them for an example's first token


NO_ROOM = Room()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which examples stand in which row, and the static shape of a row."""

    examples: Examples
    rows: Sequence[Sequence[int]]  # the examples of each row, in order
    prefix: int  # leading tokens that all examples share and that stand once a row; 0 is none
    length: int  # L, tokens a row
    slots: int  # S, scored positions a row
    pad_token_id: int
    room: Room = NO_ROOM

    def fill(self, chosen: Sequence[int]) -> Batch:
        """Returns the batch of these rows: (B, L) tokens, segment_ids, positions and what else the examples have of each token; (B, S)
        scored and weights; targets, (B, S) or (B, S, outputs).
        """
        size, slots, held = (len(chosen), self.length), (len(chosen), self.slots), self.examples.slots
        batch = {
            "tokens": np.full(size, self.pad_token_id, np.int32),
            "segment_ids": np.full(size, PADDING, np.int32),
            "positions": np.zeros(size, np.int32),
            "scored": np.zeros(slots, np.int32),
            "targets": np.zeros((*slots, *held.targets.shape[1:]), held.targets.dtype),
            "weights": np.zeros(slots, np.float32),
        } | {name: np.zeros(size, np.int32) for name in self.examples.per_token}
        for b, row in enumerate(chosen):
            if row != _EMPTY:
                self._fill_row({name: array[b] for name, array in batch.items()}, self.rows[row])
        return batch

    def _fill_row(self, row: Batch, indices: Sequence[int]) -> None:
        prefix, start, slot = self.prefix, self.prefix, 0
        examples, held, room = self.examples, self.examples.slots, self.room.tokens
        per_token = {"tokens": examples.tokens, **examples.per_token}
        begin = int(examples.offsets[indices[0]])
        for name, values in per_token.items():
            row[name][:prefix] = values[begin : begin + prefix]
        row["segment_ids"][:prefix] = SHARED
        row["positions"][:prefix] = np.arange(prefix)
        for segment, i in enumerate(indices, start=1):
            begin, end, part = int(examples.offsets[i]), int(examples.offsets[i + 1]), held.part(i)
            stop, slots = start + room + end - begin - prefix, slice(slot, slot + part.stop - part.start)
            for name, values in per_token.items():
                row[name][start + room : stop] = values[begin + prefix : end]
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(prefix, room + end - begin)
            reads = held.reads[part] + (0 if self.room.read else room)
            row["scored"][slots] = np.where(reads < prefix, reads, start - prefix + reads)  # a prefix stands once, at the row's beginning
            row["targets"][slots] = held.targets[part]
            row["weights"][slots] = held.weights[part]
            start, slot = stop, slots.stop

    def slots_of(self, row: int) -> np.ndarray:
        """Returns the numbers, in the examples' slots, of the row's, in its order."""
        parts = [self.examples.slots.part(i) for i in self.rows[row]]
        return np.concatenate([np.arange(part.start, part.stop) for part in parts])

    def computed_tokens(self, row: int) -> int:
        """Returns the tokens that stand in the row, virtual ones too, padding aside; a shared prefix stands once."""
        count = len(self.rows[row])
        return int(self.examples.lengths[self.rows[row]].sum()) + self.room.tokens * count - self.prefix * (count - 1)


def lay_out(
    examples: Examples, order: np.ndarray, config: DataConfig, share_prefix: bool, pad_token_id: int, room: Room = NO_ROOM
) -> Layout:
    """Returns the rows of the examples, packed first-fit, or one example a row without packing.

    Longer examples are placed first, those of one length in the given order: that needs at most 11/9 of the fewest rows possible
    (Johnson 1973), and on the demo's reviews 4% fewer than a random order. A row is longer than max_length by one example's room.
    """
    held = examples.slots
    prefix = _prefix(examples) if config.packing and config.share_prefix and share_prefix and not room.tokens else 0
    own, longest_row = examples.lengths - prefix + room.tokens, config.max_length + room.tokens
    if own.max() > longest_row - prefix:
        raise ValueError(f"An example has {examples.lengths.max()} tokens, more than max_length, {config.max_length}.")
    if config.packing:
        order = order[np.argsort(-own[order], kind="stable")]
        rows = [[int(order[i]) for i in row] for row in pack(own[order], longest_row - prefix)]
    else:
        rows = [[int(i)] for i in order]
    longest = prefix + max(int(own[row].sum()) for row in rows)
    slots = max(int(held.counts[row].sum()) for row in rows)
    length = min(longest_row, _round_up(longest, _LENGTH_MULTIPLE))
    return Layout(examples, rows, prefix, length, _round_up(slots, SCORED_MULTIPLE), pad_token_id, room)


def _prefix(examples: Examples) -> int:
    held = examples.slots
    some = held.counts > 0
    first_reads = examples.lengths - 1  # of an example without a slot: anywhere
    first_reads[some] = held.reads[held.offsets[:-1][some]]
    return common_prefix([examples.tokens_of(i) for i in range(len(examples))], first_reads)


class Batches:
    """The training batches: an endless stream of rows, each epoch in its own random order.

    Row k of the stream is row permutation(k // n)[k % n] of the n rows, so a batch is a function of the step alone: resuming needs
    nothing but the step, and an epoch's last batch is filled by the next epoch's first rows. Where classes are balanced, some epochs are
    laid out, each with its own draw of the examples that it repeats, and follow each other in a circle.

    Attributes:
        layout: the rows, built once in an order drawn by the seed.
        tokens_per_row: L.
        steps_per_epoch: steps that see each row once; a fraction where they don't come out even, or epochs differ.
        efficiency: the share of the rows' tokens that are not padding.
    """

    def __init__(
        self,
        examples: Examples,
        config: DataConfig,
        batch_size: int,
        accumulation: int,
        seed: int,
        share_prefix: bool,
        pad_token_id: int = 0,
        classes: np.ndarray | None = None,
        stream: str = "",
        room: Room = NO_ROOM,
    ):
        """Builds the rows.

        Args:
            examples: the training set.
            config: of it `max_length`, `packing` and `share_prefix`.
            batch_size: B, rows a micro-batch.
            accumulation: A, micro-batches a step.
            seed: of the rows and of their order.
            share_prefix: whether the model can attend to a shared prefix; it also takes `config.share_prefix` and packing.
            pad_token_id: what fills the rows.
            classes: of each example, (n,) int, where each class is to come as often as any other.
            stream: the name of the stream, where a run has several: each has its own order.
            room: what stands before each example.
        """
        order = _permutation(seed, f"{stream}rows", 0, len(examples))
        orders = [order] if classes is None else balanced(classes[order], order)
        layouts = [lay_out(examples, order, config, share_prefix, pad_token_id, room) for order in orders]
        self.layout = _joined(layouts)
        self._shape, self._seed, self._stream = (accumulation, batch_size), seed, stream
        self._epochs = np.cumsum([0, *(len(layout.rows) for layout in layouts)])  # where each epoch's rows begin
        # A step touches two epochs at most, unless the rows are fewer than a step's.
        self._order = functools.lru_cache(maxsize=2)(self._permuted)
        n = len(self.layout.rows)
        self.tokens_per_row = self.layout.length
        self.steps_per_epoch = n / len(layouts) / (accumulation * batch_size)
        self.efficiency = sum(self.layout.computed_tokens(row) for row in range(n)) / (n * self.layout.length)

    def batch(self, step: int) -> Batch:
        """Returns the batch of one optimizer step.

        Returns:
            tokens: (A, B, L) int32.
            segment_ids: (A, B, L) int32: 0 padding, -1 a prefix that the row's examples share, 1.. the example within its row.
            positions: (A, B, L) int32: from 0 in each example; after a shared prefix of P tokens, from P.
            scored: (A, B, S) int32: where in the row the token stands whose hidden state predicts the target.
            targets: (A, B, S) int32: what stands there, tokens or classes; or (A, B, S, outputs) float32.
            weights: (A, B, S) float32: what each counts; 0 for slots that hold no target.
            and what else the examples have of each token, (A, B, L) int32 by its name.
        """
        return {name: array.reshape(*self._shape, *array.shape[1:]) for name, array in self.layout.fill(self._rows_of(step)).items()}

    def examples_of(self, step: int) -> list[int]:
        """Returns the examples of the step's batch, row after row."""
        return [i for row in self._rows_of(step) for i in self.layout.rows[row]]

    def real_tokens(self, step: int) -> int:
        """Returns the tokens of the step's examples; a shared prefix counts once an example."""
        return int(self.layout.examples.lengths[self.examples_of(step)].sum())

    def computed_tokens(self, step: int) -> int:
        """Returns the tokens that stand in the step's rows, padding aside; a shared prefix counts once a row."""
        return sum(self.layout.computed_tokens(row) for row in self._rows_of(step))

    def _rows_of(self, step: int) -> list[int]:
        count = self._shape[0] * self._shape[1]
        return [self._row(k) for k in range(step * count, (step + 1) * count)]

    def _row(self, k: int) -> int:
        """The row that stands at place k of the stream."""
        turn, place = divmod(k, len(self.layout.rows))
        epoch = int(np.searchsorted(self._epochs, place, side="right")) - 1
        return int(self._order(turn * (len(self._epochs) - 1) + epoch)[place - self._epochs[epoch]])

    def _permuted(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in its order."""
        start, stop = self._epochs[(which := epoch % (len(self._epochs) - 1)) : which + 2]
        return start + _permutation(self._seed, f"{self._stream}data", epoch, stop - start)


def balanced(classes: np.ndarray, examples: np.ndarray) -> list[np.ndarray]:
    """Returns the examples of some epochs, each class as often as the most frequent one.

    Each example stands in each epoch, those of rarer classes several times, and as evenly as can be: what is left over in one epoch comes
    first in the next. Where no example is left over, one epoch is all.

    Args:
        classes: (n,) int, of each example.
        examples: (n,) int, in an order drawn by a seed, which says whose turn it is.

    >>> [epoch.tolist() for epoch in balanced(np.array([0, 0, 0, 0, 1, 1]), np.arange(6))]
    [[0, 1, 2, 3, 4, 5, 4, 5]]
    """
    members = [examples[classes == one] for one in np.unique(classes)]
    most = max(map(len, members))
    epochs = 1 if all(most % len(own) == 0 for own in members) else _BALANCED_EPOCHS
    turns = np.arange(most)

    def drawn(own: np.ndarray, epoch: int) -> np.ndarray:
        return own[(epoch * (most % len(own)) + turns) % len(own)]

    return [np.concatenate([drawn(own, epoch) for own in members]) for epoch in range(epochs)]


def _joined(layouts: Sequence[Layout]) -> Layout:
    """The rows of all layouts, in one shape."""
    rows = [row for layout in layouts for row in layout.rows]
    length, slots = max(layout.length for layout in layouts), max(layout.slots for layout in layouts)
    return dataclasses.replace(layouts[0], rows=rows, length=length, slots=slots)


def each_once(layout: Layout, batch_size: int) -> Iterator[tuple[range, Batch]]:
    """Yields the numbers of some rows, and their batch of `batch_size` rows, filled up with rows of padding; each row stands in one."""
    for start in range(0, len(layout.rows), batch_size):
        chosen = range(start, min(start + batch_size, len(layout.rows)))
        yield chosen, layout.fill([*chosen, *[_EMPTY] * (batch_size - len(chosen))])


def _permutation(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, *purpose.encode(), epoch)).permutation(n)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
