"""Examples as batches of static shape, at random access: the state of the stream is the step."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.packing import common_prefix, pack
from jaxft.data.tokenize import Examples
from jaxft.models.attention import PADDING, SHARED

_LENGTH_MULTIPLE = 64  # tokens: what attention kernels and vector units divide evenly
_SCORED_MULTIPLE = 8
_EMPTY = -1  # stands for a row of padding

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which examples stand in which row, and the static shape of a row."""

    examples: Examples
    rows: Sequence[Sequence[int]]  # the examples of each row, in order
    prefix: int  # leading tokens that all examples share and that stand once a row; 0 is none
    length: int  # L, tokens a row
    slots: int  # S, scored positions a row
    pad_token_id: int

    def fill(self, chosen: Sequence[int]) -> Batch:
        """Returns the batch of these rows: (B, L) tokens, segment_ids, positions and (B, S) scored, targets, weights."""
        size = (len(chosen), self.length)
        batch = {
            "tokens": np.full(size, self.pad_token_id, np.int32),
            "segment_ids": np.full(size, PADDING, np.int32),
            "positions": np.zeros(size, np.int32),
            "scored": np.zeros((len(chosen), self.slots), np.int32),
            "targets": np.zeros((len(chosen), self.slots), np.int32),
            "weights": np.zeros((len(chosen), self.slots), np.float32),
        }
        for b, row in enumerate(chosen):
            if row != _EMPTY:
                self._fill_row({name: array[b] for name, array in batch.items()}, self.rows[row])
        return batch

    def _fill_row(self, row: Batch, indices: Sequence[int]) -> None:
        prefix, start, slot = self.prefix, self.prefix, 0
        row["tokens"][:prefix] = self.examples[indices[0]][0][:prefix]
        row["segment_ids"][:prefix] = SHARED
        row["positions"][:prefix] = np.arange(prefix)
        for segment, i in enumerate(indices, start=1):
            tokens, scored = self.examples[i]
            stop = start + len(tokens) - prefix
            row["tokens"][start:stop] = tokens[prefix:]
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(prefix, len(tokens))
            targets = np.flatnonzero(scored)
            slots = slice(slot, slot + len(targets))
            # A token is predicted by the one before it: in the row, or, for an example's first own token, the prefix's last.
            row["scored"][slots] = np.where(targets == prefix, prefix - 1, start - prefix + targets - 1)
            row["targets"][slots] = tokens[targets]
            row["weights"][slots] = 1
            start, slot = stop, slots.stop

    def computed_tokens(self, row: int) -> int:
        """Returns the tokens that stand in the row, padding aside; a shared prefix stands once."""
        return int(self.examples.lengths[self.rows[row]].sum()) - self.prefix * (len(self.rows[row]) - 1)


def lay_out(examples: Examples, order: np.ndarray, config: DataConfig, share_prefix: bool, pad_token_id: int) -> Layout:
    """Returns the rows of the examples, packed first-fit, or one example a row without packing.

    Longer examples are placed first, those of one length in the given order: that needs at most 11/9 of the fewest rows possible
    (Johnson 1973), and on the demo's reviews 4% fewer than a random order.
    """
    prefix = common_prefix(examples) if config.packing and config.share_prefix and share_prefix else 0
    own = examples.lengths - prefix
    if own.max() > config.max_length - prefix:
        raise ValueError(f"An example has {examples.lengths.max()} tokens, more than max_length, {config.max_length}.")
    if config.packing:
        order = order[np.argsort(-own[order], kind="stable")]
        rows = [[int(order[i]) for i in row] for row in pack(own[order], config.max_length - prefix)]
    else:
        rows = [[int(i)] for i in order]
    longest = prefix + max(int(own[row].sum()) for row in rows)
    scored = np.add.reduceat(examples.scored.astype(np.int64), examples.offsets[:-1])
    slots = max(int(scored[row].sum()) for row in rows)
    length = min(config.max_length, _round_up(longest, _LENGTH_MULTIPLE))
    return Layout(examples, rows, prefix, length, _round_up(slots, _SCORED_MULTIPLE), pad_token_id)


class Batches:
    """The training batches: an endless stream of rows, each epoch in its own random order.

    Row k of the stream is row permutation(k // n)[k % n] of the n rows, so a batch is a function of the step alone: resuming needs
    nothing but the step, and an epoch's last batch is filled by the next epoch's first rows.

    Attributes:
        layout: the rows, built once in an order drawn by the seed.
        tokens_per_row: L.
        steps_per_epoch: steps that see each row once; a fraction where they don't come out even.
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
        """
        self.layout = lay_out(examples, _permutation(seed, "rows", 0, len(examples)), config, share_prefix, pad_token_id)
        self._shape = (accumulation, batch_size)
        n = len(self.layout.rows)
        # A step touches two epochs at most, unless the rows are fewer than a step's.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(seed, "data", epoch, n))
        self.tokens_per_row = self.layout.length
        self.steps_per_epoch = n / (accumulation * batch_size)
        self.efficiency = sum(self.layout.computed_tokens(row) for row in range(n)) / (n * self.layout.length)

    def batch(self, step: int) -> Batch:
        """Returns the batch of one optimizer step.

        Returns:
            tokens: (A, B, L) int32.
            segment_ids: (A, B, L) int32: 0 padding, -1 a prefix that the row's examples share, 1.. the example within its row.
            positions: (A, B, L) int32: from 0 in each example; after a shared prefix of P tokens, from P.
            scored: (A, B, S) int32: where in the row the token stands whose hidden state predicts the target.
            targets: (A, B, S) int32: the scored tokens.
            weights: (A, B, S) float32: 1, or 0 for slots that hold no target.
        """
        return {name: array.reshape(*self._shape, -1) for name, array in self.layout.fill(self._rows_of(step)).items()}

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
        count, n = self._shape[0] * self._shape[1], len(self.layout.rows)
        return [int(self._order(k // n)[k % n]) for k in range(step * count, (step + 1) * count)]


def evaluation_batches(
    examples: Examples, config: DataConfig, batch_size: int, share_prefix: bool, pad_token_id: int = 0
) -> Iterator[Batch]:
    """Yields batches of (B, L) and (B, S), as `Batches.batch`, that hold each example once; rows of padding fill the last one.

    Args:
        examples: the set to evaluate on.
        config: of it `max_length`, `packing` and `share_prefix`.
        batch_size: B, rows a batch.
        share_prefix: whether the model can attend to a shared prefix.
        pad_token_id: what fills the rows.
    """
    layout = lay_out(examples, np.arange(len(examples)), config, share_prefix, pad_token_id)
    for start in range(0, len(layout.rows), batch_size):
        chosen = range(start, min(start + batch_size, len(layout.rows)))
        yield layout.fill([*chosen, *[_EMPTY] * (batch_size - len(chosen))])


def _permutation(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, *purpose.encode(), epoch)).permutation(n)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
