"""One answer for each word of a text: a tag, which with others marks entities, or stands for itself as a part of speech."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.config import DataConfig
from jaxft.data.encode import Encoded, joined
from jaxft.data.examples import Examples, Slots, Words
from jaxft.data.labels import class_of, names_of
from jaxft.data.rows import Rows
from jaxft.data.tags import (
    AUTO,
    OUTSIDE,
    PLAIN,
    SCHEMES,
    Tagged,
    check_names,
    check_scheme,
    entities_of,
    feature_names,
    mended,
    scheme_like,
    scheme_of,
    tag_names,
    tagged_rows,
)
from jaxft.data.unlabelled import with_column, without_labels
from jaxft.data.words import fit_to_words, pieces_of, windows_of
from jaxft.errors import UserError, unknown
from jaxft.models.heads import FIRST
from jaxft.tasks.base import Batch, Of, Report, Task
from jaxft.tasks.class_weights import check_named, check_weights, log_shares, weighted
from jaxft.tasks.head import Sums, check_label_smoothing, cross_entropy

_SHOWN = 12  # plain tags of a text


@dataclasses.dataclass(frozen=True)
class TokenClassification(Task):
    """Cross-entropy of each word's tag, read at its first sub-word.

    Rows have a list of words and a list of their tags: `config.data.tokens`, `tags`. A text that is longer than `config.data.max_length` is
    read in windows that overlap; every word is scored once, where it has most context.

    >>> TokenClassification(stride=32).stride
    32
    """

    labels: tuple[str, ...] = ()  # names of the tags by their number; empty: those of the training rows
    scheme: str = AUTO  # how tags mark entities: IOB2, IOBES, BILOU; plain: not at all; auto: by their names
    mend_tags: bool = False  # tags that don't follow the scheme, as I-X after O, are read as the entities they mark; else they are refused
    stride: int = 64  # sub-words that neighbouring windows of a long text share, at least
    class_weights: tuple[tuple[str, float], ...] = ()  # what words of a tag count in the training loss; 1 where it isn't named
    balanced: bool = False  # all tags count alike in the training loss: their weights are the inverse of their frequency
    label_smoothing: float = 0.0  # share of each target spread over the tags

    model_task: ClassVar[str] = "token_classification"
    data_fields: ClassVar[tuple[str, ...]] = ("tokens", "tags")

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        check_weights(self.class_weights, self.balanced)
        if self.scheme not in SCHEMES:
            raise unknown("task.scheme", self.scheme, SCHEMES)
        if self.stride < 0:
            raise UserError(f"task.stride is a number of sub-words, 0 or more, not {self.stride}.")

    # ------------------------------------------------------------ rows

    def fit_tokenizer(self, tokenizer: Any) -> Any:
        """Returns the tokenizer for single words."""
        return fit_to_words(tokenizer)

    def model_options(self, rows: Rows, data: DataConfig) -> dict[str, Any]:
        """Returns the names of the tags, for `load_pretrained`."""
        found = tagged_rows(rows, data)
        given = self.labels or feature_names(rows, data)
        labels = given or tag_names(found)
        scheme = scheme_of(labels, self.scheme)
        if self.mend_tags and scheme == PLAIN:
            raise UserError(f"task.mend_tags is for tags that mark entities; those of {rows.name} are plain. Leave it out.")
        if self.mend_tags and not given:
            labels = tag_names([Tagged(row.words, mended(list(map(str, row.tags)), scheme)) for row in found])
        if len(labels) < 2:
            raise UserError(f"{rows.name}: column '{data.tags}' has one tag only, '{labels[0]}': there is nothing to tell apart.")
        check_named(self.class_weights, labels)
        return {"labels": labels}

    def examples(self, rows: Rows, tokenizer: Any, data: DataConfig, model: nn.Module) -> Words:
        """Returns a set's rows as tokens, long ones in windows, a slot for each word: its first sub-word."""
        found, places = tagged_rows(rows, data), [rows.place(i) for i in range(len(rows))]
        classes = self._classes(found, names_of(feature_names(rows, data), self.labels), model, places)
        encoded: list[Encoded] = []
        numbers, counts, reads, belongs = [], [0], [], []
        for i, pieces in enumerate(pieces_of([row.words for row in found], tokenizer, places)):
            for window in windows_of(pieces, data.max_length, self.stride):
                encoded.append(Encoded(window.tokens, window.token_types, 0))
                numbers.append(i)
                counts.append(len(window.reads))
                reads.append(window.reads)
                belongs.append(window.numbers)
        tokens, offsets, cut, beside = joined(encoded, takes_types=model.pooling == FIRST)
        weights = np.ones(len(classes), np.float32)
        slots = Slots(np.cumsum(counts, dtype=np.int64), np.concatenate(reads).astype(np.int32), classes, weights)
        words = tuple(word for row in found for word in row.words)
        return Words(tokens, offsets, cut, slots, np.asarray(numbers), beside, words, np.concatenate(belongs).astype(np.int32))

    def row_labels(self, rows: Rows, data: DataConfig) -> list[set[str]]:
        """Returns the distinct tags of each row."""
        return [set(map(str, row.tags)) for row in tagged_rows(rows, data)]

    def label_columns(self, data: DataConfig) -> tuple[str, ...]:
        """Returns the column of the labels."""
        return (data.tags,)

    def unlabelled(self, rows: Rows, tokenizer: Any, data: DataConfig, model: Any, known: bool, answer_tokens: int = 0) -> Words:
        """Returns rows without tags as tokens, a slot for each word; their targets are the hidden tags, or unknown."""
        if known:
            return self.examples(rows, tokenizer, data, model)
        placeholder = OUTSIDE if OUTSIDE in model.config.labels else model.config.labels[0]
        words = rows.dataset[data.tokens] if data.tokens in rows.dataset.column_names else [None] * len(rows)
        tags = [[placeholder] * (len(own) if isinstance(own, list) else 0) for own in words]
        return without_labels(self.examples(with_column(rows, data.tags, tags), tokenizer, data, model))

    def _classes(self, found: Sequence[Tagged], own: Sequence[str], model: Any, places: Sequence[str]) -> np.ndarray:
        names = model.config.labels
        scheme = scheme_of(names, self.scheme)
        rows = zip(found, places, strict=True)
        return np.asarray([one for row, place in rows for one in self._row_classes(row, names, own, scheme, place)], np.int32)

    def _row_classes(self, row: Tagged, names: Sequence[str], own: Sequence[str], scheme: str, place: str) -> list[int]:
        tags = row.tags
        if self.mend_tags:
            tags = mended([names[class_of(tag, names, own, place)] if own else str(tag) for tag in tags], scheme)
        found = [class_of(tag, names, own, f"{place}: tag {number}") for number, tag in enumerate(tags, start=1)]
        if scheme != PLAIN:
            check_scheme([names[one] for one in found], scheme, place)
        return found

    def faults(self, rows: Rows, tokenizer: Any, data: DataConfig, options: Mapping[str, Any]) -> dict[int, str]:
        """Returns the rows with a tag that the training rows lack, or with tags that don't follow their scheme."""
        found, own = tagged_rows(rows, data), names_of(feature_names(rows, data), self.labels)
        names = options.get("labels") or self.labels or own or tag_names(found)
        scheme = scheme_like(names) if self.scheme == AUTO else self.scheme

        def read(i: int) -> None:
            check_names([str(tag) for tag in found[i].tags if not own], scheme)
            self._row_classes(found[i], names, own, scheme, rows.place(i))

        return rows.faults(read)

    def for_training(self, model: nn.Module, examples: Examples) -> Examples:
        """Returns the examples with the weights of their tags."""
        assert isinstance(examples, Words)
        return weighted(examples, model.config.labels, self.class_weights, self.balanced)

    # ------------------------------------------------------------ loss

    def loss(self, model: nn.Module, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        """Returns the sums over words."""
        return cross_entropy(logits, targets, weights, self.label_smoothing, 0.0)

    # ------------------------------------------------------------ figures

    def measure(self, model: nn.Module, params: Any, batch: Batch) -> tuple[Sums, Any]:
        """Returns the sums over a batch and the likeliest tags, (batch, slots) int32."""
        logits = self.logits(model, params, batch)
        sums = self.loss(model, logits, batch["targets"].reshape(-1), batch["weights"].reshape(-1))
        return sums, jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(batch["scored"].shape)

    def metrics(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of what is measured on validation."""
        return ("loss", "accuracy", "macro_f1") if self._scheme(model) == PLAIN else ("loss", "precision", "recall", "f1", "accuracy")

    def _scheme(self, model: Any) -> str:
        return scheme_of(model.config.labels, self.scheme)

    def scores(self, model: nn.Module, examples: Examples, sums: Sums, outputs: np.ndarray | None) -> dict[str, float]:
        """Returns the mean loss and the share of words with the right tag; and of whole entities by seqeval precision, recall and F1, or of
        plain tags by scikit-learn the macro F1.
        """
        assert outputs is not None
        return {"loss": float(sums.nll / sums.weight)} | self._figures(model, examples, outputs)

    def _figures(self, model: Any, examples: Examples, outputs: np.ndarray) -> dict[str, float]:
        from jaxft.tasks.tag_figures import entity_figures, plain_figures  # scikit-learn: seconds that a mistyped flag needn't wait for

        if self._scheme(model) == PLAIN:
            return plain_figures(examples.slots.targets, outputs)
        true, made = (self._texts(model, examples, classes) for classes in (examples.slots.targets, outputs))
        return entity_figures(true, made, self._scheme(model))

    def _texts(self, model: Any, examples: Examples, classes: np.ndarray) -> list[list[str]]:
        """The tags of each row."""
        assert isinstance(examples, Words)
        names = model.config.labels
        return [[names[one] for one in classes[part]] for part in examples.texts]

    def majority(self, model: nn.Module, training: Examples, examples: Examples) -> dict[str, float]:
        """Returns the metrics of giving every word the tag that most words have, with the shares of the tags in training."""
        constant = log_shares(training.slots.targets, len(model.config.labels))
        true = examples.slots.targets
        outputs = np.full(true.shape, constant.argmax(), np.int32)
        return {"loss": float(-constant[true].mean())} | self._figures(model, examples, outputs)

    def word_baseline(self, model: nn.Module, data: DataConfig, seed: int, training: Of, test: Of) -> dict[str, dict[str, float]]:
        """Returns the metrics of giving each word the tag that it most often has in training, as "commonest".

        Words are compared in lower case; of tags as frequent the first is taken; words that training lacks get the most frequent of all.
        The loss takes the shares of a word's tags in training, to which one word with the shares of all tags is added.
        """
        known, measured = training[1], test[1]
        assert isinstance(known, Words)
        assert isinstance(measured, Words)
        every = np.exp(log_shares(known.slots.targets, len(model.config.labels)))
        counts: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(len(every)))
        for word, one in zip(known.words, known.slots.targets, strict=True):
            counts[word.lower()][one] += 1
        own, true = np.stack([counts[word.lower()] for word in measured.words]), measured.slots.targets
        shares = (own + every) / (own.sum(axis=1, keepdims=True) + 1)
        outputs = np.where(own.any(axis=1), own.argmax(axis=1), every.argmax()).astype(np.int32)
        loss = -np.log(shares[np.arange(len(true)), true]).mean()
        return {"commonest": {"loss": float(loss)} | self._figures(model, measured, outputs)}

    def report(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None) -> Report:
        """Returns precision, recall and F1 of each type of entity, or of each plain tag."""
        assert outputs is not None
        from jaxft.tasks.tag_figures import entity_report, plain_report  # as above

        if self._scheme(model) == PLAIN:
            return plain_report(examples.slots.targets, outputs, model.config.labels)
        true, made = (self._texts(model, examples, classes) for classes in (examples.slots.targets, outputs))
        return entity_report(true, made, self._scheme(model))

    def shown(self, model: nn.Module, examples: Examples, outputs: np.ndarray | None, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Returns the true and the predicted entities of some examples, or the first tags of the plain."""
        assert isinstance(examples, Words)
        assert outputs is not None
        parts = [examples.slots.part(i) for i in numbers]
        both = (examples.slots.targets, outputs)
        return [tuple(self._shown(model, examples.words[part], classes[part]) for classes in both) for part in parts]  # type: ignore[misc]

    def _shown(self, model: Any, words: Sequence[str], classes: np.ndarray) -> str:
        tags, scheme = [model.config.labels[one] for one in classes], self._scheme(model)
        if scheme == PLAIN:
            first = " ".join(f"{word}/{tag}" for word, tag in zip(words[:_SHOWN], tags, strict=False))
            return f"{first} ..." if len(words) > _SHOWN else first
        found = [f"{kind} {' '.join(words[first : last + 1])}".strip() for kind, first, last in entities_of(tags, scheme)]
        return "; ".join(found) or "none"
