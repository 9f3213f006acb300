"""The whole look at an experiment's data, and the short one that every training begins with."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import console
from jaxft.config import DataConfig, Experiment
from jaxft.data import folds
from jaxft.data.examples import Examples
from jaxft.data.folds import load_sets
from jaxft.data.sources import Rows
from jaxft.errors import UserError
from jaxft.inspect.characters import debris
from jaxft.inspect.copies import copies, equal_texts
from jaxft.inspect.encoded import Encoded, cut_rows, encode, refused_rows
from jaxft.inspect.findings import WEIGHTS, Case, Finding, finding, raw_spot
from jaxft.inspect.labels import label_findings, suspicious_labels
from jaxft.inspect.shown import Shown, three_rows
from jaxft.inspect.texts import Refused, Texts, kind_of, read_sets

MOST_TEXTS = 100_000  # searched for near-duplicates
# Before training, where 600 rows take 0.2 s and the most a second or two: rows of each set, and texts searched for near-duplicates.
_MOST_ROWS_QUICK, _MOST_TEXTS_QUICK = 20_000, 2_000


@dataclasses.dataclass(frozen=True)
class Look:
    """What an experiment's data holds, and what is wrong with it."""

    experiment: str
    data: DataConfig
    sets: tuple[Texts, ...]  # the training set first
    encoded: tuple[Encoded, ...]  # the same sets as tokens
    findings: tuple[Finding, ...]  # the gravest first
    shown: tuple[Shown, ...]  # three rows of the training set
    sampled: str  # what wasn't searched whole, or an empty string


def look(experiment: Experiment, tokenizer: Any) -> Look:
    """Returns the whole look; of the model nothing but the tokenizer is needed.

    Raises:
        UserError: a source that can't be read, or a configuration that every row is refused with.
    """
    data, seed, task = experiment.data, experiment.train.seed, experiment.task
    folds.check(data)
    task.check(data)
    task.check_evaluation(experiment.eval)
    sets = read_sets(load_sets(experiment), data, kind_of(task.model_task))
    encoded = [encode(texts, tokenizer, data) for texts in sets]
    texts = equal_texts(sets)
    found = [
        *_refused(sets, encoded, tokenizer, experiment),
        *cut_rows(sets, [one.cut for one in encoded], data.max_length, [one.scored for one in encoded]),
        *copies(sets, texts, MOST_TEXTS, seed),
        *label_findings(sets),
        *debris(sets),
        *suspicious_labels(sets[0], seed),
    ]
    shown = three_rows(sets[0], encoded[0], tokenizer)
    return Look(experiment.name, data, tuple(sets), tuple(encoded), _sorted(found), tuple(shown), _sampled(len(texts), MOST_TEXTS))


def _refused(sets: Sequence[Texts], encoded: Sequence[Encoded], tokenizer: Any, experiment: Experiment) -> list[Finding]:
    """What training would refuse: rows, by the task's own checks of each; and the training set as a whole."""
    data, task, error = experiment.data, experiment.task, None
    try:
        options = task.model_options(_readable(sets[0]), data)
    except UserError as refusal:
        options, error = {}, refusal
    further = []
    for texts, one in zip(sets, encoded, strict=True):
        faults = task.faults(_readable(texts), tokenizer, data, options)
        further.append([*one.refused, *(Refused(texts.numbers[i], reason) for i, reason in faults.items())])
    found = refused_rows(sets, further)
    if error is None or further[0]:
        return found
    return [finding("refused_set", "error", "training refuses the training set", str(error), [Case((raw_spot(sets[0], 0),))]), *found]


def _readable(texts: Texts) -> Rows:
    return texts.rows.select(texts.numbers)


def look_quickly(rows: Mapping[str, Rows], examples: Mapping[str, Examples], experiment: Experiment) -> None:
    """Prints a line for each finding that takes no time: all but suspicious labels, near-duplicates among a draw of the texts.

    Args:
        rows: of each set, as `load_splits` gives them.
        examples: the same, tokenized.
        experiment: of it `data`, `task` and the seed.
    """
    data, seed = experiment.data, experiment.train.seed
    chosen = {name: _drawn(len(found), seed) for name, found in rows.items()}
    part = {name: found.select(chosen[name]) for name, found in rows.items()}
    sets = read_sets(part, data, kind_of(experiment.task.model_task))
    texts = equal_texts(sets)
    found = [
        *refused_rows(sets),
        *cut_rows(sets, [_cut(examples[name], len(rows[name]))[chosen[name]] for name in rows], data.max_length),
        *copies(sets, texts, _MOST_TEXTS_QUICK, seed),
        *label_findings(sets),
        *debris(sets),
    ]
    for one in _sorted(found):
        console.say(f"{one.weight.capitalize()}: {one.title} ({one.cases[0].spots[0].place}{', ...' if one.count > 1 else ''}).")
    large = [f"{_MOST_ROWS_QUICK:,} of the {len(one):,} rows of {name}" for name, one in rows.items() if len(one) > _MOST_ROWS_QUICK]
    notes = [f"Looked at so far: {' and '.join(large)}, drawn at random."] if large else []
    notes += [sampled] if (sampled := _sampled(len(texts), _MOST_TEXTS_QUICK)) else []
    notes += ["--mode=inspect shows them, and what to do about each."] if found else []
    if notes:
        console.say(f"{' '.join(notes)}\n")


def _cut(examples: Examples, count: int) -> np.ndarray:
    """The tokens cut of each of the set's rows, which may be several examples."""
    return np.bincount(examples.rows, examples.cut, count).astype(np.int64)


def _drawn(count: int, seed: int) -> np.ndarray:
    """The numbers of the rows that are looked at before training."""
    if count <= _MOST_ROWS_QUICK:
        return np.arange(count)
    return np.sort(np.random.default_rng((seed, *b"inspect")).choice(count, _MOST_ROWS_QUICK, replace=False))


def _sorted(found: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda one: WEIGHTS.index(one.weight)))


def _sampled(count: int, most: int) -> str:
    return f"Near-duplicates were searched for among {most:,} texts drawn from {count:,}." if count > most else ""


def label_counts(sets: Sequence[Texts]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns column -> value -> set -> how often it stands there, the values of the training set first, by their number there."""
    tables = {}
    for place, labels in enumerate(sets[0].labels):
        counts = {texts.name: collections.Counter(texts.labels[place].values) for texts in sets}
        values = dict.fromkeys(value for found in counts.values() for value, _ in found.most_common())
        tables[labels.name] = {value: {name: found[value] for name, found in counts.items()} for value in values}
    return tables


def length_statistics(encoded: Encoded) -> dict[str, float]:
    """Returns the lengths of a set in tokens, as trained: cut to `max_length`."""
    lengths = encoded.lengths
    return {
        "tokens": int(lengths.sum()),
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "95%": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "longest_uncut": int(encoded.whole_lengths.max()),
        "scored": encoded.scored_share,
        "cut_rows": int((encoded.cut > 0).sum()),
        "cut_tokens": int(encoded.cut.sum()),
    }
