"""What a person reads while jaxft runs: plain lines and tables, on standard output."""

import sys
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table

_FILE_WIDTH = 120  # characters a line where output goes to a file or a pipe


def console() -> rich.console.Console:
    """Returns the console that all of jaxft prints to."""
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return rich.console.Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def say(text: str = "") -> None:
    """Prints one paragraph."""
    console().print(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is text, the others are right-aligned."""
    grid = rich.table.Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console().print(grid)
