"""Labels: each seeded fault is found with its place; a clean set yields none."""

import datasets
import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.sources import Rows
from jaxft.inspect.labels import judge, label_findings, suspicious_labels
from jaxft.inspect.texts import CLASSIFICATION, TAGGING, read_sets

NAMES = ("acne", "asthma", "migraine")
SIGNS = {"acne": "skin spots face", "asthma": "breath lungs cough", "migraine": "head light nausea"}


def clean(count, seed=0):
    """Texts that tell their label by its signs, among words that don't."""
    random = np.random.default_rng(seed)
    filler = [f"word{i}" for i in range(40)]
    return [
        {"text": " ".join([*random.choice(filler, 4), *random.choice(SIGNS[NAMES[i % 3]].split(), 2)]), "label": NAMES[i % 3]}
        for i in range(count)
    ]


def read(kind=CLASSIFICATION, **records):
    rows = {
        name: Rows(datasets.Dataset.from_list(found), f"{name}.jsonl", "line", np.arange(1, len(found) + 1))
        for name, found in records.items()
    }
    return read_sets(rows, DataConfig(), kind)


def found(kind=CLASSIFICATION, **records):
    sets = read(kind, **records)
    return {finding.kind: finding for finding in [*label_findings(sets), *suspicious_labels(sets[0])]}


def places(finding):
    return [spot.place for case in finding.cases for spot in case.spots]


def test_clean_sets_yield_nothing():
    assert found(train=clean(90), test=clean(30, seed=1)) == {}


def test_swapped_labels():
    records = clean(120)
    for i in (5, 40, 77):
        records[i]["label"] = NAMES[(i + 1) % 3]
    kinds = found(train=records)
    assert list(kinds) == ["suspicious_labels"]
    assert sorted(places(kinds["suspicious_labels"])) == ["train.jsonl, line 41", "train.jsonl, line 6", "train.jsonl, line 78"]
    notes = {case.spots[0].place: case.note for case in kinds["suspicious_labels"].cases}
    assert notes["train.jsonl, line 6"].startswith("given acne (")
    assert "rather migraine (" in notes["train.jsonl, line 6"]
    assert "agrees with 9" in kinds["suspicious_labels"].advice


def test_a_baseline_that_is_no_better_than_chance_judges_nothing():
    records = clean(300)
    labels = list(np.random.default_rng(3).permutation([one["label"] for one in records]))
    judgement = judge([one["text"] for one in records], labels)
    assert not judgement.is_able
    assert judgement.suspicions == ()


def test_labels_are_drawn_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr("jaxft.inspect.labels._MOST_ROWS", 60)
    records = clean(120)
    assert judge([one["text"] for one in records], [one["label"] for one in records]).rows == 60


@pytest.mark.parametrize("labels", [["a"] * 20, [str(i) for i in range(20)]])
def test_one_label_or_all_different_are_not_judged(labels):
    assert judge([f"text {i}" for i in range(20)], labels) is None


def test_an_unbalanced_label():
    records = [one for i, one in enumerate(clean(300)) if one["label"] != "acne" or i % 30 == 0]
    kinds = found(train=records)
    assert list(kinds) == ["balance"]
    assert kinds["balance"].title == "'label' is unbalanced: 'asthma' 47.6%, 'acne' 4.8% of 210 rows"
    assert places(kinds["balance"]) == ["train.jsonl, line 1"]


def test_one_label_everywhere():
    assert found(train=[dict(one, label="acne") for one in clean(30)])["balance"].title == "'label' is 'acne' in every row"


def test_a_rare_label_and_one_that_train_lacks():
    train = [*clean(90), {"text": "itch all over the arm", "label": "eczema"}]
    test = [*clean(30, seed=1), {"text": "a pain in the back", "label": "sciatica"}]
    kinds = found(train=train, test=test)
    assert places(kinds["rare_labels"]) == ["train.jsonl, line 91"]
    assert kinds["unseen_labels"].title == "1 row of test has a 'label' that train lacks"
    assert places(kinds["unseen_labels"]) == ["test.jsonl, line 31"]


def test_spellings_placeholders_and_cut_labels():
    records = [dict(one, label=one["label"].title()) for one in clean(120)]
    for i, label in ((3, "acne"), (4, "N/A"), (5, "igraine (with aura")):
        records[i]["label"] = label
    kinds = found(train=records)
    assert places(kinds["spellings"]) == ["train.jsonl, line 1", "train.jsonl, line 4"]
    assert kinds["spellings"].cases[0].note == "'Acne', 'acne'"
    assert places(kinds["placeholders"]) == ["train.jsonl, line 5"]
    assert "'igraine (with aura'" in kinds["cut_labels"].title


def test_tags_are_counted_by_token_and_those_outside_are_no_fault():
    tags = (["O"] * 8 + ["B-PER", "I-PER"], ["O"] * 8 + ["B-LOC", "I-LOC"])
    records = [{"tokens": [f"t{i}{j}" for j in range(10)], "tags": tags[i % 2]} for i in range(60)]
    assert found(TAGGING, train=records) == {}
    records[0]["tags"] = ["O"] * 9 + ["B-MISC"]
    kinds = found(TAGGING, train=records)
    assert kinds["rare_labels"].title == "1 of 6 values of 'tags' have fewer than 5 tokens in train (1 token in all)"
    assert "balance" in kinds
