"""The report's pictures: quality against trained share and learning rate, curves with bands, bars of time and memory."""

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxft.sweep.results import RATE, Candidate, Interval, Results, Setting, front, interval

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")  # Okabe and Ito: told apart by the colour-blind
_MARKERS = "osD^vPX*<>h"  # a number of them that shares no divisor with the colours': 77 pairs
_COLUMNS = 4  # of small panels
_LONGEST_NAME = 34
_BINS = 30  # of steps, over which a training loss is averaged
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "jaxft", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False}
_STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ed", "axes.axisbelow": True}


def draw(results: Results) -> dict[str, Figure]:
    """Returns the pictures that there are figures for, by the name of their file."""
    settings = [setting for setting in results.settings() if setting.chosen]
    with matplotlib.rc_context(_STYLE):
        made = {
            "share": _share(results, settings),
            "rate": _rate(results, results.settings()),
            "curves": _curves(settings),
            "costs": _costs(settings),
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def svg(figure: Figure) -> str:
    """Returns a picture as SVG that stands in a page."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    found = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)


def png(figure: Figure) -> bytes:
    """Returns a picture as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _share(results: Results, settings: Sequence[Setting]) -> Figure | None:
    """Quality against the trained share of the parameters, with the front of those that none is better than in both."""
    found = [(setting, setting.mean("share"), setting.figure(results.metric)) for setting in settings]
    points = [(setting, share, figure) for setting, share, figure in found if share and figure]
    if not points:
        return None
    figure = Figure(figsize=(7.6, max(3.6, 0.9 + 0.2 * len(points))), layout="constrained")
    axes = figure.subplots()
    for number, (setting, share, value) in enumerate(points):
        marks: Any = {"color": COLORS[number % len(COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.errorbar(share, value.mean, yerr=value.half, linestyle="none", markersize=7, capsize=3, label=_name(setting.label), **marks)
    best = sorted(front([(share, results.sign * value.mean) for _, share, value in points]), key=lambda i: points[i][1])
    axes.plot([points[i][1] for i in best], [points[i][2].mean for i in best], color="#8a94a0", linewidth=1, label="Pareto front", zorder=0)
    _log(axes, [share for _, share, _ in points], lambda value: f"{100 * value:g}%")
    axes.set(xlabel="trained parameters among all", ylabel=f"{results.split} {_axis(results)}")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _rate(results: Results, settings: Sequence[Setting]) -> Figure | None:
    """The metric on validation against the learning rate: a panel a setting, the chosen rate filled."""
    series = []
    for setting in settings:
        judged = [one for one in setting.candidates if one.finished() and one.learning_rate]
        if judged:
            series.append((setting, judged))
    if not series or not any(RATE in row.overrides for row in results.rows):
        return None
    figure, panels = _panels([setting.label for setting, _ in series])
    rates = [one.learning_rate or 1.0 for _, judged in series for one in judged]
    for axes, (setting, judged) in zip(panels, series, strict=True):
        by_rate = sorted(judged, key=lambda one: one.learning_rate or 0.0)
        values = [_validation(one) for one in by_rate]
        for one in by_rate:
            own = [row.validation for row in one.finished()]
            axes.plot([one.learning_rate] * len(own), own, ".", color="#8a94a0", markersize=4)
        axes.plot([one.learning_rate for one in by_rate], [value.mean for value in values], color=COLORS[0], linewidth=1.2)
        for one, value in zip(by_rate, values, strict=True):
            face = COLORS[0] if one is setting.chosen else "white"
            axes.errorbar(one.learning_rate, value.mean, fmt="o", color=COLORS[0], markerfacecolor=face, markersize=5)
        _log(axes, rates, lambda value: f"{value:.0e}".replace("e-0", "e-"))
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(f"validation {_axis(results)}", fontsize=9)
    return figure


def _validation(candidate: Candidate) -> Interval:
    found = interval(row.validation for row in candidate.finished())
    assert found is not None
    return found


def _curves(settings: Sequence[Setting]) -> Figure | None:
    """The training loss of the chosen runs: the mean over seeds, and its 95% interval as a band."""
    series = [(setting, found) for setting in settings if (found := _band(setting))]
    if not series:
        return None
    figure, panels = _panels([setting.label for setting, _ in series])
    for axes, (_, points) in zip(panels, series, strict=True):
        steps, means = [step for step, _ in points], np.asarray([one.mean for _, one in points])
        halves = np.asarray([one.half or 0.0 for _, one in points])
        axes.fill_between(steps, means - halves, means + halves, color=COLORS[0], alpha=0.22, linewidth=0)
        axes.plot(steps, means, color=COLORS[0], linewidth=1.3)
    low, high = (edge([one.mean for _, points in series for _, one in points]) for edge in (min, max))
    panels[0].set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)  # a band of two seeds may be wide as the page
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    return figure


def _band(setting: Setting) -> list[tuple[float, Interval]]:
    """The training loss over bins of steps: their middle, and the mean over seeds."""
    assert setting.chosen is not None
    curves = [np.asarray(row.curves["loss"], np.float64) for row in setting.chosen.finished() if row.curves["loss"]]
    if not curves:
        return []
    last = max(curve[-1, 0] for curve in curves)
    count = int(min(_BINS, max(len(curve) for curve in curves)))
    edges = np.linspace(0, last, count + 1)
    points = []
    for low, high in itertools.pairwise(edges.tolist()):
        inside = [curve[(curve[:, 0] > low) & (curve[:, 0] <= high), 1] for curve in curves]
        if found := interval(float(values.mean()) for values in inside if len(values)):
            points.append(((low + high) / 2, found))
    return points


def _costs(settings: Sequence[Setting]) -> Figure | None:
    """Time and memory of a run, as bars; hatched where runs shared a program."""
    fields = (("seconds", "time of a run, min", 1 / 60), ("peak_memory_bytes", "peak memory, GiB", 2**-30))
    if not any(setting.mean(field) is not None for setting in settings for field, _, _ in fields):
        return None
    figure = Figure(figsize=(7.6, 0.8 + 0.24 * len(settings)), layout="constrained")
    places = range(len(settings))
    for axes, color, (field, title, unit) in zip(figure.subplots(1, 2, sharey=True), COLORS, fields, strict=False):
        values = [(setting.mean(field) or 0.0) * unit for setting in settings]
        bars = axes.barh(places, values, 0.7, color=color, edgecolor="white", linewidth=0)
        for bar, setting in zip(bars, settings, strict=True):
            if setting.is_shared:
                bar.set_hatch("///")
        axes.bar_label(bars, [f"{value:.3g}" if value else "unknown" for value in values], padding=3, fontsize=8)
        axes.set(xlabel=title, xlim=(0, max(values) * 1.2 or 1.0), ylim=(len(settings) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        axes.set_yticks(places, [_name(setting.label) for setting in settings])
    return figure


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Any]]:
    """A figure with a small panel for each title, on the same axes."""
    columns = min(_COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(max(1.9 * columns, 3.6), 0.5 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[len(titles) :]:
        axes.remove()
    for number, (axes, title) in enumerate(zip(grid, titles, strict=False)):
        axes.set_title(_folded(title), fontsize=8)
        axes.tick_params(labelbottom=number + columns >= len(titles), labelsize=7.5)
    return figure, grid[: len(titles)]


def _log(axes: Any, values: Sequence[float], label: Any) -> None:
    """A logarithmic axis over the values, a decade wide or more, with a label a decade, or more within few of them."""
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 3.0) if decades < 1.5 else (1.0,), numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _axis(results: Results) -> str:
    return f"{_name(results.metric.replace('_', ' '))} ({'lower' if results.mode == 'min' else 'higher'} is better)"


def _name(value: str) -> str:
    """A label: short, and with no formula in it."""
    short = value if len(value) <= _LONGEST_NAME else f"{value[: _LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")


def _folded(title: str) -> str:
    """A label in one or two lines as wide as a panel."""
    short = title if len(title) <= 2 * 24 else f"{title[:46]}…"
    if len(short) > 24:
        cut = short.rfind(" ", 8, 25)
        cut = cut if cut > 0 else 24
        short = f"{short[:cut].rstrip()}\n{short[cut:].strip()}"
    return short.replace("$", r"\$")
