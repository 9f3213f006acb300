"""A run's rows, from their sources to the batches that it trains on."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxft import console
from jaxft.config import DataConfig, Experiment
from jaxft.data.batches import NO_ROOM, Batches, Room
from jaxft.data.examples import Examples
from jaxft.data.folds import load_sets
from jaxft.data.sources import SPLITS, Rows
from jaxft.data.sources import load_rows as load_source
from jaxft.data.texts import check_pairs
from jaxft.data.tokenize import COLUMNS, describe
from jaxft.data.unlabelled import UNLABELLED, UnlabelledBatches, hide
from jaxft.errors import UserError
from jaxft.inspect.look import look_quickly
from jaxft.models.heads import LAST, SEQUENCE_CLASSIFICATION, is_causal
from jaxft.models.node import prompt_tokens, virtual_tokens
from jaxft.objectives.base import Supervised, objective_of
from jaxft.tasks.head import Sums
from jaxft.train.programs import draws


def load_rows(experiment: Experiment, wanted: Collection[str] = SPLITS) -> dict[str, Rows]:
    """Returns the rows of those of "train", "validation" and "test" that are `wanted`, with a fold those of that one.

    Of the training rows those that keep their label; where the objective learns from rows without labels, these as "unlabelled" too.
    """
    found = load_sets(experiment, wanted)
    return found | _without_labels(experiment, found["train"]) if "train" in found else found


def _without_labels(experiment: Experiment, train: Rows) -> dict[str, Rows]:
    """The training rows that keep their label, and the rows without labels where the objective takes some."""
    data, seed, found = experiment.data, experiment.train.seed, {}
    if data.labelled_fraction < 1.0:
        train, found[UNLABELLED] = hide(train, data.labelled_fraction, seed, experiment.task.row_labels(train, data))
    elif data.unlabelled:
        rows = load_source(data.unlabelled, "train")
        found[UNLABELLED] = rows.select(range(min(data.limit, len(rows)))) if data.limit else rows
        if given := [name for name in experiment.task.label_columns(data) if name in rows.dataset.column_names]:
            console.say(f"{rows.name}: its column '{given[0]}' is ignored: rows of config.data.unlabelled have no labels here.\n")
    return {"train": train} | (found if objective_of(experiment).unlabelled else {})


def load_unlabelled(experiment: Experiment, model: Any, tokenizer: Any, shapes: Any, rows: Mapping[str, Rows]) -> Batches | None:
    """Returns the batches of the rows without labels, where there are some; prints their lengths."""
    train, data = experiment.train, experiment.data
    if UNLABELLED not in rows:
        return None
    room = objective_of(experiment).answer_room
    found = experiment.task.unlabelled(rows[UNLABELLED], tokenizer, data, model, data.labelled_fraction < 1.0, room)
    console.table("Data without labels", COLUMNS, [describe(found, UNLABELLED)])
    check_tokens({UNLABELLED: found}, experiment, model, virtual_tokens(shapes))
    size, pad = train.unlabelled_batch_size or train.batch_size, pad_token(tokenizer)
    return UnlabelledBatches(found, data, size, train.accumulation, train.seed, False, pad, stream=UNLABELLED)


def load_examples(experiment: Experiment, rows: dict[str, Rows], tokenizer: Any, model: nn.Module) -> dict[str, Examples]:
    """Returns the rows of each set as tokens; prints their lengths, and what is wrong with them."""
    task = experiment.task
    if "text_pair" in task.data_fields:
        check_pairs(rows, experiment.data)
    examples = {name: task.examples(found, tokenizer, experiment.data, model) for name, found in rows.items()}
    console.table("Data", COLUMNS, [describe(found, name) for name, found in examples.items()])
    look_quickly(rows, examples, experiment)
    for warning in task.warnings(tokenizer, examples["train"]):
        console.say(f"Warning: {warning}\n")
    return examples


def load_measured(experiment: Experiment, tokenizer: Any, model: nn.Module) -> tuple[dict[str, Rows], dict[str, Examples]]:
    """Returns the one set that a trained model is measured on, and the same, tokenized, with the texts of `eval.general`; prints lengths.

    No other set is tokenized, nor read where this one isn't cut from it.
    """
    split = experiment.eval.split
    rows = load_rows(experiment, (split,))
    check_split(split, rows)
    examples = experiment.task.examples(rows[split], tokenizer, experiment.data, model)
    console.table("Data", COLUMNS, [describe(examples, split)])
    return rows, {split: examples} | load_general(experiment, tokenizer, model)


GENERAL = "general"  # the name of the plain texts among a run's examples


def load_general(experiment: Experiment, tokenizer: Any, model: nn.Module) -> dict[str, Examples]:
    """Returns the plain texts of `eval.general` as tokens, all scored, by their name; {} where none are given; prints their lengths."""
    source = experiment.eval.general
    if not source:
        return {}
    plain = dataclasses.replace(DataConfig(), max_length=experiment.data.max_length, cache=experiment.data.cache, loss="all")
    rows = load_source(source, "train")
    if "text" not in rows.dataset.column_names:
        raise UserError(f"{rows.name}, of config.eval.general, has no column 'text', but {', '.join(rows.dataset.column_names)}.")
    found = experiment.task.examples(rows, tokenizer, plain, model)
    console.table("General text", COLUMNS, [describe(found, GENERAL)])
    return {GENERAL: found}


def check_split(name: str, sets: Collection[str]) -> None:
    """Raises `UserError` where the set that is to be measured isn't among those that there are."""
    if name not in sets:
        raise UserError(f"There is no {name} set. Give config.data.{name}, or a share of the training rows by config.data.split.")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured on."""

    rows: dict[str, Rows]
    examples: dict[str, Examples]
    batches: Batches
    steps: int
    unlabelled: Batches | None = None  # of rows without labels, beside each of the other

    @property
    def slots(self) -> int:
        """The slots of all rows without labels."""
        return 0 if self.unlabelled is None else len(self.unlabelled.layout.examples.slots.reads)


def load_training_data(experiment: Experiment, model: Any, tokenizer: Any, shapes: Any, rows: dict[str, Rows]) -> TrainingData:
    """Tokenizes the data, and cuts the training set into batches; raises `UserError` for what is wrong with it.

    Args:
      experiment: of it `data`, `train`, `eval` and the task.
      model: as it is described.
      tokenizer: of the model, as the task reads with it.
      shapes: of the whole model with the method's leaves.
      rows: of each set.
    """
    train, pad, room = experiment.train, pad_token(tokenizer), room_of(model, shapes)
    check_objective(experiment, room)
    others = load_unlabelled(experiment, model, tokenizer, shapes, rows)
    rows = {name: found for name, found in rows.items() if name != UNLABELLED}
    examples = load_examples(experiment, rows, tokenizer, model) | load_general(experiment, tokenizer, model)
    check_tokens(examples, experiment, model, virtual_tokens(shapes))
    share_prefix = model.pooling == LAST and not train.neftune_alpha  # its noise follows each example's length
    training = experiment.task.for_training(model, examples["train"])
    training = objective_of(experiment).for_training(experiment.task, model, tokenizer, training)
    classes = balanced_classes(experiment, model, examples["train"])
    batches = Batches(training, experiment.data, train.batch_size, train.accumulation, train.seed, share_prefix, pad, classes, room=room)
    steps = train.steps or max(round(train.epochs * batches.steps_per_epoch), 1)
    check_r_drop(experiment, model, shapes, batches)
    return TrainingData(rows, examples, batches, steps, others)


def balanced_classes(experiment: Experiment, model: nn.Module, training: Examples) -> np.ndarray | None:
    """Returns the class of each training example where classes are to come alike often; raises `UserError` where they have none."""
    if not experiment.data.balanced:
        return None
    found: np.ndarray | None = experiment.task.classes(model, training)
    if found is None:
        name = type(experiment.task).__name__
        raise UserError(f"config.data.balanced draws each class alike often; the examples of {name} have no single class. Leave it out.")
    return found


def check_r_drop(experiment: Experiment, model: nn.Module, shapes: Any, batches: Batches) -> None:
    """Raises `UserError` where R-Drop would compare two equal passes: where neither the model nor the method drops, nor noise is added."""
    if not experiment.train.r_drop or experiment.train.neftune_alpha:
        return
    batch = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in batches.batch(0).items()}

    def places(rngs: dict[str, jax.Array]) -> int:
        def loss(params: Any, batch: Any, rngs: dict[str, jax.Array]) -> jax.Array:
            sums: Sums = experiment.task.sums(model, params, batch, rngs)
            return sums.loss

        return draws(jax.make_jaxpr(loss)(shapes, batch, rngs).jaxpr)

    if places({"dropout": jax.random.key(0)}) == places({}):  # a task may draw something of its own, as what it hides
        raise UserError(
            "train.r_drop compares two passes with different dropout, and nothing drops here: both would be equal. Set "
            f"{', '.join(f'config.model.{kind}' for kind in model.config.dropouts)}, or a method's dropout, or leave train.r_drop out."
        )


def micro_batches(batches: Batches) -> Iterator[dict[str, np.ndarray]]:
    """Yields the micro-batches that training sees, (batch, length), from the first step on."""
    for step in itertools.count():
        batch = batches.batch(step)
        for index in range(len(batch["tokens"])):
            yield {name: array[index] for name, array in batch.items()}


def check_tokens(examples: dict[str, Examples], experiment: Experiment, model: Any, before: int = 0) -> None:
    """Raises `UserError` where a row has a token that the model has no embedding of, and where the longest, after so many virtual tokens,
    has more of them than the model has positions.
    """
    for name, found in examples.items():
        if (largest := int(found.tokens.max())) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer makes token {largest} of the {name} rows; {experiment.model.source} has embeddings of "
                f"{model.config.vocab_size} alone: its files don't belong together. Take the tokenizer that the model came with."
            )
    longest, positions = max(int(found.lengths.max()) for found in examples.values()), model.config.max_position_embeddings
    if longest + before <= positions:
        return
    after = f" after {before} virtual tokens" if before else ""
    fewer = ", or the method's virtual_tokens" if before else ""
    raise UserError(
        f"The longest row has {longest} tokens{after}; {experiment.model.source} has {positions} positions. "
        f"Lower config.data.max_length{fewer}."
    )


def check_objective(experiment: Experiment, room: Room) -> None:
    """Raises `UserError` where an objective of its own would meet virtual tokens among the text's."""
    if room.tokens and not isinstance(objective := objective_of(experiment), Supervised):
        raise UserError(
            f"{type(objective).__name__} reads rows of text alone, and an encoder's prompt stands in the rows. Leave config.objective out, "
            "or take Prefix for the method."
        )


def room_of(model: Any, shapes: Any) -> Room:
    """Returns the places that an encoder's prompt takes before each example: its virtual tokens look at the text. A causal model's stand
    once a row, for all its examples.
    """
    if is_causal(model):
        return NO_ROOM
    return Room(prompt_tokens(shapes), read=model.task == SEQUENCE_CLASSIFICATION)


def pad_token(tokenizer: Any) -> int:
    """Returns the id that fills rows; it is never attended to and never scored."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
