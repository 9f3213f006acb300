"""Extractive question answering: where in a text the answer to a question begins and ends, or that it isn't there."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.examples import Examples
from jaxft.data.questions import Question, questions_of
from jaxft.data.rows import Rows
from jaxft.data.windows import Windows, windows
from jaxft.errors import UserError
from jaxft.models.heads import FIRST
from jaxft.tasks.base import Batch, Report, Table, Task
from jaxft.tasks.head import Sums
from jaxft.tasks.spans import best_answers
from jaxft.tasks.squad_figures import normalized, squad_figures

_NO_ANSWER = "(no answer)"


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Task):
    """Cross-entropy of the answer's first and of its last token among a window's, their mean (Devlin et al. 2018, arXiv:1810.04805).

    Rows are SQuAD's: `question`, `context`, `answers`. A context that is longer than `config.data.max_length` leaves room for stands in
    several windows, each with the question. A window that hasn't the whole answer points at its first token. (A causal model's first
    token sees no text: its score is what those of the context's tokens are measured against.)

    >>> QuestionAnswering(stride=64).stride
    64
    """

    stride: int = 128  # tokens of the context that a window shares with the one before it: transformers' doc_stride
    question_length: int = 64  # tokens of a question; a longer one is cut at its end
    no_answer: bool = True  # a question may have no answer, as in SQuAD 2.0; otherwise rows without one are refused
    no_answer_threshold: float = 0.0  # how far the score of "no answer" must be above the best answer's, for there to be none
    n_best: int = 20  # likeliest starts, and ends, of a window that are paired
    max_answer_length: int = 30  # tokens of an answer

    model_task: ClassVar[str] = "question_answering"
    data_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("question_length", "n_best", "max_answer_length"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name} is 1 or more, not {getattr(self, name)}.")
        if self.stride < 0:
            raise UserError(f"task.stride is a number of tokens, 0 or more, not {self.stride}.")
        if self.no_answer_threshold and not self.no_answer:
            raise UserError("task.no_answer_threshold has no effect without task.no_answer. Leave one of them out.")

    # ------------------------------------------------------------ rows

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Windows:
        """Returns a set's rows as windows, with a slot for each token of the context and one for the first token."""
        questions = questions_of(rows)
        for i, one in enumerate(questions):
            self._check_answered(one, rows.place(i))
        takes_types = model.pooling == FIRST
        return windows(questions, tokenizer, data.max_length, self.stride, self.question_length, takes_types)

    def _check_answered(self, question: Question, place: str) -> None:
        if not question.answers and not self.no_answer:
            raise UserError(f"{place}: the question has no answer, and config.task.no_answer is off. Turn it on.")

    def faults(self, rows: Rows, tokenizer: Any, data: DataConfig, options: Mapping[str, Any]) -> dict[int, str]:
        """Returns the questions without an answer, where that isn't allowed."""
        questions = questions_of(rows)
        return rows.faults(lambda i: self._check_answered(questions[i], rows.place(i)))

    def row_groups(self, rows: Rows) -> np.ndarray | None:
        """Returns the number of each row's context, (n,) int: who has read it knows more of the other questions on it."""
        if "context" not in rows.dataset.column_names:
            return None  # `examples` says so
        return np.unique([str(context) for context in rows.dataset["context"]], return_inverse=True)[1]

    def warnings(self, tokenizer: Any, training: Examples) -> list[str]:
        """Returns which questions are cut, which answers are in no window, and that a setting doesn't fit the questions."""
        assert isinstance(training, Windows)
        found, has = [], np.asarray([bool(one.answers) for one in training.questions])
        if long := int((training.question_lengths > self.question_length).sum()):
            found.append(
                f"{long:,} training questions have more than config.task.question_length={self.question_length} tokens and are cut."
            )
        seen = np.zeros(len(has), bool)
        seen[training.rows[training.answered]] = True
        if lost := int((has & ~seen).sum()):
            found.append(f"{lost:,} training answers are whole in no window and count as none. Raise config.task.stride, or max_length.")
        if self.no_answer and has.all():
            found.append("every training question has an answer. Set --config.task.no_answer=False, so that one is always given.")
        return found

    # ------------------------------------------------------------ loss

    def outputs(self, model: nn.Module, logits: jax.Array, batch: Batch) -> jax.Array:
        """Returns the log-likelihoods of start and end in each slot, among its window's slots, (batch * slots, 2) float32."""
        rows, slots = batch["scored"].shape
        real = batch["weights"] > 0
        places = jnp.take_along_axis(batch["positions"], batch["scored"], axis=1)
        before = jnp.pad(places[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.iinfo(places.dtype).max)
        begins = (places <= before) & real  # a window's first slot reads its first token, which stands before all others
        numbers = jnp.where(real, jnp.cumsum(begins, axis=1) - 1, slots)
        likelihoods = jax.vmap(lambda logits, numbers: _log_softmax(logits, numbers, slots + 1))
        found: jax.Array = likelihoods(logits.astype(jnp.float32).reshape(rows, slots, -1), numbers)
        return found.reshape(rows * slots, -1)

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over windows of log-likelihoods, as of `outputs`."""
        nll = -jnp.sum(jnp.mean(targets * logits, axis=-1) * weights)
        return Sums(nll, nll, None, jnp.sum(targets[:, 0] * weights))

    def divergence(self, model: nn.Module, one: jax.Array, other: jax.Array) -> jax.Array:
        """Returns each slot's part of how far apart two outputs are, (slots,) float32: start's and end's divergences, their mean."""
        return jnp.mean((jnp.exp(one) - jnp.exp(other)) * (one - other), axis=-1) / 2

    # ------------------------------------------------------------ figures

    def measure(self, model: nn.Module, params: Any, batch: Batch) -> tuple[Sums, Any]:
        """Returns the sums over a batch and the scores of start and end, (batch, slots, 2) float32."""
        logits = self.logits(model, params, batch).astype(jnp.float32)
        targets, weights = batch["targets"].reshape(-1, 2), batch["weights"].reshape(-1)
        return self.loss(model, self.outputs(model, logits, batch), targets, weights), logits.reshape(*batch["scored"].shape, 2)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on any validation set."""
        return ("loss", "exact_match", "f1")

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns the mean loss of a window, and of the questions exact match and F1 as SQuAD's own script has them; where some have no
        answer, also those of the others, and the share of these that got none.
        """
        assert isinstance(examples, Windows)
        assert outputs is not None
        return {"loss": float(sums.nll / sums.weight)} | squad_figures(self.answers(examples, outputs), examples.questions)

    def answers(self, examples: Windows, outputs: np.ndarray) -> list[str]:
        """Returns the predicted answer to each row's question, "" for none."""
        return best_answers(examples, outputs, self.n_best, self.max_answer_length, self.no_answer, self.no_answer_threshold)

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns exact match and F1 of always giving the commonest training answer, which may be none."""
        assert isinstance(training, Windows)
        assert isinstance(examples, Windows)
        given = [normalized(one.answers[0].text) if one.answers else "" for one in training.questions]
        commonest = collections.Counter(given).most_common(1)[0][0]
        return squad_figures([commonest] * len(examples.questions), examples.questions)

    def report(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None) -> Report:
        """Returns exact match and F1 of the questions with an answer, and of those without one."""
        assert isinstance(examples, Windows)
        assert outputs is not None
        kinds: Mapping[str, list[tuple[str, Question]]] = {"with an answer": [], "without one": []}
        for made, question in zip(self.answers(examples, outputs), examples.questions, strict=True):
            kinds["with an answer" if question.answers else "without one"].append((made, question))
        if not all(kinds.values()):
            return Report()
        rows = []
        for kind, pairs in kinds.items():
            found = squad_figures(*zip(*pairs, strict=True))
            none = sum(not made for made, _ in pairs)
            rows.append((kind, f"{found['exact_match']:.1%}", f"{found['f1']:.1%}", f"{none / len(pairs):.1%}", f"{len(pairs):,}"))
        return Report((Table("By kind of question", ("questions", "exact match", "F1", "given none", "rows"), tuple(rows)),))

    def shown(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Returns the true answers, and the predicted one, to the questions of some windows."""
        assert isinstance(examples, Windows)
        assert outputs is not None
        made, rows = self.answers(examples, outputs), [int(examples.rows[i]) for i in numbers]
        true = [" / ".join(dict.fromkeys(answer.text for answer in examples.questions[row].answers)) for row in rows]
        return [(one or _NO_ANSWER, made[row] or _NO_ANSWER) for one, row in zip(true, rows, strict=True)]


def _log_softmax(logits: jax.Array, numbers: jax.Array, count: int) -> jax.Array:
    """The logarithms of the softmax over the slots of one number: of logits (slots, outputs), numbers (slots,) below `count`."""
    highest = jax.lax.stop_gradient(jax.ops.segment_max(logits, numbers, count))[numbers]
    total = jax.ops.segment_sum(jnp.exp(logits - highest), numbers, count)
    return logits - highest - jnp.log(total[numbers])
