"""Words with a tag each: the columns of a tagging data set, its tags' names, and whether they follow a scheme of entities.

In IOB2 an entity is B-X I-X I-X (Tjong Kim Sang and Veenstra 1999, arXiv:cs/9907006); in IOBES the last word is E-X, and a single one S-X;
BILOU is IOBES with L for E and U for S (Ratinov and Roth 2009).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.config import DataConfig
from jaxft.data.labels import distinct
from jaxft.data.rows import Rows
from jaxft.errors import UserError, nearest

OUTSIDE = "O"
AUTO, PLAIN, IOB2, IOBES, BILOU = "auto", "plain", "IOB2", "IOBES", "BILOU"
SCHEMES = (AUTO, PLAIN, IOB2, IOBES, BILOU)
_LETTERS = {IOB2: "BI", IOBES: "BIES", BILOU: "BILU"}
_TO_IOBES, _TO_BILOU = str.maketrans("LU", "ES"), str.maketrans("ES", "LU")
_UNTYPED = "_"  # what seqeval calls the type of a bare B or I


class Tagged(NamedTuple):
    """One row."""

    words: list[str]
    tags: list[Any]  # one a word: names, or numbers


def tagged_row(row: Mapping[str, Any], data: DataConfig, place: str) -> Tagged:
    """Returns a row's words and tags, by `data.tokens` and `data.tags`.

    Raises:
      UserError: columns that aren't there or hold no lists; no words, or an empty one; other than one tag a word.
    """
    words, tags = (_list(row, column, name, place) for name, column in (("tokens", data.tokens), ("tags", data.tags)))
    if len(words) != len(tags):
        raise UserError(f"{place}: {len(words)} words in '{data.tokens}', but {len(tags)} tags in '{data.tags}'. Give each word one tag.")
    if not words:
        raise UserError(f"{place}: '{data.tokens}' is empty.")
    for number, (word, tag) in enumerate(zip(words, tags, strict=True), start=1):
        if not isinstance(word, str):
            raise UserError(f"{place}: word {number} of '{data.tokens}' must be text, not {word!r}.")
        if not word.strip():
            raise UserError(f"{place}: word {number} of '{data.tokens}' has no letters. Remove it and its tag.")
        if tag is None or (isinstance(tag, str) and not tag.strip()):
            raise UserError(f"{place}: tag {number} of '{data.tags}' is empty. Fill it; {OUTSIDE} is for words outside of every entity.")
    return Tagged(words, tags)


def _list(row: Mapping[str, Any], column: str, name: str, place: str) -> list[Any]:
    if column not in row:
        raise UserError(
            f"{place}: there is no column '{column}'.{nearest(column, row)} It has: {', '.join(row)}. Name the one that holds the "
            f"{'words' if name == 'tokens' else 'tags'} in config.data.{name}."
        )
    if not isinstance(row[column], list):
        raise UserError(f"{place}: '{column}' must be a list, one part a word, not {row[column]!r}.")
    return row[column]


def tagged_rows(rows: Rows, data: DataConfig) -> list[Tagged]:
    """Returns the words and tags of each row; raises `UserError` as `tagged_row`."""
    return [tagged_row(row, data, rows.place(i)) for i, row in enumerate(rows.dataset)]


def feature_names(rows: Rows, data: DataConfig) -> tuple[str, ...]:
    """Returns the names that the data set's own feature gives the tags, whose numbers the rows hold; () where it doesn't."""
    feature = rows.dataset.features.get(data.tags)
    feature = getattr(feature, "feature", feature)  # of a list, that of its parts
    return tuple(getattr(feature, "names", None) or ())  # of datasets.ClassLabel


def tag_names(found: Sequence[Tagged]) -> tuple[str, ...]:
    """Returns the distinct tags, sorted."""
    return distinct({tag for row in found for tag in row.tags})


# ---------------------------------------------------------------- schemes


def scheme_of(names: Sequence[str], wanted: str = AUTO) -> str:
    """Returns the scheme that tags are of: `wanted`, or where that is auto, what their names look like.

    Raises:
      UserError: names that aren't all of the scheme.

    >>> scheme_of(["B-DRUG", "I-DRUG", "O"]), scheme_of(["DET", "NOUN"]), scheme_of(["B-X", "S-X", "O"])
    ('IOB2', 'plain', 'IOBES')
    """
    found = scheme_like(names) if wanted == AUTO else wanted
    check_names(names, found)
    return found


def scheme_like(names: Iterable[str]) -> str:
    """Returns the scheme that tags look like, whether all of them are of it or not."""
    own = set(names) - {OUTSIDE}
    prefixed = {name[0] for name in own if re.match("[BIESLU]-.", name)}
    letters = prefixed or (own if own <= set("BIESLU") and "B" in own else set())  # bare ones, where entities have no types
    if not letters:
        return PLAIN
    return BILOU if letters & set("LU") else IOBES if letters & set("ES") else IOB2


def check_names(names: Iterable[str], scheme: str) -> None:
    """Raises `UserError` for a tag that no scheme has, or another one."""
    for name in names if scheme != PLAIN else ():
        if name != OUTSIDE and _letter(name, scheme) is None:
            letters = ", ".join(f"{letter}-..." for letter in _LETTERS[scheme])
            raise UserError(
                f"The tag '{name}' isn't one of the scheme {scheme}, as others are: {letters} and {OUTSIDE}. Correct it, or set "
                f"config.task.scheme={PLAIN} for tags that mark no entities."
            )


def _letter(name: str, scheme: str) -> str | None:
    match = re.match(f"([{_LETTERS[scheme]}])(-.+)?$", name)
    return match[1] if match else None


class Entity(NamedTuple):
    """Words that belong together."""

    kind: str  # "DRUG"; "" where the tags have no types
    first: int
    last: int


def kind_of(tag: str, scheme: str) -> str | None:
    """Returns the type of the entity that a tag is of, empty for one without types; None of what is outside of all.

    >>> kind_of("B-DRUG", "IOB2"), kind_of("O", "IOB2")
    ('DRUG', None)
    """
    return None if scheme == PLAIN or tag == OUTSIDE else tag.partition("-")[2]


def as_seqeval(tags: Sequence[str], scheme: str) -> list[str]:
    """Returns tags with the letters that seqeval knows."""
    return [f"{tag[0].translate(_TO_IOBES)}{tag[1:]}" for tag in tags] if scheme == BILOU else list(tags)


def entities_of(tags: Sequence[str], scheme: str) -> list[Entity]:
    """Returns the entities that tags mark, read as CoNLL's own script and seqeval do: what continues nothing begins an entity.

    >>> entities_of(["O", "I-DRUG", "I-DRUG"], "IOB2")
    [Entity(kind='DRUG', first=1, last=2)]
    """
    from seqeval.metrics.sequence_labeling import get_entities  # imports scikit-learn: seconds that a mistyped flag needn't wait for

    return [Entity("" if kind == _UNTYPED else kind, first, last) for kind, first, last in get_entities(as_seqeval(tags, scheme))]


def mended(tags: Sequence[str], scheme: str) -> list[str]:
    """Returns the tags of the same entities as the scheme has them.

    >>> mended(["O", "I-DRUG", "I-DRUG", "B-DRUG"], "IOB2"), mended(["B-X", "I-X", "O", "B-X"], "IOBES")
    (['O', 'B-DRUG', 'I-DRUG', 'B-DRUG'], ['B-X', 'E-X', 'O', 'S-X'])
    """
    found = [OUTSIDE] * len(tags)
    for kind, first, last in entities_of(tags, scheme):
        for place in range(first, last + 1):
            letter = "B" if place == first else "I"
            if scheme != IOB2 and place == last:
                letter = "S" if place == first else "E"
            letter = letter.translate(_TO_BILOU) if scheme == BILOU else letter
            found[place] = f"{letter}-{kind}" if kind else letter
    return found


def check_scheme(tags: Sequence[str], scheme: str, place: str) -> None:
    """Raises `UserError` where a row's tags don't follow their scheme, as an I-X after O."""
    for number, (tag, right) in enumerate(zip(tags, mended(tags, scheme), strict=True), start=1):
        if tag != right:
            before = tags[number - 2] if number > 1 else "nothing"
            raise UserError(
                f"{place}: tag {number} is '{tag}' after {before}, which is not {scheme}: '{right}' would be. Correct the row, or set "
                f"config.task.mend_tags=true to have all such tags read so, or config.task.scheme={PLAIN} for tags that mark no entities."
            )
