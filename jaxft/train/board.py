"""TensorBoard's event files, written by the thread that trains: what the disk refuses is raised where it is written."""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_FLUSH_SECONDS = 10.0  # between writes to the disk


class Board:
    """One event file of scalars.

    tensorboardX's own writer hands events to a thread. Where that fails, on a full disk, it ends with a traceback, and training waits for
    it forever.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        """Opens a file in `folder`; what earlier files hold from step `first` on is hidden. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{first}")  # its name has the second: not all starts differ in that
        self._file.write_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of a step; raises `OSError`."""
        for name, value in values.items():
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left, and closes the file; raises `OSError`."""
        self._file.close()
