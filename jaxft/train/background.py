"""What orbax's threads and event loops print of an error that `Checkpoints.save` or `.wait` raises: nothing, it is said there once."""

import functools
import logging
import sys
from typing import Any

from jaxft.hub.folder import is_full


class _RaisedAgain(logging.Filter):
    """Drops the records of errors that come to who asked for the checkpoint."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not ("orbax" in record.pathname and error is not None) and not (isinstance(error, Exception) and is_full(error))


@functools.cache
def silence() -> None:
    """Has them say nothing from now on.

    When one write of a checkpoint fails, orbax closes the event loop of the others: asyncio logs each that fails after it, and tensorstore
    finds the loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_RaisedAgain())
    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            shown(unraisable)

    sys.unraisablehook = hook
