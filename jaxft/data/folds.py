"""Cross-validation: the training rows in parts of one size, each held out once (Stone 1974; stratified as in Kohavi 1995)."""

from collections.abc import Collection

import numpy as np

from jaxft.config import DataConfig, Experiment
from jaxft.data.sources import SPLITS, Rows, load_splits
from jaxft.errors import UserError

ALL = -1  # of `DataConfig.fold`: each in its turn


def check(config: DataConfig) -> None:
    """Raises `UserError` for folds that make no sense."""
    folds, fold = config.folds, config.fold
    if not folds:
        if fold != ALL:
            raise UserError(f"config.data.fold is {fold}, but there are no folds: set config.data.folds too, or leave it out.")
        return
    if folds < 2:
        raise UserError(f"config.data.folds is {folds}: one part is held out and the others train, so give 2 or more, or 0 for none.")
    if fold != ALL and not 0 <= fold < folds:
        raise UserError(f"config.data.fold is {fold}: {folds} folds are numbered 0 to {folds - 1}, and -1 is each in its turn.")
    if config.validation:
        raise UserError(
            "config.data.folds holds out parts of the training rows, and config.data.validation gives a set to hold out. Leave one of them "
            "out (--config.data.validation=)."
        )


def load_sets(experiment: Experiment, wanted: Collection[str] = SPLITS) -> dict[str, Rows]:
    """Returns the rows of those of "train", "validation" and "test" that are `wanted`, with a fold those of that one."""
    data, seed, task = experiment.data, experiment.train.seed, experiment.task
    if not data.folds or data.fold == ALL:
        return load_splits(data, seed, wanted, task.row_groups)
    rows = load_splits(data, seed, {"train" if name == "validation" else name for name in wanted}, task.row_groups)
    if "train" in rows:
        classes, groups = task.row_classes(rows["train"], data), task.row_groups(rows["train"])
        rows |= cut_fold(rows["train"], data, seed, classes, groups)
    return {name: rows[name] for name in SPLITS if name in rows and name in wanted}


def cut_fold(train: Rows, config: DataConfig, seed: int, classes: np.ndarray | None, groups: np.ndarray | None = None) -> dict[str, Rows]:
    """Returns the part `config.fold` of the rows as "validation", and the others as "train".

    Args:
        train: all of them.
        config: of it `folds` and `fold`.
        seed: of the parts.
        classes: of each row, (n,) int, where each has one: every part then holds its share of each class.
        groups: of each row, (n,) int, where some belong together: a part then holds all rows of a group, or none.

    Raises:
        UserError: fewer rows, or groups, than folds; or the only row of a class.
    """
    if len(train) < config.folds:
        raise UserError(f"{train.name} has {len(train)} rows to train on, too few for {config.folds} folds (config.data.folds).")
    if groups is not None and (several := len(np.unique(groups))) < config.folds:
        raise UserError(
            f"{train.name} has {several} groups of rows that belong together, as questions on one context do, too few for {config.folds} "
            "folds (config.data.folds)."
        )
    if classes is not None:
        _, first, counts = np.unique(classes, return_index=True, return_counts=True)
        if len(alone := first[counts == 1]):
            raise UserError(
                f"{train.place(int(alone[0]))}: its label stands in no other row, so one of the folds would train without it. Take the row "
                "out, or add another."
            )
    every = folds_of(len(train), config.folds, seed, classes) if groups is None else folds_of_groups(groups, config.folds, seed)
    held = every == config.fold
    return {"train": train.select(np.flatnonzero(~held)), "validation": train.select(np.flatnonzero(held))}


def folds_of(count: int, folds: int, seed: int, classes: np.ndarray | None = None) -> np.ndarray:
    """Returns the fold of each row, (count,) int: sizes differ by one at most, and so do those of each class.

    >>> sorted(folds_of(5, 2, seed=0).tolist())
    [0, 0, 0, 1, 1]
    """
    order = np.random.default_rng((seed, *b"folds")).permutation(count)
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]  # dealt out class by class
    found = np.empty(count, np.int64)
    found[order] = np.arange(count) % folds
    return found


def folds_of_groups(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each row, (n,) int, the same of all rows of a group: the largest groups first, each to the smallest fold.

    >>> folds_of_groups(np.array([0, 0, 0, 1, 2, 2]), 2, seed=0).tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    True
    """
    _, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng((seed, *b"folds")).permutation(len(counts))
    found, sizes = np.empty(len(counts), np.int64), np.zeros(folds, np.int64)
    for group in order[np.argsort(-counts[order], kind="stable")]:
        found[group] = sizes.argmin()
        sizes[found[group]] += counts[group]
    return found[numbers]
