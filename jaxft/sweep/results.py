"""What came of a sweep's runs: their folders as rows, and rows as settings with the rate that validation chose.

A setting is what a row of the report is, as a method. What else its runs differ in is tuned, as the learning rate; the values of it with
one seed each are a candidate. The candidate is chosen on validation, figures are of the evaluation after training, of the test set.
"""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError

RATE, SEED = "optimizer.learning_rate", "train.seed"
DONE = "done"
CONFIDENCE = 0.95
_CLASS = "class"  # of a method as JSON
_TITLES = {"dora": "DoRA", "rslora": "rsLoRA"}  # of a LoRA with such a field


@dataclasses.dataclass(frozen=True)
class Row:
    """One run. What isn't known, or isn't finite, is None."""

    id: str
    overrides: Mapping[str, Any]
    setting: str  # label of the setting
    tuned: str  # label of what is tuned
    method: str
    learning_rate: float | None
    seed: int | None
    state: str  # waiting, running, done, failed, pruned
    attempts: int
    error: str | None
    shared: bool  # whether it trained in one program with others
    validation: float | None  # best value of the metric
    before: Mapping[str, float]  # metrics before training
    after: Mapping[str, float]  # and of the best checkpoint
    trainable_parameters: int | None
    total_parameters: int | None
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    seconds: float | None  # of a member of a population: its share
    compile_seconds: float | None
    export_bytes: int | None
    forgetting: float | None  # loss on general text, after less before
    curves: Mapping[str, Sequence[tuple[int, float]]]  # training loss and validation's metric, by step

    @property
    def share(self) -> float | None:
        """Trained parameters among all."""
        return self.trainable_parameters / self.total_parameters if self.trainable_parameters and self.total_parameters else None


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95% interval: None of one seed."""

    mean: float
    half: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The runs of a setting that differ in their seed alone."""

    tuned: str
    learning_rate: float | None
    rows: tuple[Row, ...]

    def finished(self) -> list[Row]:
        """Returns the runs that validation can judge."""
        return [row for row in self.rows if row.state == DONE and row.validation is not None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the report: its candidates, and the one that validation chose, or None where no run is done."""

    label: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    @property
    def rows(self) -> list[Row]:
        """All runs."""
        return [row for candidate in self.candidates for row in candidate.rows]

    def figure(self, name: str) -> Interval | None:
        """Returns a metric of the chosen runs after training."""
        return interval(row.after.get(name) for row in self.chosen.finished()) if self.chosen else None

    def difference(self, other: "Setting", name: str) -> Interval | None:
        """Returns how far a metric of the chosen runs is above another setting's, seed by seed, over the seeds that both have.

        A seed draws the split and the order of the rows too: what it adds to both falls out.
        """
        ours, theirs = self._by_seed(name), other._by_seed(name)
        return interval(ours[seed] - theirs[seed] for seed in ours if seed in theirs)

    def _by_seed(self, name: str) -> dict[int | None, float]:
        return {row.seed: row.after[name] for row in self.chosen.finished() if name in row.after} if self.chosen else {}

    def mean(self, field: str) -> float | None:
        """Returns the mean of a field over the chosen runs."""
        found = interval(getattr(row, field) for row in self.chosen.finished()) if self.chosen else None
        return found.mean if found else None

    @property
    def is_shared(self) -> bool:
        """Whether a chosen run was a member of a population."""
        return any(row.shared for row in self.chosen.finished()) if self.chosen else False


@dataclasses.dataclass(frozen=True)
class Results:
    """A sweep's."""

    experiment: str
    metric: str
    mode: str  # min or max
    split: str  # that figures are of
    vary: tuple[str, ...]
    config: Mapping[str, Any]
    versions: tuple[Mapping[str, str], ...]  # different ones among the runs
    devices: tuple[Mapping[str, Any], ...]
    workers: int  # runs, or populations, at a time
    rows: tuple[Row, ...]
    left_out: int = 0  # runs of the sweep that --sweep.filter or --sweep.limit left out so far

    @property
    def sign(self) -> int:
        """What makes more of the metric worse."""
        return 1 if self.mode == "min" else -1

    def settings(self) -> list[Setting]:
        """Returns the settings in the order of their first run."""
        found: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            found.setdefault(row.setting, {}).setdefault(row.tuned, []).append(row)
        settings = []
        for label, by_tuned in found.items():
            candidates = tuple(Candidate(tuned, rows[0].learning_rate, tuple(rows)) for tuned, rows in by_tuned.items())
            settings.append(Setting(label, candidates, choose(candidates, self.sign)))
        return settings

    def first(self) -> Setting | None:
        """Returns the setting that the others are compared with: the first one of which runs are done."""
        return next((setting for setting in self.settings() if setting.chosen), None)


def interval(values: Iterable[float | None]) -> Interval | None:
    """Returns the mean with its 95% interval by Student's t distribution; None of no value.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.484..., count=3)
    >>> interval([1.0, None])
    Interval(mean=1.0, half=None, count=1)
    """
    from scipy.special import stdtrit  # takes a while to import, which no launch shall wait for

    known = np.asarray([value for value in values if value is not None and math.isfinite(value)], np.float64)
    if not len(known):
        return None
    count, half = len(known), None
    if count > 1:
        half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * known.std(ddof=1) / math.sqrt(count))
    return Interval(float(known.mean()), half, count)


