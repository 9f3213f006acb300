"""A whole set as batches, laid out and filled as evaluation does."""

from collections.abc import Iterator

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.batches import NO_ROOM, Batch, Room, each_once, lay_out
from jaxft.data.examples import Examples


def evaluation_batches(
    examples: Examples, config: DataConfig, batch_size: int, share_prefix: bool, pad_token_id: int = 0, room: Room = NO_ROOM
) -> Iterator[Batch]:
    """Yields batches of (B, L) and (B, S), as `Batches.batch`, that hold each example once; rows of padding fill the last one.

    Args:
        examples: the set to evaluate on.
        config: of it `max_length`, `packing` and `share_prefix`.
        batch_size: B, rows a batch.
        share_prefix: whether the model can attend to a shared prefix.
        pad_token_id: what fills the rows.
        room: before each example.
    """
    layout = lay_out(examples, np.arange(len(examples)), config, share_prefix, pad_token_id, room)
    for _, batch in each_once(layout, batch_size):
        yield batch
