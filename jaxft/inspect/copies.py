"""Rows that say the same: duplicates, near-duplicates, rows that stand in two sets, equal texts with different answers.

Texts are compared without case, accents of encoding (NFKC) and runs of white space. Near-duplicates share most of their runs of three
words: the Jaccard index of those sets is at least `NEAR`. Candidates come from MinHash signatures cut into bands (Broder 1997; Lee et
al. 2022, arXiv:2107.06499), so that no row is compared with all others, and each candidate is then measured exactly.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence

import datasketch
import numpy as np
import scipy.sparse

from jaxft.inspect.findings import Case, Finding, counted, finding, spot
from jaxft.inspect.texts import Texts

NEAR = 0.7  # Jaccard index from which two texts are near-duplicates
_SHINGLE = 3  # words
# 25 bands of 5 find a pair of index 0.7 with probability 0.99, one of 0.8 all but surely.
_BANDS, _ROWS_A_BAND = 25, 5
# Texts of one band are put in order and each is compared with the next ones alone, so that thousands that share a form cost no more than
# their number; of a large group of copies each is still linked to a neighbour.
_NEIGHBOURS = 4
# A word, or one character of the scripts that put no spaces between words: kana, Han, Thai, Lao, Khmer, Burmese.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|\w+")

Row = tuple[int, int]  # a set's number, a readable row of it
TRAIN = 0  # the number of the training set


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows whose texts are copies of each other, over all sets."""

    rows: tuple[Row, ...]
    similarity: float = 1.0  # the least Jaccard index of the pairs that link them; 1: equal texts

    def of(self, number: int) -> list[Row]:
        """Returns the rows of one set."""
        return [row for row in self.rows if row[0] == number]


def normalized(text: str) -> str:
    """Returns the text as it is compared.

    >>> normalized("  Did NOT\\n help. ")
    'did not help.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def copies(sets: Sequence[Texts], groups: Sequence[Group], most: int, seed: int) -> list[Finding]:
    """Returns what is found of copies.

    Args:
        sets: the training set first.
        groups: their rows by distinct text, as `equal_texts` gives them.
        most: distinct texts that are searched for near-duplicates; of more, so many are drawn.
        seed: of that draw, and of the signatures.
    """
    nearly = near_texts(groups, sets, most, seed)
    equal = [group for group in groups if len(group.rows) > 1]
    found = [
        _leaks(sets, equal, nearly),
        _conflicts(sets, equal),
        _near_conflicts(sets, nearly),
        _duplicates(sets, equal),
        _near_duplicates(sets, nearly),
    ]
    return [one for one in found if one is not None]


def equal_texts(sets: Sequence[Texts]) -> list[Group]:
    """Returns the rows of each distinct text, in order."""
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for number, texts in enumerate(sets):
        for i, text in enumerate(texts.texts):
            groups[normalized(text)].append((number, i))
    return [Group(tuple(rows)) for rows in groups.values()]


def near_texts(groups: Sequence[Group], sets: Sequence[Texts], most: int, seed: int) -> list[Group]:
    """Returns the groups of texts that aren't all equal but nearly so."""
    if len(groups) > most:
        drawn = np.random.default_rng((seed, *b"inspect")).choice(len(groups), most, replace=False)
        groups = [groups[i] for i in np.sort(drawn).tolist()]
    shingles = [_shingles(normalized(sets[number].texts[i])) for number, i in (group.rows[0] for group in groups)]
    links = {pair: index for pair in _candidates(shingles, seed) if (index := _jaccard(*(shingles[i] for i in pair))) >= NEAR}
    if not links:
        return []
    pairs = np.array(list(links))
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(groups), len(groups)))
    _, cluster = scipy.sparse.csgraph.connected_components(graph, directed=False)
    least: dict[int, float] = collections.defaultdict(lambda: 1.0)
    for (one, _), index in links.items():
        least[cluster[one]] = min(least[cluster[one]], index)
    members: dict[int, list[Row]] = collections.defaultdict(list)
    for i in np.flatnonzero(np.isin(cluster, list(least))):
        members[cluster[i]] += groups[int(i)].rows
    return [Group(tuple(sorted(rows)), least[number]) for number, rows in members.items()]


def _shingles(text: str) -> frozenset[bytes]:
    words = _WORD.findall(text)
    return frozenset(" ".join(words[i : i + _SHINGLE]).encode() for i in range(max(len(words) - _SHINGLE + 1, 1)))


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    return len(one & other) / len(one | other)


def _candidates(shingles: Sequence[frozenset[bytes]], seed: int) -> Iterator[tuple[int, int]]:
    """Yields pairs of texts whose signatures agree in a band, each pair once."""
    if not shingles:
        return
    hashes = datasketch.MinHash.generator(shingles, num_perm=_BANDS * _ROWS_A_BAND, seed=(seed + 1) % 2**32)
    signatures = np.array([one.hashvalues for one in hashes]).reshape(len(shingles), _BANDS, _ROWS_A_BAND)
    seen = set()
    for band in range(_BANDS):
        following = signatures[:, (band + 1) % _BANDS]  # puts the most alike of a band side by side
        order = np.lexsort((*following.T, *signatures[:, band].T))
        ordered = signatures[order, band]
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            for place in np.flatnonzero((ordered[step:] == ordered[:-step]).all(axis=1)):
                one, other = sorted((int(order[place]), int(order[place + step])))
                if (one, other) not in seen:
                    seen.add((one, other))
                    yield one, other


# ---------------------------------------------------------------- findings


