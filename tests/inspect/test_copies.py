"""Copies: what was put in is found, with its place; what wasn't there isn't."""

import datasets
import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.sources import Rows
from jaxft.inspect.copies import copies, equal_texts, near_texts
from jaxft.inspect.texts import read_sets

WORDS = [f"word{i}" for i in range(40)]


def sentence(random, length=25):
    return " ".join(random.choice(WORDS, length))


def clean(count, seed):
    """Rows of random words that share nothing, of three ratings."""
    random = np.random.default_rng(seed)
    return [{"text": sentence(random), "rating": ("good", "bad", "fair")[i % 3]} for i in range(count)]


def read(**records):
    config = DataConfig(prompt="Review: {text}", completion="{rating}")
    rows = {
        name: Rows(datasets.Dataset.from_list(found), f"{name}.jsonl", "line", np.arange(1, len(found) + 1))
        for name, found in records.items()
    }
    return read_sets(rows, config)


def found(**records):
    sets = read(**records)
    return {finding.kind: finding for finding in copies(sets, equal_texts(sets), 10_000, seed=0)}


def places(finding):
    return [[spot.place for spot in case.spots] for case in finding.cases]


@pytest.fixture
def train():
    return clean(60, seed=0)


@pytest.fixture
def test():
    return clean(30, seed=1)


def test_clean_sets_have_no_copies(train, test):
    assert found(train=train, test=test) == {}


def test_exact_duplicates(train, test):
    train += [dict(train[4], text=f" {train[4]['text'].upper()}\n"), train[9]]
    kinds = found(train=train, test=test)
    assert list(kinds) == ["duplicates"]
    assert kinds["duplicates"].title == "2 rows of train repeat an earlier row of the same set"
    assert places(kinds["duplicates"]) == [
        ["train.jsonl, line 5", "train.jsonl, line 61"],
        ["train.jsonl, line 10", "train.jsonl, line 62"],
    ]


def test_near_duplicates(train, test):
    words = train[7]["text"].split()
    train.append(dict(train[7], text=" ".join([*words[:-1], "otherwise"])))
    kinds = found(train=train, test=test)
    assert list(kinds) == ["near_duplicates"]
    assert places(kinds["near_duplicates"]) == [["train.jsonl, line 8", "train.jsonl, line 61"]]
    assert "% of their runs of 3 words are shared" in kinds["near_duplicates"].cases[0].note


def test_rows_in_train_and_test(train, test):
    test.append(train[3])
    test.append(dict(train[20], text=f"Well, {train[20]['text']}"))
    kinds = found(train=train, test=test)
    assert list(kinds) == ["leak"]
    assert kinds["leak"].title == "2 of the 32 rows of test stand in train too, word for word or nearly"
    assert places(kinds["leak"]) == [["test.jsonl, line 31", "train.jsonl, line 4"], ["test.jsonl, line 32", "train.jsonl, line 21"]]


def test_a_row_that_is_equal_to_one_and_near_to_another_is_told_once(train, test):
    train.append(dict(train[3], text=f"Well, {train[3]['text']}"))
    test.append(train[3])
    assert places(found(train=train, test=test)["leak"]) == [["test.jsonl, line 31", "train.jsonl, line 4"]]


def test_equal_texts_with_different_answers(train, test):
    train.append(dict(train[0], rating="bad"))
    kinds = found(train=train, test=test)
    assert list(kinds) == ["conflict"]
    assert places(kinds["conflict"]) == [["train.jsonl, line 1", "train.jsonl, line 61"]]
    assert kinds["conflict"].cases[0].note == "rating: good, bad"


def test_nearly_equal_texts_with_different_labels(train, test):
    train.append({"text": f"Well, {train[0]['text']}", "rating": "bad"})
    kinds = found(train=train, test=test)
    assert list(kinds) == ["near_conflict", "near_duplicates"]
    assert kinds["near_conflict"].cases[0].note.startswith("rating: good, bad; ")


def test_the_search_finds_the_pairs_that_comparing_all_finds():
    random = np.random.default_rng(2)
    records = clean(120, seed=3)
    for i in range(40):
        words = records[i]["text"].split()
        for place in random.choice(len(words), i % 4, replace=False):
            words[place] = f"new{place}"
        records.append({"text": " ".join(words), "rating": "good"})
    sets = read(train=records)

    def shingles(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    # The format's own words, "Review:", are part of a text.
    each = [shingles(f"review {one['text']}") for one in records]
    expected = {
        (i, j) for i in range(len(each)) for j in range(i + 1, len(each)) if 0.7 <= len(each[i] & each[j]) / len(each[i] | each[j]) < 1
    }
    groups = near_texts(equal_texts(sets), sets, 10_000, seed=0)
    linked = {tuple(i for _, i in group.rows) for group in groups}
    assert len(expected) > 10
    assert linked == expected


def test_thousands_of_copies_of_one_form_are_one_group_in_time_by_their_number():
    form = " ".join(f"word{i}" for i in range(60))
    sets = read(train=[{"text": f"{form} {i}", "rating": "good"} for i in range(3000)])
    [group] = near_texts(equal_texts(sets), sets, 10_000, seed=0)
    assert len(group.rows) == 3000


def test_of_more_texts_than_given_so_many_are_searched(train):
    sets = read(train=[*train, *(dict(one, text=f"Well, {one['text']}") for one in train)])
    groups = equal_texts(sets)
    assert len(near_texts(groups, sets, len(groups), seed=0)) == 60
    assert 0 < len(near_texts(groups, sets, 60, seed=0)) < 30


def test_scripts_without_spaces():
    texts = [
        "患者さんは一週間この薬を飲んで気分がとても良くなりました",
        "患者さんは一週間この薬を飲んで気分がとても悪くなりました",
        "頭が痛いので今日は早く寝ます",
    ]
    sets = read(train=[{"text": text, "rating": "good"} for text in texts])
    assert [group.rows for group in near_texts(equal_texts(sets), sets, 100, seed=0)] == [((0, 0), (0, 1))]
