"""The report of a sweep: report.md, and one page of HTML with its pictures in it; results.json and results.parquet beside them."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

from jaxft.sweep import results as found
from jaxft.sweep.results import DONE, RATE, Results, Setting

_TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")
_CAPTIONS = {
    "share": "Quality against trained share. Bars are 95% intervals over seeds; no other method is better than one on the front with as "
    "few trained parameters.",
    "rate": "Quality on validation against learning rate, each method by itself. Grey: one run; the filled rate was chosen.",
    "curves": "Training loss at the chosen rate. Band: 95% interval over seeds.",
    "costs": "Time and peak memory of a run at the chosen rate. Hatched: members of a population.",
}
_MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(folder: pathlib.Path) -> Results:
    """Writes the results, the pictures and the report of a sweep, which may be half done, and returns the results.

    Raises:
        UserError: the folder holds no sweep, or can't be written.
    """
    from jaxft.sweep import pictures  # matplotlib takes half a second to import

    results = found.gather(folder)
    found.write(folder, results)
    drawn = {}
    for name, figure in pictures.draw(results).items():
        drawn[name] = pictures.svg(figure)
        found.replace(folder / "pictures" / f"{name}.svg", drawn[name])
        found.replace(folder / "pictures" / f"{name}.png", pictures.png(figure))
    found.replace(folder / "report.md", markdown(results, list(drawn)))
    found.replace(folder / "report.html", page(results, drawn))
    return results


def markdown(results: Results, drawn: Sequence[str]) -> str:
    """Returns the report as Markdown.

    Args:
      results: of the sweep.
      drawn: names of the pictures beside it.
    """
    parts = [f"# {_cell(results.experiment)}: the sweep", standing(results), *notes(results), "## Methods", _markdown(methods(results))]
    for name in drawn:
        parts += [f"![{_CAPTIONS[name]}](pictures/{name}.png)", _CAPTIONS[name]]
    parts += ["## Tuning", _markdown(tuning(results))]
    if unfinished(results).rows:
        parts += ["## Not done", _markdown(unfinished(results))]
    parts += ["## Made with", _markdown(made_with(results))]
    return "\n\n".join(parts) + "\n"


def page(results: Results, drawn: Mapping[str, str]) -> str:
    """Returns the report as one page.

    Args:
      results: of the sweep.
      drawn: the pictures as SVG, by name.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        standing=standing(results),
        notes=notes(results),
        methods=methods(results),
        tuning=tuning(results),
        unfinished=unfinished(results),
        made_with=made_with(results),
        pictures={name: markupsafe.Markup(text) for name, text in drawn.items()},  # made by matplotlib, which escapes names
        captions=_CAPTIONS,
        settings=json.dumps(results.config, indent=1),
    )


# ---------------------------------------------------------------- what it says


def standing(results: Results) -> str:
    """Returns how far the sweep is, in a sentence."""
    counts = dict.fromkeys((row.state for row in sorted(results.rows, key=lambda row: row.state != DONE)), 0)
    for row in results.rows:
        counts[row.state] += 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    half = " This is a report on the way: figures may change." if {"waiting", "running"} & set(counts) else ""
    others = f" {results.left_out} other{'' if results.left_out == 1 else 's'} of the sweep weren't asked for." if results.left_out else ""
    return f"{len(results.rows)} run{'' if len(results.rows) == 1 else 's'}: {states or 'none'}.{others}{half}"


def notes(results: Results) -> list[str]:
    """Returns how the figures came about, a sentence or two each."""
    direction = "lower" if results.mode == "min" else "higher"
    said = [
        f"What is tuned was chosen by {results.metric} on validation ({direction} is better), as the mean over seeds; of a tie, the lower "
        f"learning rate. A rate of which fewer seeds are done than of another is no candidate. Figures are of the {results.split} "
        "set" + (", which chose nothing." if results.split == "test" else ", as eval.split says: they may flatter the chosen rate.")
    ]
    counts = {figure.count for setting in results.settings() if (figure := setting.figure(results.metric))}
    if counts - {1}:
        said.append("± is half the 95% interval of the mean over seeds, by Student's t distribution.")
    if 1 in counts:
        said.append("A figure of one seed has no interval: how much of it is chance is unknown.")
    if len(counts) > 1:
        said.append("Methods have different numbers of finished seeds.")
    if first := _compared_with(results):
        said.append(
            f"Differences are from {first.label}, which stands first in the sweep, between runs of one seed and so of the "
            "same rows: their mean and half its 95% interval, not corrected for the number of comparisons. An interval without 0 may be "
            "more than chance."
        )
    if (most := min(results.workers, len(results.rows))) > 1:
        said.append(f"Up to {most} runs went at a time: times and tokens/s are theirs beside each other, not of a run alone.")
    if not _is_forgetting_known(results):
        said.append("Forgetting, how far the loss on general text rises, wasn't measured: config.eval.general names such a text, for SFT.")
    if any(row.shared for row in results.rows):
        said.append(
            "† Its runs trained in one program with others, as a population: time is a run's share of the program's, peak memory the whole "
            "program's. Don't compare them with those of runs that trained alone."
        )
    return said


