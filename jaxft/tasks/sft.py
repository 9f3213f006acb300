"""Supervised fine-tuning of a causal model: the next token, at the scored positions of packed rows."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.examples import Examples, NextTokens, answer_end
from jaxft.data.rows import Rows
from jaxft.errors import UserError
from jaxft.tasks.base import Task
from jaxft.tasks.head import Sums, check_head_chunk, check_label_smoothing, cross_entropy, language_scores


@dataclasses.dataclass(frozen=True)
class SFT(Task):
    """Negative log-likelihood of the scored tokens: the assistant's turns, a completion, or all of a text.

    >>> SFT(label_smoothing=0.1).label_smoothing
    0.1
    """

    label_smoothing: float = 0.0  # share of each target spread over the vocabulary
    z_loss: float = 0.0  # weight of the squared log-partition
    head_chunk: int = 1024  # scored tokens whose logits exist at one time

    model_task: ClassVar[str] = "causal_lm"
    generates: ClassVar[bool] = True
    data_fields: ClassVar[tuple[str, ...]] = ("system", "prompt", "completion", "template", "loss", "cache")

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if self.z_loss < 0.0:
            raise UserError(f"task.z_loss is a weight of 0 or more, not {self.z_loss}.")
        check_head_chunk(self.head_chunk)

    @property
    def chunk(self) -> int:  # type: ignore[override]  # a setting here
        """Scored tokens whose logits exist at one time."""
        return self.head_chunk

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> NextTokens:
        """Returns a set's rows as tokens, those of the answers scored."""
        from jaxft.data.tokenize import tokenize  # imports transformers: seconds that a mistyped flag needn't wait for

        return tokenize(rows, tokenizer, data)

    def warnings(self, tokenizer: Any, training: Examples) -> list[str]:
        """Returns what is wrong with the answers' ends."""
        assert isinstance(training, NextTokens)
        if not (training.cut == 0).any() or answer_end(tokenizer, training) is not None:
            return []
        return [
            "the training answers end with no special token, so the model won't learn where to stop. Put {{ eos_token }} behind the answer "
            "in the chat template (config.data.template)."
        ]

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over (tokens, vocabulary) logits."""
        return cross_entropy(logits, targets, weights, self.label_smoothing, self.z_loss)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on validation."""
        return ("loss", "accuracy", "perplexity")

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns mean negative log-likelihood (nats a scored token), perplexity and token accuracy."""
        return language_scores(sums)