def _leaks(sets: Sequence[Texts], equal: Sequence[Group], nearly: Sequence[Group]) -> Finding | None:
    """Rows of validation and test whose text the model is trained on."""
    cases, rows = [], collections.Counter[str]()
    for group in sorted([*nearly, *equal], key=lambda group: -group.similarity):
        held = [row for row in group.rows if row[0] != TRAIN]
        if not held or not group.of(TRAIN):
            continue
        fresh = [row for row in held if group.similarity == 1 or not _has_equal(row, group, sets)]
        rows.update(sets[number].name for number, _ in fresh)
        if fresh:
            cases.append(_case(sets, [*fresh, *group.of(TRAIN)[:2]], group))
    if not cases:
        return None
    told = " and ".join(f"{count:,} of the {len(sets_named(sets, name)):,} rows of {name}" for name, count in rows.items())
    verb = "stands" if rows.total() == 1 else "stand"
    advice = "Take them out of train: else the figures say what the model remembers, not what it has learned."
    return finding("leak", "warning", f"{told} {verb} in train too, word for word or nearly", advice, cases)


def sets_named(sets: Sequence[Texts], name: str) -> Texts:
    """Returns the set of this name."""
    return next(texts for texts in sets if texts.name == name)


def _has_equal(row: Row, group: Group, sets: Sequence[Texts]) -> bool:
    """Whether the very text of `row` stands in train: then the group of equal texts tells of it."""
    text = normalized(sets[row[0]].texts[row[1]])
    return any(normalized(sets[TRAIN].texts[i]) == text for _, i in group.of(TRAIN))


def _conflicts(sets: Sequence[Texts], equal: Sequence[Group]) -> Finding | None:
    """Equal texts with different answers."""
    cases = [_case(sets, rows, group, _differing(sets, rows)) for group in equal if len(rows := _one_an_answer(sets, group)) > 1]
    if not cases:
        return None
    advice = "Decide which answer is right and remove the others, or add what tells the rows apart to the prompt."
    return finding("conflict", "warning", f"{counted(len(cases), 'text')} with different answers", advice, cases)


def _near_conflicts(sets: Sequence[Texts], nearly: Sequence[Group]) -> Finding | None:
    """Near-duplicates with different labels; free answers to two texts that differ may differ too."""
    cases = []
    for group in nearly:
        rows = _one_an_answer(sets, group)
        if len(rows) > 1 and (differing := _differing(sets, rows)):
            cases.append(_case(sets, rows, group, differing))
    if not cases:
        return None
    advice = "Read them side by side: where what differs in the text doesn't explain the labels, one of them is wrong."
    return finding("near_conflict", "note", f"{counted(len(cases), 'group')} of nearly equal texts with different labels", advice, cases)


def _duplicates(sets: Sequence[Texts], equal: Sequence[Group]) -> Finding | None:
    """Rows of one set that are equal, answer included."""
    cases, extra = [], collections.Counter[str]()
    for group in equal:
        for number in range(len(sets)):
            same = collections.defaultdict(list)
            for row in group.of(number):
                same[normalized(sets[number].answers[row[1]])].append(row)
            for rows in same.values():
                if len(rows) > 1:
                    cases.append(_case(sets, rows, group))
                    extra[sets[number].name] += len(rows) - 1
    if not cases:
        return None
    title = f"{_told(extra)} an earlier row of the same set"
    return finding("duplicates", "warning", title, "Remove all but one of each: a row that stands twice counts twice in the loss.", cases)


def _told(counts: collections.Counter[str]) -> str:
    told = " and ".join(f"{counted(count, 'row')} of {name}" for name, count in counts.items())
    return f"{told} {'repeats' if counts.total() == 1 else 'repeat'}"


def _near_duplicates(sets: Sequence[Texts], nearly: Sequence[Group]) -> Finding | None:
    """Rows of one set that are nearly equal."""
    cases, extra = [], collections.Counter[str]()
    for group in nearly:
        for number, texts in enumerate(sets):
            distinct = {normalized(texts.texts[i]): (number, i) for _, i in reversed(group.of(number))}
            if len(distinct) > 1:
                cases.append(_case(sets, sorted(distinct.values()), group))
                extra[texts.name] += len(distinct) - 1
    if not cases:
        return None
    advice = "Keep the better one of each where they say the same; what differs may also be the point of the data, as in filled-in forms."
    return finding("near_duplicates", "note", f"{_told(extra)} an earlier row of the same set nearly word for word", advice, cases)


def _case(sets: Sequence[Texts], rows: Sequence[Row], group: Group, note: str = "") -> Case:
    alike = "" if group.similarity == 1 else f"{group.similarity:.0%} of their runs of {_SHINGLE} words are shared"
    return Case(tuple(spot(sets[number], i) for number, i in rows), "; ".join(part for part in (note, alike) if part))


def _one_an_answer(sets: Sequence[Texts], group: Group) -> list[Row]:
    """The first row of each distinct answer, where rows have answers."""
    first: dict[str, Row] = {}
    for number, i in group.rows:
        first.setdefault(normalized(sets[number].answers[i]), (number, i))
    return list(first.values())


def _differing(sets: Sequence[Texts], rows: Sequence[Row]) -> str:
    """Which labels the rows differ in, as "rating: positive, neutral"."""
    parts = []
    for place, labels in enumerate(sets[TRAIN].labels):
        if labels.each == "row":
            values = dict.fromkeys(sets[number].labels[place].values[i] for number, i in rows)
            parts += [f"{labels.name}: {', '.join(values)}"] if len({normalized(value) for value in values}) > 1 else []
    return "; ".join(parts)
