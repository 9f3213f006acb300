"""Training rows without labels: hidden ones of the training set, or a source of their own; in each step, a batch of them beside the other.

What such a row is as tokens, its task says (`Task.unlabelled`). Its slots have the hidden label as their target where there is one, for
figures alone, and `UNKNOWN` where there is none.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxft.config import DataConfig, TrainConfig
from jaxft.data.batches import Batch, Batches
from jaxft.data.examples import Labelled, Slots
from jaxft.data.rows import Rows
from jaxft.errors import UserError

UNLABELLED = "unlabelled"  # the name of the rows, of their examples, and of their batch in a step's
NUMBERS = "numbers"  # which of all slots a batch's are, (..., slots) int32
L = TypeVar("L", bound=Labelled)
UNKNOWN = -1  # the target of a slot whose label nobody knows


def check(data: DataConfig, train: TrainConfig, objective: str, wanted: bool) -> None:
    """Raises `UserError` for rows without labels that don't go with what the objective `wanted`.

    Args:
      data: which rows.
      train: the size of their batch.
      objective: its name, for messages; empty where the run has none.
      wanted: whether it learns from such rows.
    """
    share = data.labelled_fraction
    if not 0.0 < share <= 1.0:
        raise UserError(f"config.data.labelled_fraction is a share of the training rows, above 0 and up to 1, not {share}.")
    if data.unlabelled and share < 1.0:
        raise UserError(
            "config.data.unlabelled gives rows without labels, and config.data.labelled_fraction hides labels of the training rows. "
            "Leave one of them out."
        )
    if train.unlabelled_batch_size < 0:
        raise UserError(f"train.unlabelled_batch_size is 0 or more, not {train.unlabelled_batch_size}.")
    if wanted and not data.unlabelled and share == 1.0:
        raise UserError(
            f"{objective} learns from rows without labels, and there are none. Give some by config.data.unlabelled, or hide a share of the "
            "training labels: config.data.labelled_fraction=0.1 keeps a tenth of them."
        )
    if wanted:
        return
    for field, given in {"data.unlabelled": data.unlabelled, "train.unlabelled_batch_size": train.unlabelled_batch_size}.items():
        if given:
            without = f"{objective} learns from labelled rows alone" if objective else "there is no objective that learns from such rows"
            raise UserError(f"config.{field} has no effect: {without}. Set another config.objective, or leave this out.")


def hide(rows: Rows, share: float, seed: int, labels: Sequence[Collection[Any]] | None) -> tuple[Rows, Rows]:
    """Returns the training rows whose labels are kept, and those whose labels are hidden, each in their order.

    Args:
      rows: all of them.
      share: of the rows, those that keep their label.
      seed: of the draw.
      labels: of each row, where rows have labels: every label then keeps its share of the rows, and at least one.

    Raises:
      UserError: fewer rows to keep than there are labels, or none to hide.
    """
    count = max(round(share * len(rows)), 1)
    if count == len(rows):
        raise UserError(
            f"config.data.labelled_fraction={share} of {len(rows)} rows hides no label: all {count} keep theirs. Lower it, or leave it out."
        )
    order = np.random.default_rng((seed, *b"labelled")).permutation(len(rows))
    kept = order[:count] if labels is None else _kept(order, count, labels)
    known = np.zeros(len(rows), bool)
    known[kept] = True
    if labels is not None and (without := _names(labels) - _names([labels[i] for i in kept])):
        raise UserError(
            f"{rows.name}: config.data.labelled_fraction={share} keeps {count} of {len(rows)} rows, none of them with the label "
            f"'{min(map(str, without))}': there are {len(_names(labels))} labels. Raise it, so that each has a row."
        )
    return rows.select(np.flatnonzero(known)), rows.select(np.flatnonzero(~known))


def _names(labels: Sequence[Collection[Any]]) -> set[Any]:
    return {label for own in labels for label in own}


def _kept(order: np.ndarray, count: int, labels: Sequence[Collection[Any]]) -> np.ndarray:
    """The rows, in this order, that keep their label."""
    if all(len(own) == 1 for own in labels):
        return _stratified(order, count, np.unique(np.asarray([str(label) for own in labels for label in own]), return_inverse=True)[1])
    first: dict[Any, int] = {}  # of each label the first row
    for i in order.tolist():
        for label in labels[i]:
            first.setdefault(label, i)
    return np.asarray(list(dict.fromkeys([*first.values(), *order.tolist()]))[:count])


def _stratified(order: np.ndarray, count: int, classes: np.ndarray) -> np.ndarray:
    """The first rows of each class, in this order: its share of `count`, rounded, and at least one."""
    quotas = np.bincount(classes) * count / len(classes)
    taken = np.maximum(np.floor(quotas), 1)
    while taken.sum() < count:
        taken[np.argmax(quotas - taken)] += 1
    while taken.sum() > count and taken.max() > 1:
        taken[np.argmax(np.where(taken > 1, taken - quotas, -np.inf))] -= 1
    return np.concatenate([order[classes[order] == one][: int(taken[one])] for one in range(len(quotas))])[:count]


class UnlabelledBatches(Batches):
    """The batches of rows without labels: a stream of its own, whose state is the step too."""

    def batch(self, step: int) -> Batch:
        """Returns the batch of one step, as `Batches.batch`, and `numbers`, (A, B, S) int32: which of all slots these are."""
        found = super().batch(step)
        numbers = np.full(found["scored"].shape, len(self.layout.examples.slots.reads), np.int32)  # of fill: behind the last one
        flat = numbers.reshape(-1, found["scored"].shape[-1])
        for b, row in enumerate(self._rows_of(step)):
            slots = self.layout.slots_of(row)
            flat[b, : len(slots)] = slots
        return {**found, NUMBERS: numbers}


def step_batch(batches: Batches, unlabelled: Batches | None, step: int) -> Mapping[str, Any]:
    """Returns a step's batch, that of the rows without labels in it under `UNLABELLED`."""
    found = batches.batch(step)
    return found if unlabelled is None else {**found, UNLABELLED: unlabelled.batch(step)}