def choose(candidates: Sequence[Candidate], sign: int) -> Candidate | None:
    """Returns the candidate with the best mean on validation among those with the most finished seeds; of a tie, the lowest rate.

    A rate with fewer seeds is no candidate: some of its runs failed, or aren't done yet.
    """
    most = max((len(candidate.finished()) for candidate in candidates), default=0)
    if not most:
        return None

    def order(candidate: Candidate) -> tuple[float, float]:
        values = [row.validation for row in candidate.finished() if row.validation is not None]
        return sign * math.fsum(values) / len(values), math.inf if candidate.learning_rate is None else candidate.learning_rate

    return min((candidate for candidate in candidates if len(candidate.finished()) == most), key=order)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the numbers of the (cost, loss) points that no other one is better than in one and no worse than in the other.

    >>> front([(1, 3), (2, 2), (2, 4), (3, 2)])
    [0, 1]
    """
    return [
        i
        for i, (cost, loss) in enumerate(points)
        if not any(c <= cost and other <= loss and (c, other) != (cost, loss) for c, other in points)
    ]


# ---------------------------------------------------------------- from folders


def gather(folder: pathlib.Path) -> Results:
    """Returns what a sweep's folder holds, of a sweep half done as well.

    Raises:
        UserError: the folder holds no sweep.
    """
    sweep = _read(folder / "sweep.json")
    if not isinstance(sweep, dict):
        raise UserError(f"{folder} holds no sweep of jaxft: there is no sweep.json that can be read. Name a sweep's folder by --workdir.")
    runs, config = _asked(folder, sweep["runs"]), sweep["config"]
    changed = {path: None for run in runs for path in run["overrides"]}
    vary = tuple(sweep.get("vary") or _varied(changed, sweep))
    configs = [_read(folder / "runs" / run["id"] / "config.json") or {} for run in runs]
    summaries = [_read(folder / "runs" / run["id"] / "summary.json") or {} for run in runs]
    labels = _labels([_values(run["overrides"], vary, config) for run in runs], _values({}, vary, config))
    paths = [path for path in changed if path not in vary and path != SEED]
    tuned = _tuned_labels([_values(run["overrides"], paths, config) for run in runs])
    of = zip(runs, summaries, zip(labels, tuned, strict=True), strict=True)
    rows = [_row(folder / "runs", run, summary, both, sweep) for run, summary, both in of]
    return Results(
        sweep["experiment"],
        sweep["metric"],
        sweep["mode"],
        _value({}, "eval.split", config) or "test",
        vary,
        config,
        _different([sweep.get("versions"), *(one.get("versions") for one in configs)]),
        _different([sweep.get("device"), *(one.get("device") for one in configs)]),
        sweep.get("workers", 1),
        tuple(rows),
        len(sweep["runs"]) - len(rows),
    )


def _asked(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that the newest start of the sweep is about, and those that an earlier one has begun."""
    jobs = (_read(folder / "queue.json") or {}).get("jobs")
    asked = {run for job in jobs for run in job} if jobs else {run["id"] for run in runs}
    return [run for run in runs if run["id"] in asked or (folder / "runs" / f"{run['id']}.json").exists()]


