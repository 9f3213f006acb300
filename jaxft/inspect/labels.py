"""Labels: their balance, what is rare, new, spelt in two ways or no label at all, and which look wrong."""

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxft.inspect.copies import normalized
from jaxft.inspect.findings import Case, Finding, counted, finding, spot
from jaxft.inspect.texts import Labels, Texts

OUTSIDE = "O"  # the tag of tokens outside of every span, most of them by nature
_FAIR_SHARE = 1 / 3  # a label with less of its fair share, one in so many labels, is unbalanced
_MOST_BALANCED = 20  # labels: with more, the rare ones are told instead
_RARE = 5  # rows, fewer of which teach little, and can't be spread over as many folds
_FOLDS = 5
_TIMES_AS_LIKELY = 5  # another label than the given one, for that one to be suspicious
_ABOVE_CHANCE = 3.0  # standard errors, at least: a baseline that doesn't beat chance by so much can't judge a label
_MOST_ROWS, _MOST_WORK = 20_000, 400_000  # rows of the baseline; rows times labels
_NEARLY_ALL = 0.9  # of the values begin with a capital, for a small letter to be odd
_NAMED = 5  # values in a title
_OPEN = ("not given", "tbd", "todo", "?", "-", "--", "")
_NO_LABEL = frozenset(
    ("n/a", "na", "nan", "null", "nil", "unknown", "unk", "undefined", "missing", "not listed", "not specified", "not available", *_OPEN)
)


def label_findings(sets: Sequence[Texts]) -> list[Finding]:
    """Returns what is found of each label column, the training set first; of suspicious labels see `suspicious_labels`."""
    found = []
    for place, labels in enumerate(sets[0].labels):
        columns = [texts.labels[place] for texts in sets]
        found += [
            _balance(sets[0], labels),
            _rare(sets[0], labels),
            _unseen(sets, columns),
            _spellings(sets, columns),
            _placeholders(sets, columns),
            _odd_forms(sets, columns),
        ]
    return [one for one in found if one is not None]


