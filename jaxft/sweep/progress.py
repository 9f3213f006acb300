"""What a person sees of a sweep: a line for each run that ends, and a bar over runs with the time that is left."""

import datetime
import sys
from collections.abc import Mapping

from tqdm import tqdm

from jaxft.sweep.runs import DONE, ENDED, PRUNED, RUNNING, Folder, State


class Progress:
    """The lines and the bar."""

    def __init__(self, folder: Folder, metric: str, mode: str, states: Mapping[str, State], total: int):
        self._folder, self._metric, self._best = folder, metric, min if mode == "min" else max
        self._seen = dict(states)
        done = sum(state.state in ENDED for state in states.values())
        self._bar = tqdm(total=total, initial=done, unit="run", desc="Sweep", dynamic_ncols=True, smoothing=0.0, miniters=0)
        self._bar.mininterval = 1.0 if sys.stderr.isatty() else 60.0  # seconds between two pictures of it

    def show(self, states: Mapping[str, State]) -> None:
        """Prints what has changed."""
        for run, state in states.items():
            before = self._seen.get(run, State())
            if state != before and (state.state in ENDED or state.deaths > before.deaths):
                self._say(self._line(run, state))
                self._bar.update(state.state in ENDED)
        self._seen = dict(states)
        running = [run for run, state in states.items() if state.state == RUNNING]
        others = f" and {len(running) - 1} more" if len(running) > 1 else ""
        self._bar.set_postfix_str(f"{running[0]}{others}" if running else "", refresh=False)
        self._bar.update(0)

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)

    def _line(self, run: str, state: State) -> str:
        if state.error is not None:
            return f"{run}: {state.state if state.state in ENDED else 'died, and is tried again'}. {state.error}"
        found = [value for _, value in self._folder.evaluations(run, self._metric)]
        figure = f", validation {self._metric} {self._best(found):.4f}" if found else ""
        return f"{run}: {'pruned' if state.state == PRUNED else DONE}{figure}, {_seconds(state):.0f} s"

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _seconds(state: State) -> float:
    """Seconds of the newest attempt."""
    assert state.began is not None
    assert state.ended is not None
    return (datetime.datetime.fromisoformat(state.ended) - datetime.datetime.fromisoformat(state.began)).total_seconds()
