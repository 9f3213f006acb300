"""One answer for a whole text, or a pair of texts: a class, several classes, or numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.encode import encode, joined
from jaxft.data.examples import Examples, Labelled, Slots
from jaxft.data.labels import LabelColumn, label_column, problem_of
from jaxft.data.rows import Rows
from jaxft.data.texts import columns_of, pairs_of, texts_of
from jaxft.data.unlabelled import with_column, without_labels
from jaxft.errors import UserError, unknown
from jaxft.models.heads import FIRST, MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from jaxft.tasks.base import Batch, Of, Report, Task
from jaxft.tasks.class_weights import check_named, check_weights, log_shares, weighted
from jaxft.tasks.head import Sums, check_label_smoothing, cross_entropy

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class SequenceClassification(Task):
    """Cross-entropy of a single label; binary cross-entropies of several labels, their mean; squared error of numbers.

    Rows have a text, maybe a second one, and a label: `config.data.text`, `text_pair`, `label`. The head reads an encoder's first token, a
    causal model's last.

    >>> SequenceClassification(label_smoothing=0.1).label_smoothing
    0.1
    """

    labels: tuple[str, ...] = ()  # names of the classes by their number; empty: those of the training rows
    problem_type: str = AUTO  # single_label_classification, multi_label_classification, regression; auto: by the training rows
    class_weights: tuple[tuple[str, float], ...] = ()  # what rows of a label count in the training loss; 1 where it isn't named
    balanced: bool = False  # all labels count alike in the training loss: their weights are the inverse of their frequency
    label_smoothing: float = 0.0  # share of each target spread over the classes

    model_task: ClassVar[str] = "sequence_classification"
    data_fields: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if self.problem_type not in (AUTO, *PROBLEM_TYPES):
            raise unknown("task.problem_type", self.problem_type, (AUTO, *PROBLEM_TYPES))
        check_weights(self.class_weights, self.balanced)
        if (self.balanced or self.class_weights) and self.problem_type in (MULTI_LABEL, REGRESSION):
            raise self._single_only(self.problem_type)

    # ------------------------------------------------------------ rows

    def check(self, data: DataConfig) -> None:
        """Raises `UserError` for settings of the data that this task would ignore, or that do twice what it does."""
        super().check(data)
        if data.balanced and self.balanced:
            raise UserError("config.data.balanced and config.task.balanced would both make up for rare labels. Give one of them.")

    def model_options(self, rows: Rows, data: DataConfig) -> dict[str, Any]:
        """Returns the labels and the problem type, for `load_pretrained`."""
        column = label_column(rows, data.label)
        problem = problem_of(column, self.problem_type)
        if problem != SINGLE_LABEL and (self.balanced or self.class_weights):
            raise self._single_only(problem)
        if problem != SINGLE_LABEL and self.label_smoothing:
            raise UserError(f"task.label_smoothing is for single labels; these rows are of {problem}. Leave it out.")
        if problem == REGRESSION:
            first = column.values[0]
            count = len(first) if isinstance(first, (list, tuple)) else 1
            return {"labels": self.labels or tuple(f"LABEL_{number}" for number in range(count)), "problem_type": problem}
        labels = self.labels or column.names()
        if not labels:
            raise UserError(f"{rows.name}: column '{data.label}' names no label at all: every list in it is empty.")
        if len(labels) < 2:
            raise UserError(f"{rows.name}: column '{data.label}' has one label only, '{labels[0]}': there is nothing to tell apart.")
        check_named(self.class_weights, labels)
        return {"labels": labels, "problem_type": problem}

    @staticmethod
    def _single_only(problem: str) -> UserError:
        return UserError(f"task.balanced and task.class_weights are for single labels, not for {problem}. Leave them out.")

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Labelled:
        """Returns a set's rows as tokens, a slot each: the first token of an encoder, the last of a causal model."""
        places = [rows.place(i) for i in range(len(rows))]
        found = encode(texts_of(rows, data), pairs_of(rows, data), tokenizer, data.max_length, places)
        tokens, offsets, cut, beside = joined(found, takes_types=model.pooling == FIRST)
        reads = np.zeros(len(rows), np.int64) if model.pooling == FIRST else np.diff(offsets) - 1
        targets = self._targets(label_column(rows, data.label), model)
        every = np.arange(len(rows) + 1, dtype=np.int64)
        slots = Slots(every, reads.astype(np.int32), targets, np.ones(len(rows), np.float32))
        return Labelled(tokens, offsets, cut, slots, every[:-1], beside)

    def _targets(self, column: LabelColumn, model: Any) -> np.ndarray:
        problem, names = model.config.problem_type, model.config.labels
        if problem == REGRESSION:
            return column.numbers(len(names))
        return column.indicators(names, self.labels) if problem == MULTI_LABEL else column.classes(names, self.labels)

    def faults(self, rows: Rows, tokenizer: Any, data: DataConfig, options: Mapping[str, Any]) -> dict[int, str]:
        """Returns the rows with a label that the training rows lack, or that is of another kind."""
        if not options:
            return {}
        column = label_column(rows, data.label)
        return column.faults(options["problem_type"], options["labels"], self.labels)

    def for_training(self, model: nn.Module, examples: Examples) -> Examples:
        """Returns the examples with the weights of their labels."""
        assert isinstance(examples, Labelled)
        return weighted(examples, model.config.labels, self.class_weights, self.balanced)

    def classes(self, model: nn.Module, examples: Examples) -> np.ndarray | None:
        """Returns the class of each example, (n,) int, where each has one."""
        return examples.slots.targets if model.config.problem_type == SINGLE_LABEL else None

    def row_classes(self, rows: Rows, data: DataConfig) -> np.ndarray | None:
        """Returns the class of each row, (n,) int, where each has one."""
        column = label_column(rows, data.label)
        if problem_of(column, self.problem_type) != SINGLE_LABEL:
            return None
        return np.unique([str(value) for value in column.values], return_inverse=True)[1]

    def row_labels(self, rows: Rows, data: DataConfig) -> list[tuple[str, ...]] | None:
        """Returns the labels of each row, one or several; None of numbers."""
        column = label_column(rows, data.label)
        if problem_of(column, self.problem_type) == REGRESSION:
            return None
        names = column.feature_names

        def parts(value: Any) -> Sequence[Any]:
            if not isinstance(value, (list, tuple)):
                return (value,)
            return [i for i, there in enumerate(value) if there] if column.is_multi_hot else value

        def name(part: Any) -> str:
            return names[part] if names and isinstance(part, int) and 0 <= part < len(names) else str(part)

        return [tuple(map(name, parts(value))) for value in column.values]

    def label_columns(self, data: DataConfig) -> tuple[str, ...]:
        """Returns the column of the labels."""
        return (data.label,)

    def unlabelled(self, rows: Rows, tokenizer: Any, data: DataConfig, model: Any, known: bool, answer_tokens: int = 0) -> Labelled:
        """Returns rows without labels as tokens, a slot each; their targets are the hidden classes, or unknown."""
        if known:
            return self.examples(rows, tokenizer, data, model)
        labels, problem = model.config.labels, model.config.problem_type
        placeholder: Any = {MULTI_LABEL: [labels[0]], REGRESSION: 0.0 if len(labels) == 1 else [0.0] * len(labels)}.get(problem, labels[0])
        return without_labels(self.examples(with_column(rows, data.label, [placeholder] * len(rows)), tokenizer, data, model))

    # ------------------------------------------------------------ loss

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over texts."""
        problem = model.config.problem_type
        if problem == SINGLE_LABEL:
            return cross_entropy(logits, targets, weights, self.label_smoothing, 0.0)
        logits = logits.astype(jnp.float32)
        if problem == REGRESSION:
            error = jnp.sum(jnp.mean((logits - targets) ** 2, axis=-1) * weights)
            return Sums(error, error, None, jnp.sum(weights))
        entropy = jnp.sum(jnp.mean(jax.nn.softplus(logits) - targets * logits, axis=-1) * weights)
        right = jnp.all((logits > 0) == (targets > 0.5), axis=-1).astype(jnp.float32)
        return Sums(entropy, entropy, jnp.sum(right * weights), jnp.sum(weights))

    def divergence(self, model: nn.Module, one: jax.Array, other: jax.Array) -> jax.Array:
        """Returns how far apart two outputs are: of classes the divergence of their distributions, of numbers the squared difference."""
        problem = model.config.problem_type
        if problem == SINGLE_LABEL:
            return super().divergence(model, one, other)
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        if problem == REGRESSION:
            return jnp.mean((one - other) ** 2, axis=-1)
        return jnp.mean((jax.nn.sigmoid(one) - jax.nn.sigmoid(other)) * (one - other), axis=-1) / 2

    # ------------------------------------------------------------ figures

    def measure(self, model: nn.Module, params: Any, batch: Batch) -> tuple[Sums, Any]:
        """Returns the sums over a batch and the logits, (batch, slots, labels) float32."""
        logits = self.logits(model, params, batch).astype(jnp.float32)
        targets, weights = batch["targets"].reshape(-1, *batch["targets"].shape[2:]), batch["weights"].reshape(-1)
        return self.loss(model, logits, targets, weights), logits.reshape(*batch["scored"].shape, -1)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on validation."""
        return {
            SINGLE_LABEL: ("loss", "accuracy", "macro_f1", "mcc"),
            MULTI_LABEL: ("loss", "accuracy", "micro_f1", "macro_f1"),
            REGRESSION: ("loss", "pearson", "spearman"),
        }[model.config.problem_type]

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns the mean loss, and by scikit-learn or SciPy: accuracy, macro F1 and Matthews' correlation of single labels; the share
        of texts with all labels right, micro and macro F1 of several; Pearson's and Spearman's correlation of numbers, 0 for constants.
        """
        from jaxft.tasks.class_figures import figures  # scikit-learn and matplotlib: seconds that a mistyped flag needn't wait for

        assert outputs is not None
        return {"loss": float(sums.nll / sums.weight)} | figures(examples.slots.targets, outputs, model.config.problem_type)

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns the metrics of always giving the shares of the classes in training, or the mean of the numbers."""
        targets, true, problem = training.slots.targets, examples.slots.targets, model.config.problem_type
        if problem == SINGLE_LABEL:
            constant = log_shares(targets, len(model.config.labels))
        else:
            mean = targets.mean(axis=0)
            odds = np.clip(mean, 1 / (len(targets) + 2), 1 - 1 / (len(targets) + 2))
            constant = np.log(odds / (1 - odds)) if problem == MULTI_LABEL else mean
        outputs = np.tile(constant.astype(np.float32), (len(true), 1))
        sums = self.loss(model, jnp.asarray(outputs), jnp.asarray(true), jnp.ones(len(true)))
        return self.scores(model, examples, jax.device_get(sums), outputs)

    def word_baseline(self, model: nn.Module, data: DataConfig, seed: int, training: Of, test: Of) -> dict[str, dict[str, float]]:
        """Returns the metrics of logistic regression on TF-IDF of words and pairs of words, by scikit-learn, as "linear"; {} but for single
        labels.
        """
        from jaxft.tasks.class_figures import word_logits  # as above

        if model.config.problem_type != SINGLE_LABEL:
            return {}
        texts, held_out = (["\n".join(parts) for parts in zip(*columns_of(rows, data), strict=True)] for rows, _ in (training, test))
        outputs = word_logits(texts, training[1].slots.targets, held_out, len(model.config.labels), seed)
        true = test[1].slots.targets
        sums = self.loss(model, jnp.asarray(outputs), jnp.asarray(true), jnp.ones(len(true)))
        return {"linear": self.scores(model, test[1], jax.device_get(sums), outputs)}

    def report(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None) -> Report:
        """Returns precision, recall and F1 of each label, and the confusion matrix of single labels as a picture."""
        assert outputs is not None
        problem, names, true = model.config.problem_type, model.config.labels, examples.slots.targets
        if problem == REGRESSION:
            return Report()
        from jaxft.tasks.class_figures import class_report  # as above

        return class_report(true, outputs, names, problem)

    def shown(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Returns the true and the predicted labels, or numbers, of some examples."""
        assert outputs is not None
        problem, names, true = model.config.problem_type, model.config.labels, examples.slots.targets
        if problem == REGRESSION:
            return [tuple(", ".join(f"{value:.3g}" for value in row) for row in (true[i], outputs[i])) for i in numbers]  # type: ignore[misc]
        if problem == SINGLE_LABEL:
            return [(names[int(true[i])], names[int(outputs[i].argmax())]) for i in numbers]
        chosen = [[", ".join(names[k] for k in np.flatnonzero(row)) or "none" for row in (true[i], outputs[i] > 0)] for i in numbers]
        return [(one, other) for one, other in chosen]