def _balance(train: Texts, labels: Labels) -> Finding | None:
    counts = collections.Counter(value for value in labels.values if labels.each != "token" or value != OUTSIDE)
    if len(counts) > _MOST_BALANCED or not counts:
        return None
    (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
    total = counts.total()
    if len(counts) == 1:
        advice = "There is nothing to tell apart: give rows of other labels too, or leave the column out of the answer."
        return finding("balance", "warning", f"'{labels.name}' is '{most}' in every row", advice, [_first_of(train, labels, most)])
    if smallest >= _FAIR_SHARE * total / len(counts):
        return None
    title = (
        f"'{labels.name}' is unbalanced: '{most}' {largest / total:.1%}, '{least}' {smallest / total:.1%} of {counted(total, labels.each)}"
    )
    advice = (
        f"A model that always says '{most}' is right that often, so read the figures of each label, or a mean over labels; give more rows "
        "of the rare ones, or fewer of the frequent."
    )
    return finding("balance", "warning", title, advice, [_first_of(train, labels, least)])


def _first_of(texts: Texts, labels: Labels, value: str, note: str = "") -> Case:
    """The first row that has a value."""
    return Case((spot(texts, int(labels.rows[labels.values.index(value)])),), note or value)


def _rare(train: Texts, labels: Labels) -> Finding | None:
    counts = collections.Counter(labels.values)
    rare = sorted((value for value in counts if counts[value] < _RARE), key=lambda value: counts[value])
    if not rare:
        return None
    rows = sum(counts[value] for value in rare)
    title = (
        f"{len(rare):,} of {counted(len(counts), 'value')} of '{labels.name}' have fewer than {_RARE} {labels.each}s in train "
        f"({counted(rows, labels.each)} in all)"
    )
    cases = [_first_of(train, labels, value, f"{value}: {counted(counts[value], labels.each)}") for value in rare]
    return finding("rare_labels", "note", title, "So few teach little: give more, or join them under a wider label.", cases)


def _unseen(sets: Sequence[Texts], columns: Sequence[Labels]) -> Finding | None:
    known, cases, rows = set(columns[0].values), [], collections.Counter[str]()
    for texts, labels in zip(sets[1:], columns[1:], strict=True):
        for i, value in zip(labels.rows, labels.values, strict=True):
            if value not in known:
                cases.append(Case((spot(texts, int(i)),), value))
                rows[texts.name] += 1
    if not cases:
        return None
    told = " and ".join(f"{counted(count, columns[0].each)} of {name}" for name, count in rows.items())
    verb = "has" if rows.total() == 1 else "have"
    title = f"{told} {verb} a '{columns[0].name}' that train lacks"
    return finding("unseen_labels", "note", title, "What was never shown can hardly be answered: give such rows to train.", cases)


def _spellings(sets: Sequence[Texts], columns: Sequence[Labels]) -> Finding | None:
    """Labels that differ in case and white space alone."""
    spelt: dict[str, dict[str, Case]] = collections.defaultdict(dict)
    for texts, labels in zip(sets, columns, strict=True):
        for value in dict.fromkeys(labels.values):
            spelt[normalized(value)].setdefault(value, _first_of(texts, labels, value))
    cases = [
        Case(tuple(case.spots[0] for case in forms.values()), ", ".join(map(repr, forms))) for forms in spelt.values() if len(forms) > 1
    ]
    if not cases:
        return None
    title = f"{counted(len(cases), 'value')} of '{columns[0].name}' spelt in several ways"
    return finding("spellings", "warning", title, "Write each in one way: the model takes them for different answers.", cases)


def _placeholders(sets: Sequence[Texts], columns: Sequence[Labels]) -> Finding | None:
    odd = {value for labels in columns for value in labels.values if _is_placeholder(value)}
    title = f"'{columns[0].name}' has values that say that there is none: {_named(odd)}"
    cases = _of_values(sets, columns, odd)
    return finding("placeholders", "warning", title, "Leave such rows out, or the model learns to answer so.", cases) if cases else None


def _of_values(sets: Sequence[Texts], columns: Sequence[Labels], values: set[str]) -> list[Case]:
    """The first row of each set that has each of these values."""
    cases = []
    for texts, labels in zip(sets, columns, strict=True):
        counts = collections.Counter(value for value in labels.values if value in values)
        cases += [_first_of(texts, labels, value, f"{value!r}: {counted(counts[value], labels.each)} of {texts.name}") for value in counts]
    return cases


def _named(values: set[str]) -> str:
    """The first values of many, in quotes."""
    return ", ".join([*map(repr, sorted(values)[:_NAMED]), *(["..."] if len(values) > _NAMED else [])])


def _odd_forms(sets: Sequence[Texts], columns: Sequence[Labels]) -> Finding | None:
    """Labels that look cut: a small letter at the start where nearly all others have a capital, or half a pair of brackets."""
    values = {value for labels in columns for value in labels.values if value}
    capital = sum(value[0].isupper() for value in values) >= _NEARLY_ALL * len(values)
    odd = {value for value in values if (capital and value[0].islower()) or value.count("(") != value.count(")")}
    title = f"{counted(len(odd), 'value')} of '{columns[0].name}' {'looks' if len(odd) == 1 else 'look'} cut: {_named(odd)}"
    cases = _of_values(sets, columns, odd)
    return finding("cut_labels", "warning", title, "Write them in full: the model learns them as they stand.", cases) if cases else None


def _is_placeholder(value: str) -> bool:
    """Whether a value, or the first part of one with a slash, means that there is no value."""
    folded = normalized(value)
    return folded in _NO_LABEL or folded.split(" / ")[0] in _NO_LABEL


# ---------------------------------------------------------------- labels that look wrong


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """A label that a baseline, which hasn't seen the row, finds unlikely."""

    row: int
    given: str
    predicted: str
    given_probability: float
    predicted_probability: float


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the baseline makes of one label column."""

    suspicions: tuple[Suspicion, ...]  # the least likely first
    rows: int  # judged
    accuracy: float  # share of the given labels that the baseline predicts, out of fold
    balanced_accuracy: float  # the mean over labels
    is_able: bool  # it beats chance; else there are no suspicions


def judge(texts: Sequence[str], labels: Sequence[str], seed: int = 0) -> Judgement | None:
    """Returns what a cheap baseline makes of labels, out of fold: logistic regression on TF-IDF of words, each label of equal weight.

    A label is suspicious where another one is `_TIMES_AS_LIKELY` as likely by a model trained on the other four fifths of the rows
    (as in confident learning, Northcutt et al. 2021, arXiv:1911.00068). Labels of fewer than `_RARE` rows aren't judged; of more than
    20,000 rows (fewer with many labels) so many are drawn by `seed`.

    Args:
        texts: n.
        labels: n, one a text.
        seed: of the folds and the draw.

    Returns:
        None where fewer than two labels have enough rows.
    """
    counts = collections.Counter(labels)
    names = sorted(value for value in counts if counts[value] >= _RARE)
    if len(names) < 2:
        return None
    classes = {name: number for number, name in enumerate(names)}
    rows = np.array([i for i, value in enumerate(labels) if value in classes and re.search(r"\w", texts[i])], np.int64)
    most = min(_MOST_ROWS, _MOST_WORK // len(names))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng((seed, *b"labels")).choice(rows, most, replace=False))
    given = np.array([classes[labels[i]] for i in rows])
    kept = np.isin(given, np.flatnonzero(np.bincount(given, minlength=len(names)) >= _RARE))  # the draw may leave too few of one
    rows, given = rows[kept], given[kept]
    if len(np.unique(given)) < 2:
        return None
    probabilities = np.zeros((len(rows), len(names)))
    probabilities[:, np.unique(given)] = _out_of_fold([texts[i] for i in rows], given, seed)
    return _judged(rows, given, probabilities, names)


def _out_of_fold(texts: Sequence[str], given: np.ndarray, seed: int) -> np.ndarray:
    """Returns (rows, classes) probabilities of the classes present, each row's from a model that hasn't seen it."""
    # scikit-learn takes a second to import, which only this needs.
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    from jaxft.tasks.word_counts import word_model

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    with threadpool_limits(1):  # products this small are slower, up to thirty times, on several threads
        return cross_val_predict(word_model(1, balanced=True), texts, given, cv=folds, method="predict_proba")


def _judged(rows: np.ndarray, given: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> Judgement:
    predicted, each = probabilities.argmax(axis=1), np.arange(len(rows))
    right = predicted == given
    numbers, counts = np.unique(given, return_counts=True)
    balanced = float(np.mean([right[given == number].mean() for number in numbers]))
    chance = 1 / len(numbers)
    is_able = balanced > chance + _ABOVE_CHANCE * np.sqrt(chance * (1 - chance) * (1 / counts).mean() / len(numbers))
    own, best = probabilities[each, given], probabilities[each, predicted]
    odd = np.flatnonzero(best >= _TIMES_AS_LIKELY * own) if is_able else np.zeros(0, int)
    odd = odd[np.argsort(own[odd] / best[odd], kind="stable")]
    suspicions = (Suspicion(int(rows[i]), names[given[i]], names[predicted[i]], float(own[i]), float(best[i])) for i in odd)
    return Judgement(tuple(suspicions), len(rows), float(right.mean()), balanced, bool(is_able))


def suspicious_labels(train: Texts, seed: int = 0) -> list[Finding]:
    """Returns a finding for each column with one label a row that has suspicious ones."""
    found = []
    for labels in train.labels:
        judgement = judge(train.texts, labels.values, seed) if labels.each == "row" else None
        if judgement is None or not judgement.suspicions:
            continue
        cases = [
            Case(
                (spot(train, one.row),),
                f"given {one.given} ({one.given_probability:.0%}), rather {one.predicted} ({one.predicted_probability:.0%})",
            )
            for one in judgement.suspicions
        ]
        title = f"'{labels.name}' looks wrong in {counted(len(cases), 'row')} of train"
        advice = (
            f"Read them, the first ones first. A baseline of word counts that hadn't seen the row finds another label at least "
            f"{_TIMES_AS_LIKELY} times as likely; it agrees with {judgement.accuracy:.0%} of {judgement.rows:,} given labels, so some of "
            "these are its own mistakes."
        )
        found.append(finding("suspicious_labels", "note", title, advice, cases))
    return found