def _varied(changed: Iterable[str], sweep: Mapping[str, Any]) -> list[str]:
    """What makes a row where the sweep doesn't say: all but seeds and the optimizer's; of a search nothing, which tunes all it draws."""
    return [] if sweep.get("search") else [path for path in changed if path != SEED and not path.startswith("optimizer.")]


def _row(
    folder: pathlib.Path, run: Mapping[str, Any], summary: Mapping[str, Any], labels: tuple[str, str], sweep: Mapping[str, Any]
) -> Row:
    state, overrides = _read(folder / f"{run['id']}.json") or {}, run["overrides"]
    measured = summary.get("eval", {})
    before, after = (_finite(measured.get(name, {})) for name in ("before", "after"))
    validation = f"validation_{sweep['metric']}"
    curves = _curves(folder / run["id"] / "metrics.jsonl", ("loss", validation))
    best = (min if sweep["mode"] == "min" else max)((value for _, value in curves[validation]), default=None)
    error = state.get("error")
    if state.get("state") == DONE and not summary:
        error = "Its folder holds no summary.json that can be read."
    forgotten = after["general_loss"] - before["general_loss"] if "general_loss" in before and "general_loss" in after else None
    method = _value(overrides, "method", sweep["config"])
    return Row(
        id=run["id"],
        overrides=overrides,
        setting=labels[0],
        tuned=labels[1],
        method=summary.get("method") or (method.get(_CLASS, "") if isinstance(method, dict) else str(method)),
        learning_rate=_value(overrides, RATE, sweep["config"]),
        seed=_value(overrides, SEED, sweep["config"]),
        state=state.get("state", "waiting"),
        attempts=state.get("attempts", 0),
        error=error,
        shared=state.get("shared", False),
        validation=best,
        before=before,
        after=after,
        trainable_parameters=summary.get("trainable_parameters"),
        total_parameters=summary.get("total_parameters"),
        peak_memory_bytes=summary.get("peak_memory_bytes"),
        tokens_per_second=summary.get("tokens_per_second"),
        seconds=summary.get("seconds"),
        compile_seconds=summary.get("compile_seconds"),
        export_bytes=_size(folder / run["id"] / "export"),
        forgetting=forgotten,
        curves=curves,
    )


