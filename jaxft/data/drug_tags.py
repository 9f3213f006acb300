"""Words of a drug review with tags: where the drug and the condition that the review is about are mentioned.

The tags are made, not annotated: of the row's own fields every mention is found that is spelt as there, in any case, word for word. Other
drugs and conditions that a review names stay outside, so a model has to tell what the review is about.
"""

import re
from collections.abc import Mapping, Sequence

DRUG, CONDITION = "DRUG", "CONDITION"
OUTSIDE = "O"
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")  # words with their apostrophes, and each sign by itself
_BETWEEN_NAMES = " / "  # of one drug: "Ethinyl estradiol / norgestimate"


def words_of(text: str) -> list[str]:
    """Returns the words and signs of a text.

    >>> words_of("It didn't help (2mg).")
    ['It', "didn't", 'help', '(', '2mg', ')', '.']
    """
    return _WORD.findall(text)


def tagged(text: str, drug: str, condition: str) -> dict[str, list[str]]:
    """Returns `tokens`, the words of a review, and `tags` in IOB2.

    Args:
        text: the review.
        drug: its drug, or the names of its parts with " / " between them.
        condition: what it is taken for, or an empty string.

    >>> tagged("Took Paxil for panic disorder.", "Paxil", "Panic Disorder")["tags"]
    ['O', 'B-DRUG', 'O', 'B-CONDITION', 'I-CONDITION', 'O']
    """
    tokens = words_of(text)
    names = {tuple(words_of(condition.lower())): CONDITION}
    names |= {tuple(words_of(name.lower())): DRUG for name in drug.split(_BETWEEN_NAMES)}
    return {"tokens": tokens, "tags": _tags([token.lower() for token in tokens], names)}


def _tags(tokens: Sequence[str], names: Mapping[tuple[str, ...], str]) -> list[str]:
    tags, start = [OUTSIDE] * len(tokens), 0
    longest_first = sorted((name for name in names if name), key=len, reverse=True)
    while start < len(tokens):
        name = next((name for name in longest_first if tuple(tokens[start : start + len(name)]) == name), ())
        tags[start : start + len(name)] = [f"{'I' if i else 'B'}-{names[name]}" for i in range(len(name))]
        start += max(len(name), 1)
    return tags
