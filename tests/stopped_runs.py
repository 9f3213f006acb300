"""Runs that a signal stops."""

import os
import signal

from jaxft.train.logs import Logs


def stop_at(monkeypatch, step):
    """Ends the program as SIGTERM does, after so many steps of its runs."""
    count = iter(range(1, 1000))

    def advance(self, *arguments, original=Logs.advance):
        original(self, *arguments)
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Logs, "advance", advance)
