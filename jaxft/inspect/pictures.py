"""The pictures of the page, as SVG that stands in it: lengths and labels."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxft.inspect.encoded import Encoded
from jaxft.inspect.texts import Texts

COLORS = ("#3b6ea8", "#d08c34", "#5a9367")  # of train, validation and test: told apart by all, in print too
_BINS = 24
MOST_BARS = 12  # labels of a column
_LONGEST_NAME = 32
# Text stays text, names don't change from run to run.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "jaxft", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False}
_STYLE |= {"axes.spines.right": False}


def lengths(sets: Sequence[Texts], encoded: Sequence[Encoded], max_length: int) -> str:
    """Returns the histogram of each set's lengths in tokens, uncut, as shares of the set, and where rows are cut."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        axes = figure.subplots()
        longest = max(int(one.whole_lengths.max()) for one in encoded)
        edges = np.linspace(0, longest + 1, min(_BINS, longest + 1) + 1)
        for texts, one, color in zip(sets, encoded, COLORS, strict=False):
            weights = np.full(len(texts), 100 / len(texts))
            style: Any = {"histtype": "stepfilled", "alpha": 0.25} if texts is sets[0] else {"histtype": "step", "linewidth": 1.6}
            axes.hist(one.whole_lengths, edges.tolist(), weights=weights, label=texts.name, color=color, **style)
        if longest >= max_length * 0.7:
            axes.axvline(max_length, color="#b03a3a", linewidth=1.2, linestyle="--", label=f"max_length, {max_length}")
        axes.set(xlabel="tokens of a row, uncut", ylabel="% of the set's rows", xlim=(0, None))
        axes.legend(frameon=False)
        return _svg(figure)


def balance(values: dict[str, dict[str, int]], sets: Sequence[Texts]) -> str:
    """Returns the share of each value of a label column in each set, as bars; of more than `MOST_BARS` values the most frequent."""
    chosen = list(values)[:MOST_BARS]
    totals = {texts.name: max(sum(counts[texts.name] for counts in values.values()), 1) for texts in sets}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 0.14 * len(chosen) * len(sets) + 0.06 * len(chosen)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(sets)
        for number, (texts, color) in enumerate(zip(sets, COLORS, strict=False)):
            shares = [100 * values[value][texts.name] / totals[texts.name] for value in chosen]
            places = np.arange(len(chosen)) + (number - (len(sets) - 1) / 2) * height
            axes.barh(places, shares, height, color=color, label=texts.name)
        axes.set_yticks(range(len(chosen)), [_name(value) for value in chosen])
        axes.set(xlabel="% of the set", ylim=(len(chosen) - 0.4, -0.6))
        axes.legend(frameon=False, loc="lower right")
        return _svg(figure)


def _name(value: str) -> str:
    """A value as a tick: short, and with no formula in it."""
    short = value if len(value) <= _LONGEST_NAME else f"{value[:_LONGEST_NAME]}..."
    return short.replace("$", r"\$")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    found = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
