"""Debris in texts: what other programs left of characters that they couldn't keep."""

import re
from collections.abc import Sequence

from jaxft.inspect.findings import Case, Finding, counted, finding, spot
from jaxft.inspect.texts import Texts

# What is left of a character -> what it is called.
_DEBRIS = {
    "HTML entities": re.compile(r"&(?:#\d{1,6}|#x[0-9a-fA-F]{1,5}|amp|lt|gt|quot|apos|nbsp|rsquo|lsquo|rdquo|ldquo|hellip|mdash|ndash);"),
    "JavaScript escapes": re.compile(r"%u[0-9a-fA-F]{4}"),
    "UTF-8 read as Latin-1": re.compile("\u00e2\u20ac[\u0080-\u02dd\u2018-\u2122]|\u00c3[\u00a0-\u00bf]|\u00c2[\u00a0\u00b0\u00b4\u00b7]"),
    "replacement characters": re.compile("\ufffd"),
    "control characters": re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]"),
}
_AROUND = 20  # characters shown on either side


def debris(sets: Sequence[Texts]) -> list[Finding]:
    """Returns a finding for each kind of debris in texts and answers."""
    found = []
    for kind, pattern in _DEBRIS.items():
        cases = [
            Case((spot(texts, i),), _excerpt(match))
            for texts in sets
            for i in range(len(texts))
            if (match := pattern.search(texts.texts[i]) or pattern.search(texts.answers[i]))
        ]
        if cases:
            title = f"{counted(len(cases), 'row')} with {kind}"
            advice = "Turn them back into the characters that they stood for: the model learns to read and write them as they are."
            found.append(finding("debris", "note", title, advice, cases))
    return found


def _excerpt(match: re.Match[str]) -> str:
    start, stop = max(match.start() - _AROUND, 0), match.end() + _AROUND
    return f"{'...' if start else ''}{match.string[start:stop]!r}{'...' if stop < len(match.string) else ''}"
