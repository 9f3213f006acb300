"""Supervised fine-tuning of a causal model: the next token, at the scored positions of packed rows."""

import dataclasses
import string
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.conversations import are_texts, question
from jaxft.data.examples import Examples, Labelled, NextTokens, answer_end
from jaxft.data.rows import Rows
from jaxft.data.unlabelled import without_answers
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

    def label_columns(self, data: DataConfig) -> tuple[str, ...]:
        """Returns the columns that hold nothing but an answer."""
        return ("completion", "output", *(name for _, name, _, _ in string.Formatter().parse(data.completion) if name))

    def unlabelled(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module, known: bool, answer_tokens: int = 0) -> Labelled:
        """Returns what comes before each row's answer, and a plain text whole; a slot for each token that another stands before.

        With `answer_tokens` that many tokens are left free behind each, and the slots are theirs: their targets are the tokens of the
        hidden answer, UNKNOWN behind its end.
        """
        from jaxft.data.tokenize import prompt_tokens  # as above

        places = [rows.place(i) for i in range(len(rows))]
        asked = [question(row, data, place) for row, place in zip(rows.dataset, places, strict=True)]
        plain = not answer_tokens and not data.prompt and are_texts(rows.dataset.column_names)
        prompts = self._texts(rows, tokenizer, data) if plain else prompt_tokens(asked, places, tokenizer, data)
        answers = self._answers(rows, tokenizer, data) if known and answer_tokens else [np.zeros(0, np.int32)] * len(rows)
        return without_answers(prompts, answers, answer_tokens, data.max_length, places)

    def _texts(self, rows: Rows, tokenizer: Any, data: DataConfig) -> list[np.ndarray]:
        """The tokens of each row, whole."""
        found = self.examples(rows, tokenizer, dataclasses.replace(data, loss="all"), None)  # type: ignore[arg-type]  # looks at no model
        return [found.tokens_of(i) for i in range(len(found))]

    def _answers(self, rows: Rows, tokenizer: Any, data: DataConfig) -> list[np.ndarray]:
        """The tokens of each row's last answer."""
        found = self.examples(rows, tokenizer, data, None)  # type: ignore[arg-type]  # looks at no model
        scored = [found[i][1][found.prompts[i] :] for i in range(len(found))]
        return [found.tokens_of(i)[found.prompts[i] :][own] for i, own in enumerate(scored)]

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