def _curves(path: pathlib.Path, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Some series of a run; of a step that was run again, its last value."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for line in _lines(path):
        for name in names:
            if isinstance(value := line.get(name), int | float) and math.isfinite(value):
                found[name][line["step"]] = float(value)
    return {name: sorted(series.items()) for name, series in found.items()}


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # a line that is being written
            continue


def _read(path: pathlib.Path) -> Any:
    """What a file of JSON holds, or None where there is none that can be read: a report tells of a damaged run too."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _size(folder: pathlib.Path) -> int | None:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _finite(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


def _different(found: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(json.loads(text) for text in dict.fromkeys(json.dumps(one, sort_keys=True) for one in found if one))


# ---------------------------------------------------------------- labels


def _value(overrides: Mapping[str, Any], path: str, config: Any) -> Any:
    """The value at a path: a run's own, or that in what the run sets above it, or the base's."""
    names = path.split(".")
    for count in range(len(names), -1, -1):
        above = ".".join(names[:count])
        if above in overrides or not count:
            found = overrides[above] if count else config
            for name in names[count:]:
                found = found.get(name) if isinstance(found, dict) else None
            return found
    return None


def _values(overrides: Mapping[str, Any], paths: Sequence[str], config: Any) -> dict[str, Any]:
    return {path: _value(overrides, path, config) for path in paths}


def _labels(values: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[str]:
    """A label for each run's values: what differs among the runs and from the base, as short as it tells them apart."""
    kinds = [{path: _title(value) if _is_method(value) else None for path, value in one.items()} for one in values]
    keys = [json.dumps(one, sort_keys=True) for one in values]
    labels = []
    for one, kind in zip(values, kinds, strict=True):
        parts, varied = [], [path for path in one if any(other[path] != one[path] for other in values)]
        for path, value in one.items():
            others = [other[path] for other, its in zip(values, kinds, strict=True) if its[path] == kind[path]]
            if kind[path] is not None:
                parts.append(" ".join([_title(value), *_fields(value, others)]))
            elif path in varied and (value != base.get(path) or path.startswith("method.")):
                parts.append(_plain(path, value))
        labels.append(", ".join(filter(None, parts)) or ", ".join(_plain(path, one[path]) for path in varied[:1]) or "all")
    by_label: dict[str, list[str]] = {}  # settings of one label, which get a number
    for label, key in zip(labels, keys, strict=True):
        by_label.setdefault(label, []).append(key)
    numbers = {label: list(dict.fromkeys(own)) for label, own in by_label.items()}
    return [f"{one} ({i + 1})" if (i := numbers[one].index(key)) else one for one, key in zip(labels, keys, strict=True)]


def _is_method(value: Any) -> bool:
    return isinstance(value, dict) and _CLASS in value


def _title(value: Mapping[str, Any]) -> str:
    """The class of a method, or those of a sum's parts; of a LoRA the name that its paper has.

    >>> _title({"class": "Compose", "methods": [{"class": "LoRA", "dora": True}, {"class": "BitFit"}]})
    'DoRA + BitFit'
    """
    if "methods" in value:
        return " + ".join(map(_title, value["methods"]))
    return next((title for field, title in _TITLES.items() if value.get(field) is True), str(value[_CLASS]))


def _fields(value: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of a method that others of its class have other values of."""
    own_fields = ((name, own) for name, own in value.items() if name != "methods")
    return [text for name, own in own_fields if any(other.get(name) != own for other in others) and (text := _named(name, own))]


def _named(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name.replace("_", " ") if value else ""
    if isinstance(value, list):
        value = "+".join(map(str, value)) or "none"
    return f"{name.replace('_', ' ')} {_short(value)}"


def _plain(path: str, value: Any) -> str:
    """The value at a path that holds no method.

    >>> _plain("model.quantization", "nf4"), _plain("model.double_quantization", False), _plain("model.block_size", 256)
    ('nf4', 'no double quantization', 'block size 256')
    """
    name = path.rpartition(".")[2].replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return value if isinstance(value, str) and value not in ("", "none") else _named(name, value)


def _tuned_labels(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for what of each run is tuned: with all digits where two values would read alike."""

    def label(own: Mapping[str, Any], text: Callable[[Any], str]) -> str:
        return ", ".join(text(value) if path == RATE else f"{path.rpartition('.')[2]} {text(value)}" for path, value in own.items())

    short, whole = ([label(own, text) for own in values] for text in (_short, _whole))
    alike: dict[str, set[str]] = {}
    for one, other in zip(short, whole, strict=True):
        alike.setdefault(one, set()).add(other)
    return [one if len(alike[one]) == 1 else other for one, other in zip(short, whole, strict=True)]


def _whole(value: Any) -> str:
    """A value with all its digits, a whole number as any other."""
    return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- to files


def write(folder: pathlib.Path, results: Results) -> None:
    """Writes results.json, with the choice of each setting, and results.parquet, a row a run without its curves."""
    import pyarrow
    import pyarrow.parquet

    every, first = results.settings(), results.first()
    settings = [
        {
            "setting": setting.label,
            "chosen": setting.chosen and setting.chosen.tuned,
            "runs": [row.id for row in setting.chosen.finished()] if setting.chosen else [],
            "tuned": len(setting.candidates),
            "figure": (found := setting.figure(results.metric)) and dataclasses.asdict(found),
            "difference": (apart := first and setting.difference(first, results.metric)) and dataclasses.asdict(apart),
        }
        for setting in every
    ]
    replace(folder / "results.json", json.dumps(dataclasses.asdict(results) | {"settings": settings}, indent=1) + "\n")
    rows = [_flat(row) for row in results.rows]
    columns = dict.fromkeys(name for row in rows for name in row)  # a run that failed has no metrics
    table, content = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    replace(folder / "results.parquet", content.getvalue())


def _flat(row: Row) -> dict[str, Any]:
    """A row of plain values."""
    found = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    metrics = {f"{when}_{name}": value for when in ("before", "after") for name, value in found.pop(when).items()}
    del found["curves"]
    return found | {"overrides": json.dumps(found["overrides"])} | metrics


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes beside the place and renames; raises `UserError` where the disk refuses."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}). Make room, or choose another --workdir.") from error
