"""Supervised fine-tuning of a causal model: the next token, at the scored positions of packed rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.tasks.head import Sums, gather, head_sums


@dataclasses.dataclass(frozen=True)
class SFT:
    """Negative log-likelihood of the scored tokens: the assistant's turns, a completion, or all of a text.

    >>> SFT(label_smoothing=0.1).label_smoothing
    0.1
    """

    label_smoothing: float = 0.0  # share of each target spread over the vocabulary
    z_loss: float = 0.0  # weight of the squared log-partition
    head_chunk: int = 1024  # scored tokens whose logits exist at one time

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"task.label_smoothing is a share from 0 up to, not including, 1, not {self.label_smoothing}.")
        if self.z_loss < 0.0:
            raise UserError(f"task.z_loss is a weight of 0 or more, not {self.z_loss}.")
        if self.head_chunk < 1:
            raise UserError(f"task.head_chunk is a number of tokens, 1 or more, not {self.head_chunk}.")

    def sums(self, model: nn.Module, params: Any, batch: Mapping[str, jax.Array], rngs: Mapping[str, jax.Array], **options: Any) -> Sums:
        """Returns the loss and its companions, summed over a batch.

        Args:
          model: a causal model with methods `features` and `logits`.
          params: its parameters.
          batch: tokens, segment_ids, positions, (batch, length) int32; scored, targets (batch, count) int32 and weights (batch, count)
            float32: hidden state `scored` predicts token `targets`.
          rngs: keys of `dropout` and `noise`, where they are on.
          **options: of `model.features`.
        """
        hidden: Any = model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            rngs=dict(rngs),
            method="features",
            **options,
        )
        rows = gather(hidden, batch["scored"])
        targets, weights = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
        return head_sums(model, params, rows, targets, weights, self.head_chunk, self.label_smoothing, self.z_loss)