def methods(results: Results) -> Table:
    """Returns a row for each setting, the best first; those without a figure last, in their order."""
    columns = ["method", _tuned_title(results), f"{results.split} {results.metric.replace('_', ' ')}"]
    first = _compared_with(results)
    columns += [*([f"less {first.label}'s"] if first else []), "seeds", "trained", "share"]
    columns += ["peak memory", "tokens/s", "time", "on disk", *(["forgetting"] if _is_forgetting_known(results) else []), "runs tuned"]
    figures = {setting.label: setting.figure(results.metric) for setting in results.settings()}

    def order(setting: Setting) -> tuple[bool, float]:
        figure = figures[setting.label]
        return figure is None, 0.0 if figure is None else results.sign * figure.mean

    return Table(columns, [_method(results, first, setting) for setting in sorted(results.settings(), key=order)])


def _method(results: Results, first: Setting | None, setting: Setting) -> list[str]:
    figure, mark = setting.figure(results.metric), " †" if setting.is_shared else ""
    forgetting = found.interval(row.forgetting for row in setting.chosen.finished()) if setting.chosen else None
    seconds, memory, disk = (setting.mean(field) for field in ("seconds", "peak_memory_bytes", "export_bytes"))
    trained, share, rate = (setting.mean(field) for field in ("trainable_parameters", "share", "tokens_per_second"))
    return [
        setting.label,
        setting.chosen.tuned if setting.chosen else _MISSING,
        _interval(figure),
        *([_difference(results, first, setting)] if first else []),
        str(figure.count) if figure else "0",
        _MISSING if trained is None else f"{trained:,.0f}",
        _MISSING if share is None else f"{share:.3%}",
        _MISSING if memory is None else _bytes(memory) + mark,
        _MISSING if rate is None else f"{rate:,.0f}",
        _MISSING if seconds is None else _time(seconds) + mark,
        _MISSING if disk is None else _bytes(disk),
        *([_interval(forgetting, signed=True)] if _is_forgetting_known(results) else []),
        f"{sum(row.state == DONE for row in setting.rows)} of {len(setting.rows)}",
    ]


def _difference(results: Results, first: Setting, setting: Setting) -> str:
    return _MISSING if setting.label == first.label else _interval(setting.difference(first, results.metric), signed=True)


def _compared_with(results: Results) -> Setting | None:
    """The setting that the others are compared with, where one of them has several seeds in common with it."""
    if (first := results.first()) is None:
        return None
    others = (setting for setting in results.settings() if setting.label != first.label)
    known = any((apart := one.difference(first, results.metric)) is not None and apart.count > 1 for one in others)
    return first if known else None


def _is_forgetting_known(results: Results) -> bool:
    return any(row.forgetting is not None for row in results.rows)


def tuning(results: Results) -> Table:
    """Returns a row for each candidate of each setting."""
    rows = []
    for setting in results.settings():
        for one in setting.candidates:
            done = one.finished()
            failed = sum(row.state == "failed" for row in one.rows)
            seeds = ", ".join(str(row.seed) for row in done)
            value = _interval(found.interval(row.validation for row in done))
            rows.append([setting.label, one.tuned, value, seeds or _MISSING, str(failed or ""), "chosen" if one is setting.chosen else ""])
    return Table(["method", _tuned_title(results), f"validation {results.metric.replace('_', ' ')}", "seeds done", "failed", ""], rows)


def unfinished(results: Results) -> Table:
    """Returns a row for each run that isn't done, or has no figure, with the reason."""
    rows = []
    for row in results.rows:
        if row.state != DONE:
            rows.append([row.id, row.state, str(row.attempts), row.error or _MISSING])
        elif row.error or row.validation is None or results.metric not in row.after:
            reason = row.error or f"It has no finite {results.metric} on validation, or none after training."
            rows.append([row.id, "done, no figure", str(row.attempts), reason])
    return Table(["run", "state", "attempts", "why"], rows)


def made_with(results: Results) -> Table:
    """Returns versions, hardware and seeds."""
    seeds = sorted({row.seed for row in results.rows if row.seed is not None})
    rows = [["seeds", ", ".join(map(str, seeds))], ["runs at a time", str(results.workers)]]
    rows += [["hardware", ", ".join(f"{name} {value}" for name, value in one.items())] for one in results.devices]
    rows += [["versions", ", ".join(f"{name} {value}" for name, value in one.items())] for one in results.versions]
    model, data = results.config.get("model", {}), results.config.get("data", {})
    rows += [["model", str(model.get("source", _MISSING))], ["data", str(data.get("train", _MISSING))]]
    return Table(["", ""], rows)


def _tuned_title(results: Results) -> str:
    paths = {path for row in results.rows for path in row.overrides if path not in results.vary and path != found.SEED}
    return "learning rate" if paths <= {RATE} else "tuned"


def _interval(value: found.Interval | None, signed: bool = False) -> str:
    if value is None:
        return _MISSING
    mean = f"{value.mean:+.4f}" if signed else f"{value.mean:.4f}"
    return mean if value.half is None else f"{mean} ± {value.half:.4f}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _markdown(table: Table) -> str:
    lines = [table.columns, [":--" if number < 1 else "--:" for number in range(len(table.columns))], *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A text that ends no cell and starts no tag."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