def real_tokens(batches: Batches, unlabelled: Batches | None, step: int) -> int:
    """Returns the tokens of a step's examples, as `Batches.real_tokens`, of both kinds."""
    return batches.real_tokens(step) + (0 if unlabelled is None else unlabelled.real_tokens(step))


def with_targets(slots: Slots, targets: np.ndarray | int) -> Slots:
    """Returns the slots with other targets, (slots,) int32 or one for all."""
    return dataclasses.replace(slots, targets=np.broadcast_to(np.asarray(targets, np.int32), slots.targets.shape).copy())


def with_column(rows: Rows, column: str, values: Sequence[Any]) -> Rows:
    """Returns the rows with these values in a column, in the place of its own where it has some."""
    dataset = rows.dataset.remove_columns(column) if column in rows.dataset.column_names else rows.dataset
    return dataclasses.replace(rows, dataset=dataset.add_column(column, list(values)))


def without_labels(examples: L) -> L:
    """Returns the examples with targets that nobody knows."""
    return dataclasses.replace(examples, labelled=with_targets(examples.slots, UNKNOWN))


def without_answers(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], free: int, max_length: int, places: Sequence[str]
) -> Labelled:
    """Returns a causal model's rows without answers.

    Args:
      prompts: (length,) int32 tokens each.
      answers: (length,) int32 tokens of each hidden answer, none where it isn't known.
      free: tokens left free behind each prompt, for an answer, which the slots are; 0: a slot for each token that another stands before.
      max_length: tokens a row has at most; a text is cut to it, a prompt that leaves too few free is refused.
      places: where each stands, for messages.
    """
    tokens, reads, targets, cut = [], [], [], []
    for prompt, answer, place in zip(prompts, answers, places, strict=True):
        if free and len(prompt) + free > max_length:
            raise UserError(
                f"{place}: its prompt has {len(prompt)} tokens: no {free} are left for an answer in config.data.max_length={max_length}. "
                "Raise that, lower config.objective.answer_tokens, or remove the row."
            )
        kept = prompt[:max_length]
        if len(kept) < 2:
            raise UserError(f"{place}: it has {len(kept)} tokens; a row without labels needs 2 or more. Remove it.")
        cut.append(len(prompt) - len(kept))
        tokens.append(np.concatenate([kept, np.full(free, kept[-1])]).astype(np.int32))  # what stands there is written in each step
        reads.append(len(kept) - 1 + np.arange(free) if free else np.arange(len(kept) - 1))
        targets.append(np.concatenate([answer, np.full(free, UNKNOWN)])[:free] if free else kept[1:])
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    places_of = np.cumsum([0, *map(len, reads)], dtype=np.int64)
    slots = Slots(
        places_of, np.concatenate(reads).astype(np.int32), np.concatenate(targets).astype(np.int32), np.ones(places_of[-1], np.float32)
    )
    return Labelled(np.concatenate(tokens), offsets, np.asarray(cut, np.int32), slots, np.arange(len(tokens)))
