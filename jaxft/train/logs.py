"""What a run writes as it goes: the progress bar, `metrics.jsonl`, TensorBoard."""

import contextlib
import json
import pathlib
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxft.errors import UserError
from jaxft.train.board import Board
from jaxft.train.loggers import Logger

METRICS = "metrics.jsonl"
_SHARES = ("accuracy", "exact_match", "precision", "recall")  # metrics that are shares begin so


class Logs:
    """The files, the bar and the loggers of one run. A run that goes on keeps its lines up to `start` and drops later ones."""

    def __init__(self, workdir: pathlib.Path, start: int, steps: int, loggers: Sequence[Logger] = ()):
        self._path, self._loggers = workdir / METRICS, loggers
        with self._explained():
            self._keep(start)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = Board(workdir / "tensorboard", start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", desc="Training", dynamic_ncols=True, smoothing=0.1)

    def _keep(self, start: int) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= start]
        temporary = self._path.with_suffix(".partial")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line, and the same numbers to TensorBoard and the loggers."""
        with self._explained():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.write(step, values)
            for logger in self._loggers:
                logger.write(step, values)

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """Moves the bar one step on."""
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {peak_memory_bytes() / 2**30:.1f} GiB", refresh=False
        )
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text, file=sys.stdout)

    @contextlib.contextmanager
    def end(self, step: int) -> Iterator[dict[str, float]]:
        """Of a run that took its last `step`: closes the bar, and takes the figures of the evaluation after it for all but metrics.jsonl.

        Everything is closed behind the `with`; the loggers are told whether it ended well.
        """
        self._bar.close()
        figures: dict[str, float] = {}
        complete = False
        try:
            yield figures
            with self._explained():
                self._board.write(step, figures)
                for logger in self._loggers:
                    logger.write(step, figures)
            complete = True
        finally:
            self.close(complete)

    def close(self, complete: bool = False) -> None:
        """Closes the bar, the files and the loggers, which are told whether the run is `complete`.

        On a full disk the last lines are lost; that was said when they were written.
        """
        self._bar.close()
        for opened in (self._file, self._board):
            with contextlib.suppress(OSError):
                opened.close()
        for logger in self._loggers:
            with contextlib.suppress(OSError, *(() if complete else (UserError,))):  # of what already ends badly, the cause is told
                logger.close(complete)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the disk refuses into a message."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path.parent} can't be written ({error.strerror or error}). The last whole checkpoint is kept: make room, and give "
                "the same command again."
            ) from error


def figure(name: str, value: float) -> str:
    """Returns a metric as people read it: shares in percent.

    >>> figure("macro_f1", 0.5), figure("loss", 0.5)
    ('macro_f1 50.0%', 'loss 0.5000')
    """
    return f"{name} {number(name, value)}"


def number(name: str, value: float) -> str:
    """Returns a metric's value as people read it."""
    return f"{value:.1%}" if name.startswith(_SHARES) or name.endswith("f1") else f"{value:.4f}"


def _step_of(line: str) -> Any:
    try:
        return json.loads(line).get("step")
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return None


def peak_memory_bytes() -> int:
    """Returns the device's peak memory where it counts it, else the process's peak resident memory."""
    counted = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return int(counted or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
