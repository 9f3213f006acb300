"""Mistakes in what the user gave: one clear message, no traceback, exit code 2."""

import difflib
import pathlib
from collections.abc import Iterable

_SHOWN = 80  # characters of a path in a message


class UserError(Exception):
    """A mistake in what the user gave.

    The message names the thing, the place (file and line for data) and the remedy. `launch.py` prints it and exits with code 2.
    """


class AbsentError(UserError):
    """Something that a user named and that this machine neither has nor can fetch: a plan can do without much of it."""


class OutOfReachError(AbsentError):
    """What is gated on the hub, or not in its cache where the hub can't be reached: no mistake, and a plan does without it by itself."""

    def __init__(self, message: str, what: str = "") -> None:
        """`what` it is: rows, files or tokenizer of a source."""
        super().__init__(message)
        self.what = what


class UserNote(UserWarning):
    """What a user should know of what was done as asked: a warning in Python, one line of what `launch.py` prints."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `known`, or an empty string.

    >>> nearest("lora_lama2", ["lora_llama2", "full_llama2"])
    " Did you mean 'lora_llama2'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is none of `known`.

    >>> str(unknown("schedule", "cosin", ["constant", "cosine"]))
    "There is no schedule 'cosin'. Did you mean 'cosine'? Known: constant, cosine."
    """
    known = sorted(known)
    return UserError(f"There is no {kind} '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")


def given_path(text: str) -> pathlib.Path:
    """Returns the path that a user gave, ~ expanded; raises `UserError` for one that the system can't take."""
    try:
        path = pathlib.Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(f"'{shown}' is no path: {getattr(error, 'strerror', None) or error}.") from error
    return path


def expanded(source: str) -> str:
    """Returns a source's name with the ~ of a path expanded, for commands and files that others read."""
    return str(given_path(source)) if source.startswith("~") else source
