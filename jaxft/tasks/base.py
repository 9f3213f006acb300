"""What a task is: how rows become examples, what a model should say at the places that its head reads, and what is measured."""

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig, EvalConfig
from jaxft.data.examples import Examples, Labelled
from jaxft.data.rows import Rows
from jaxft.errors import UserError
from jaxft.tasks.head import Sums, gather, head_sums

Batch = Mapping[str, jax.Array]
Of = tuple[Rows, Examples]  # a set, as rows and as examples
_OF_THE_HEAD = ("scored", "targets", "weights")
_FIELDS_OF_TASKS = {"system", "prompt", "completion", "template", "loss", "text", "text_pair", "label", "tokens", "tags", "cache"}
_OF_ANSWERS = ("max_new_tokens", "temperature", "top_k", "top_p")  # of config.eval
_ARGUMENTS = {"tokens": "input_ids"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def by_class(title: str, heads: tuple[str, str], names: Sequence[str], columns: Sequence[Sequence[float]]) -> Table:
    """Returns the table of precision, recall, F1 and number of each class.

    Args:
      title: of the table.
      heads: what a class and what its number is of, as ("label", "rows").
      names: of the classes.
      columns: precision, recall, F1 and number, (classes,) each.
    """
    rows = ((name, *(f"{value:.1%}" for value in values[:3]), f"{values[3]:,}") for name, *values in zip(names, *columns, strict=True))
    return Table(title, (heads[0], "precision", "recall", "F1", heads[1]), tuple(rows))


@dataclasses.dataclass(frozen=True)
class Report:
    """What is told of predictions beside the metrics."""

    tables: tuple[Table, ...] = ()
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # file name -> PNG


class Task(abc.ABC):
    """A task: a frozen dataclass of its settings, with pure functions on rows, batches and outputs."""

    model_task: ClassVar[str]  # what `load_pretrained` calls the task of the model
    generates: ClassVar[bool] = False  # whether answers are generated and compared with the true ones
    chunk: ClassVar[int] = 0  # slots whose outputs exist at one time; 0: all
    data_fields: ClassVar[tuple[str, ...]]  # of config.data, the fields of some tasks that this one reads

    def check(self, data: DataConfig) -> None:
        """Raises `UserError` for settings of the data that this task would ignore."""
        default = DataConfig()
        for name in sorted(_FIELDS_OF_TASKS - set(self.data_fields)):
            if getattr(data, name) != getattr(default, name):
                reads = ", ".join(f"config.data.{field}" for field in self.data_fields) or "columns of fixed names"
                raise UserError(f"config.data.{name} has no effect with the task {type(self).__name__}, which reads {reads}. Leave it out.")

    def check_evaluation(self, evaluation: EvalConfig) -> None:
        """Raises `UserError` for settings of generated answers where this task generates none."""
        for name in _OF_ANSWERS if not self.generates else ():
            if getattr(evaluation, name) != getattr(EvalConfig(), name):
                raise UserError(
                    f"config.eval.{name} has no effect with the task {type(self).__name__}, which generates no text. Leave it out."
                )

    def tokenized(self, tokenizer: Any) -> "Task":
        """Returns the task with what it needs of the tokenizer; raises `UserError` where that hasn't it."""
        return self

    def model_options(self, rows: Rows, data: DataConfig) -> dict[str, Any]:
        """Returns what `load_pretrained` has to know of the training rows: labels, problem_type.

        Args:
          rows: the training set.
          data: which columns are read.

        Raises:
          UserError: rows that aren't of this task.
        """
        return {}

    @abc.abstractmethod
    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Examples:
        """Returns a set's rows as tokens and targets.

        Args:
          rows: the set.
          tokenizer: a fast tokenizer of transformers.
          data: which columns are read, and how long an example may be.
          model: of it the configuration: the labels in their order.

        Raises:
          UserError: a row that isn't of this task, by its place.
        """

    def faults(self, rows: Rows, tokenizer: Any, data: DataConfig, options: Mapping[str, Any]) -> dict[int, str]:
        """Returns which rows `examples` would refuse, by their number, and why: for a look at the data, without a model.

        Args:
          rows: of a set, those alone that can be read.
          tokenizer: a fast tokenizer of transformers.
          data: which columns are read, and how long an example may be.
          options: of `model_options`; empty where the training rows give none.
        """
        return {}

    def for_training(self, model: nn.Module, examples: Examples) -> Examples:
        """Returns the training set as it is trained on: with what only training does, as weights of classes."""
        return examples

    def for_evaluation(self, model: nn.Module, examples: Examples, chosen: np.ndarray) -> Examples:
        """Returns a set as it is measured, of which only the examples of the numbers `chosen` are: with what only measuring does."""
        return examples

    def classes(self, model: nn.Module, examples: Examples) -> np.ndarray | None:
        """Returns the class of each example, (n,) int, where each has one: what sampling can balance."""
        return None

    def row_classes(self, rows: Rows, data: DataConfig) -> np.ndarray | None:
        """Returns the class of each row, (n,) int, where each has one: what folds hold a share of each."""
        return None

    def row_groups(self, rows: Rows) -> np.ndarray | None:
        """Returns which rows belong together, (n,) int, where some do: no set and no fold has a part of them."""
        return None

    def row_labels(self, rows: Rows, data: DataConfig) -> Sequence[Collection[Any]] | None:
        """Returns the distinct labels of each row, where rows have labels: what a share of the rows holds a share of, or one at least."""
        return None

    def label_columns(self, data: DataConfig) -> tuple[str, ...]:
        """Returns the columns that hold a row's labels."""
        return ()

    def unlabelled(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module, known: bool, answer_tokens: int = 0) -> Labelled:
        """Returns rows without labels as tokens, with the slots that their labels would have.

        Args:
          rows: the set.
          tokenizer: a fast tokenizer of transformers.
          data: which columns are read, and how long an example may be.
          model: of it the configuration.
          known: whether the rows have labels, hidden ones, that become the slots' targets; else they are UNKNOWN (`data.unlabelled`).
          answer_tokens: of a task with answers: tokens left free behind each prompt, a slot each; 0: every token of the text has one.

        Raises:
          UserError: a task that can't do without labels; a row, by its place.
        """
        raise UserError(f"The task {type(self).__name__} has no rows without labels. Leave config.objective out.")

    def warnings(self, tokenizer: Any, training: Examples) -> list[str]:
        """Returns what a user should know of the training examples before the money is spent."""
        return []

    @abc.abstractmethod
    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over slots.

        Args:
          model: of it the configuration.
          logits: (slots, outputs).
          targets: (slots,) int32, or (slots, outputs) float32.
          weights: (slots,) float32, 0 for fill.
        """

    def fit_tokenizer(self, tokenizer: Any) -> Any:
        """Returns the tokenizer as this task reads with it, and as it is written beside the model; it may be changed in place."""
        return tokenizer

    def outputs(self, model: nn.Module, logits: jax.Array, batch: Batch) -> jax.Array:
        """Returns what `loss` and `divergence` are given of the head's outputs in the batch's slots: for a task whose slots are compared
        with each other (and whose `chunk` is 0) another form of them.
        """
        return logits

    def hidden(self, model: nn.Module, params: Any, batch: Batch, rngs: Mapping[str, jax.Array], **options: Any) -> jax.Array:
        """Returns what the head reads in the batch's slots, (batch * slots, features)."""
        given: dict[str, Any] = {_ARGUMENTS.get(name, name): value for name, value in batch.items() if name not in _OF_THE_HEAD}
        found: Any = model.apply({"params": params}, **given, rngs=dict(rngs), method="features", **options)
        return gather(found, batch["scored"])

    def logits(self, model: nn.Module, params: Any, batch: Batch) -> jax.Array:
        """Returns the head's outputs in the batch's slots without dropout or noise, (batch * slots, outputs)."""
        found: Any = model.apply({"params": params}, self.hidden(model, params, batch, {}), method="logits")
        return found

    def divergence(self, model: nn.Module, one: jax.Array, other: jax.Array) -> jax.Array:
        """Returns how far apart two outputs for the same slots are, (slots,) float32: the mean of both Kullback-Leibler divergences."""
        first, second = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (one, other))
        return jnp.sum((jnp.exp(first) - jnp.exp(second)) * (first - second), axis=-1) / 2

    def sums(self, model: nn.Module, params: Any, batch: Batch, rngs: Mapping[str, jax.Array], r_drop: float = 0.0, **options: Any) -> Sums:
        """Returns the loss and its companions, summed over a batch.

        Args:
          model: one with methods `features` and `logits`.
          params: its parameters.
          batch: tokens, segment_ids, positions, and what else `features` takes of each token, (batch, length) int32; scored (batch, slots)
            int32, where the head reads; targets (batch, slots) int32 or (batch, slots, outputs) float32; weights (batch, slots) float32.
          rngs: keys of `dropout` and `noise`, where they are on, and in training of `mask`: of what a task hides.
          r_drop: where above 0, the batch is passed twice, with different dropout; the loss is the mean of both, plus half of this times
            their divergence (Liang et al. 2021, arXiv:2106.14448; half of the paper's sum).
          **options: of `model.features`.
        """
        targets, weights = batch["targets"].reshape(-1, *batch["targets"].shape[2:]), batch["weights"].reshape(-1)
        passes = [{name: jax.random.fold_in(key, index) for name, key in rngs.items()} for index in range(2 if r_drop else 1)]
        hidden = [self.hidden(model, params, batch, own, **options) for own in passes]

        def loss(logits: Sequence[jax.Array], targets: jax.Array, weights: jax.Array) -> Sums:
            logits = [self.outputs(model, one, batch) for one in logits]
            found = [self.loss(model, one, targets, weights) for one in logits]
            if not r_drop:
                return found[0]
            mean = jax.tree.map(lambda one, other: (one + other) / 2, *found)
            return dataclasses.replace(mean, loss=mean.loss + r_drop / 2 * jnp.sum(self.divergence(model, *logits) * weights))

        return head_sums(model, params, hidden, targets, weights, loss, self.chunk, rngs)

    def measure(self, model: nn.Module, params: Any, batch: Batch) -> tuple[Sums, Any]:
        """Returns the sums over a batch without dropout or noise, and the outputs that `scores` needs, (batch, slots, ...), or None."""
        return self.sums(model, params, batch, {}), None

    @abc.abstractmethod
    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names that `scores` gives: what `train.best_metric` may be."""

    @abc.abstractmethod
    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns the metrics of a set.

        Args:
          model: of it the configuration.
          examples: the set.
          sums: over the set, of floats.
          outputs: of `measure`, for each of `examples.slots`, in their order.
        """

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns the metrics of what knows the training targets and no text; {} where that makes no sense."""
        return {}

    def word_baseline(
        self, model: nn.Module, data: DataConfig, seed: int, training: tuple[Rows, Examples], test: tuple[Rows, Examples]
    ) -> dict[str, dict[str, float]]:
        """Returns the metrics of a simple model of words, which takes a second, by its name; {} where that makes no sense.

        Args:
          model: of it the configuration.
          data: which columns are read.
          seed: of what is drawn.
          training: the training set.
          test: the set that is measured.
        """
        return {}

    def report(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None) -> Report:
        """Returns tables and pictures of a set's predictions."""
        return Report()

    def shown(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Returns the true and the predicted answer of some examples, as people read them."""
        return []
