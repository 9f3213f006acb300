"""The whole look: faults put into files are found with their line; text, JSON and page say them; no weights are read."""

import dataclasses
import html.parser
import json
import re
import time
import types

import numpy as np
import pytest
import transformers

from jaxft import overrides
from jaxft.config import DataConfig, Experiment, ModelConfig
from jaxft.data.sources import load_splits
from jaxft.data.tokenize import tokenize
from jaxft.errors import UserError
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.inspect.look import look, look_quickly
from jaxft.inspect.page import page
from jaxft.inspect.report import as_json, say
from jaxft.inspect.shown import CUT, GIVEN, SCORED, pieces
from jaxft.methods import LoRA
from jaxft.models.heads import SINGLE_LABEL
from jaxft.tasks import SFT, MultipleChoice, QuestionAnswering, SequenceClassification, TokenClassification
from jaxft.train import run
from jaxft.train.workdir import check_workdir

SIGNS = {"Acne": "skin spots face", "Asthma": "breath lungs cough", "Migraine": "head light nausea"}
NAMES = tuple(SIGNS)
MODEL = "bundled:smollm2-135m-instruct"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def clean(count, seed):
    random = np.random.default_rng(seed)
    filler = [f"word{i}" for i in range(40)]
    return [
        {"text": " ".join([*random.choice(filler, 12), *random.choice(SIGNS[NAMES[i % 3]].split(), 2)]), "condition": NAMES[i % 3]}
        for i in range(count)
    ]


def experiment(folder, train, test, **data):
    for name, records in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    config = DataConfig(
        train=str(folder / "train.jsonl"),
        test=str(folder / "test.jsonl"),
        split=(1.0, 0.0, 0.0),
        prompt="Review: {text}",
        completion="Condition: {condition}",
        max_length=128,
    )
    return Experiment("lora_llama2", ModelConfig(MODEL), dataclasses.replace(config, **data), LoRA(), SFT())


def places(finding):
    return [[spot.place.split("/")[-1] for spot in case.spots] for case in finding.cases]


def seeded():
    """Sets with one fault of each kind, and where: kind -> places."""
    train, test = clean(240, seed=0), clean(30, seed=1)
    train.append(dict(train[4]))  # line 241
    train.append(dict(train[7], text=f"Well, {train[7]['text']}"))  # line 242
    train.append(dict(train[0], condition="Asthma"))  # line 243
    test.append(dict(train[10]))  # line 31
    train[50]["condition"] = NAMES[(50 + 1) % 3]  # line 51
    train[60]["text"] = "spots " * 300  # line 61
    train[70]["text"] = "  "  # line 71
    train[80]["text"] += " it&#039;s"  # line 81
    train += [{"text": f"itch number {i} of the arm {i * i}", "condition": "Eczema"} for i in range(8)]
    return train, test


EXPECTED = {
    "duplicates": [["train.jsonl, line 5", "train.jsonl, line 241"]],
    "near_duplicates": [["train.jsonl, line 8", "train.jsonl, line 242"]],
    "conflict": [["train.jsonl, line 1", "train.jsonl, line 243"]],
    "leak": [["test.jsonl, line 31", "train.jsonl, line 11"]],
    "refused": [["train.jsonl, line 61"]],
    "cut": [["train.jsonl, line 61"]],
    "empty": [["train.jsonl, line 71"]],
    "debris": [["train.jsonl, line 81"]],
    "balance": [["train.jsonl, line 244"]],
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, tokenizer):
    return look(experiment(tmp_path_factory.mktemp("faulty"), *seeded()), tokenizer)


def test_a_clean_set_yields_no_finding(tmp_path, tokenizer, capsys):
    found = look(experiment(tmp_path, clean(240, seed=0), clean(30, seed=1)), tokenizer)
    assert found.findings == ()
    say(found)
    assert "No fault was found." in capsys.readouterr().out
    assert "No fault was found." in page(found)


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_seeded_fault_is_found_with_its_place(faulty, kind):
    [finding] = [one for one in faulty.findings if one.kind == kind]
    assert places(finding) == EXPECTED[kind]
    assert finding.advice.endswith(".")


def test_a_swapped_label_is_the_first_suspicious_one_and_nothing_else_is_found(faulty):
    [finding] = [one for one in faulty.findings if one.kind == "suspicious_labels"]
    assert ["train.jsonl, line 51"] in places(finding)[:2]  # the other is line 243, of the equal texts
    assert {one.kind for one in faulty.findings} == {*EXPECTED, "suspicious_labels"}


def test_errors_come_first(faulty):
    weights = [one.weight for one in faulty.findings]
    assert weights == sorted(weights, key=("error", "warning", "note").index)


def test_json_parses_and_holds_every_place(faulty):
    found = json.loads(json.dumps(as_json(faulty)))
    kinds = {one["kind"]: one for one in found["findings"]}
    for kind, expected in EXPECTED.items():
        assert [[spot["place"].split("/")[-1] for spot in case["spots"]] for case in kinds[kind]["cases"]] == expected
    assert found["sets"]["train"]["rows"] == 251
    assert found["labels"]["condition"]["Eczema"] == {"train": 8, "test": 0}
    assert len(found["shown"]) == 3


class Reader(html.parser.HTMLParser):
    """Collects what a page refers to, and its elements."""

    def __init__(self):
        super().__init__()
        self.references, self.elements = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action", "srcset")]


def test_the_page_is_one_file_without_anything_from_elsewhere(faulty):
    text = page(faulty)
    reader = Reader()
    reader.feed(text)
    assert [one for one in reader.references if not one.startswith("#")] == []
    assert reader.elements.count("svg") == 2
    assert not {"script", "link", "iframe", "img"} & set(reader.elements)
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for expected in EXPECTED.values():
        assert expected[0][0] in text


def test_a_page_writes_markup_of_the_data_as_text(tmp_path, tokenizer):
    records = clean(30, seed=0)
    records[0]["text"] = "<script>alert(1)</script> " * 3
    records[1]["condition"] = "<b>$x"
    text = page(look(experiment(tmp_path, records, clean(9, seed=1)), tokenizer))
    assert "<script" not in text
    assert "<b>$x" not in text


def test_three_rows_show_the_scored_tokens(faulty, tokenizer):
    assert [one.which.split(",")[0] for one in faulty.shown] == ["the shortest row", "a row of median length", "the longest row"]
    shortest, median, longest = faulty.shown
    for shown in (shortest, median):
        runs = shown.runs()
        assert [run.state for run in runs] == [GIVEN, SCORED, GIVEN]
        assert runs[2].text == "\n"  # what the template writes after the end of a turn isn't generated
        assert re.fullmatch(r"Condition: \w+<\|im_end\|>", runs[1].text)
        assert "<|im_start|>user\nReview: " in runs[0].text
    assert [run.state for run in longest.runs()] == [GIVEN, CUT]
    assert longest.runs()[1].text.endswith("<|im_end|>\n")


def test_the_text_marks_the_scored_tokens_and_says_what_to_do(faulty, capsys):
    say(faulty)
    out = capsys.readouterr().out
    assert re.search(r"⟦Condition: \w+<\|im_end\|>⟧", out)
    assert "train.jsonl, line 71" in out
    assert "Remove all but one of each" in out


@pytest.mark.parametrize("text", ["The patient took it 😀 twice, née ça va", " leading, double  spaces\n\nlines", "頭が痛い"])
def test_pieces_make_the_text_of_all_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    made = pieces(tokens, [GIVEN] * len(tokens), tokenizer)
    assert "".join(piece.text for piece in made) == tokenizer.decode(tokens)
    assert all(piece.text for piece in made)


# ---------------------------------------------------------------- other rows


@pytest.mark.parametrize(
    "row",
    [
        lambda text, label: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]},
        lambda text, label: {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": label}]},
        lambda text, label: {"prompt": text, "completion": label},
        lambda text, label: {"instruction": "Name the condition.", "input": text, "output": label},
    ],
    ids=["messages", "sharegpt", "pairs", "alpaca"],
)
def test_every_format_of_conversations(tmp_path, tokenizer, row):
    train = clean(90, seed=0)
    train.append(train[4])
    train.append(dict(train[0], condition="Asthma"))
    records = [row(one["text"], one["condition"]) for one in train]
    found = look(experiment(tmp_path, records, records[10:11], prompt="", completion=""), tokenizer)
    kinds = {one.kind: places(one) for one in found.findings}
    assert kinds["duplicates"] == [["train.jsonl, line 5", "train.jsonl, line 91"]]
    assert kinds["conflict"] == [["train.jsonl, line 1", "train.jsonl, line 92"]]
    assert kinds["leak"] == [["test.jsonl, line 1", "train.jsonl, line 11"]]


def test_plain_text(tmp_path, tokenizer):
    records = [{"text": one["text"]} for one in clean(30, seed=0)]
    found = look(experiment(tmp_path, [*records, records[3]], records[5:6], prompt="", completion=""), tokenizer)
    assert {one.kind: places(one) for one in found.findings} == {
        "leak": [["test.jsonl, line 1", "train.jsonl, line 6"]],
        "duplicates": [["train.jsonl, line 4", "train.jsonl, line 31"]],
    }


def test_rows_of_classes_tags_and_answers(tmp_path, tokenizer):
    sets = {
        "classes": [{"text": one["text"], "text_pair": "same?", "label": one["condition"]} for one in clean(60, seed=0)],
        "tags": [{"tokens": one["text"].split(), "tags": ["O"] * 12 + ["B-X", "I-X"]} for one in clean(60, seed=0)],
        "answers": [
            {"question": f"What is {i}?", "context": one["text"], "answers": {"text": [one["text"][:5]], "answer_start": [0]}}
            for i, one in enumerate(clean(60, seed=0))
        ],
    }
    tasks = {"classes": SequenceClassification(), "tags": TokenClassification(), "answers": QuestionAnswering()}
    for name, records in sets.items():
        records.append(json.loads(json.dumps(records[2])))
        folder = tmp_path / name
        folder.mkdir()
        given = dataclasses.replace(experiment(folder, records, records[30:31], prompt="", completion=""), task=tasks[name])
        found = {one.kind: places(one) for one in look(given, tokenizer).findings}
        assert found == {
            "leak": [["test.jsonl, line 1", "train.jsonl, line 31"]],
            "duplicates": [["train.jsonl, line 3", "train.jsonl, line 61"]],
        }, name


def test_an_answer_that_is_not_where_it_should_be(tmp_path, tokenizer):
    records = [{"question": "Who?", "context": f"It was {i}.", "answers": {"text": ["was"], "answer_start": [3]}} for i in range(9)]
    records[4]["answers"]["answer_start"] = [5]
    given = experiment(tmp_path, records, [{**records[0], "question": "When?"}], prompt="", completion="")
    found = {one.kind: one for one in look(dataclasses.replace(given, task=QuestionAnswering()), tokenizer).findings}
    assert places(found["refused"]) == [["train.jsonl, line 5"]]
    assert found["refused"].cases[0].note == (
        "the answer 'was' isn't what stands at answer_start, 5, in its context. It stands at 3: correct answer_start."
    )


def asked(i, answer):
    """A row of question answering, and of multiple choice where it has an answer."""
    return {"question": f"What is {i}?", "context": f"It was {i}.", "answers": {"text": ["was"] * answer, "answer_start": [3] * answer}}


def chosen(other):
    return {"question": "Well?", "choices": ["yes", other], "answer": "0"}


REFUSED = {
    "a label that train lacks": (
        SequenceClassification(),
        ([{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)], [{"text": "one", "label": "a"}, {"text": "two", "label": "c"}]),
        "test.jsonl, line 2",
        "label 'c' is none of the model's",
    ),
    "a tag that train lacks": (
        TokenClassification(),
        ([{"tokens": ["a", str(i)], "tags": ["O", "B-X"]} for i in range(8)], [{"tokens": ["b"], "tags": ["B-Y"]}]),
        "test.jsonl, line 1",
        "tag 1 'B-Y' is none of the model's",
    ),
    "a question without an answer": (
        QuestionAnswering(no_answer=False),
        ([asked(i, i != 3) for i in range(8)], [asked(9, 1)]),
        "train.jsonl, line 4",
        "the question has no answer, and config.task.no_answer is off",
    ),
    "a choice that is too long": (
        MultipleChoice(),
        ([chosen("no " * (300 if i == 2 else 1)) for i in range(8)], [chosen("no")]),
        "train.jsonl, line 3",
        "config.data.max_length is 128, which cuts a choice. Raise it to ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_found_by_its_own_checks(name, tmp_path, tokenizer):
    task, sets, place, reason = REFUSED[name]
    given = dataclasses.replace(experiment(tmp_path, *sets, prompt="", completion="", max_length=128), task=task)
    found = {one.kind: one for one in look(given, tokenizer).findings}
    assert places(found["refused"]) == [[place]]
    assert found["refused"].cases[0].note.startswith(reason)
    rows = load_splits(given.data, 0)
    config = types.SimpleNamespace(vocab_size=9, **({"problem_type": SINGLE_LABEL} | task.model_options(rows["train"], given.data)))
    with pytest.raises(UserError) as refused:
        task.examples(rows[place.split(".")[0]], tokenizer, given.data, types.SimpleNamespace(pooling="last", config=config))
    assert str(refused.value).endswith(f"{place}: {found['refused'].cases[0].note}")


def test_a_training_set_that_is_refused_as_a_whole_is_told(tmp_path, tokenizer):
    records = [{"text": f"text {i}", "label": "a"} for i in range(8)]
    given = dataclasses.replace(experiment(tmp_path, records, records[:1], prompt="", completion=""), task=SequenceClassification())
    found = {one.kind: one for one in look(given, tokenizer).findings}
    assert found["refused_set"].weight == "error"
    assert "one label only, 'a'" in found["refused_set"].advice


def test_settings_that_training_refuses_are_refused_and_a_fold_is_looked_at_as_it_is_trained(tmp_path, tokenizer):
    records = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    given = dataclasses.replace(experiment(tmp_path, records, records[:1], prompt="", completion=""), task=SequenceClassification())
    with pytest.raises(UserError, match="config.data.tags has no effect with the task SequenceClassification"):
        look(dataclasses.replace(given, data=dataclasses.replace(given.data, tags="ner")), tokenizer)
    with pytest.raises(UserError, match="config.data.folds is 1"):
        look(dataclasses.replace(given, data=dataclasses.replace(given.data, folds=1)), tokenizer)
    found = look(dataclasses.replace(given, data=dataclasses.replace(given.data, folds=2, fold=1)), tokenizer)
    assert {texts.name: len(texts) for texts in found.sets} == {"train": 4, "validation": 4, "test": 1}


def test_a_mistake_in_the_configuration_is_no_finding(tmp_path, tokenizer):
    with pytest.raises(UserError, match="names the column 'txt'. Did you mean 'text'"):
        look(experiment(tmp_path, clean(9, seed=0), clean(9, seed=1), prompt="{txt}"), tokenizer)
    with pytest.raises(UserError, match="not valid Jinja"):
        look(experiment(tmp_path, clean(9, seed=0), clean(9, seed=1), template="{% if %}"), tokenizer)


# ---------------------------------------------------------------- before training, and the mode


def test_training_begins_with_a_line_for_each_finding_in_no_time(tmp_path, tokenizer, capsys):
    train, test = seeded()
    train = [one for one in train if one["text"].strip() and len(one["text"]) < 1000]
    train += [dict(one, text=f"{one['text']} {i}{seed}") for seed in (5, 6) for i, one in enumerate(clean(180, seed))]
    given = experiment(tmp_path, train, test)
    rows = load_splits(given.data, 0)
    examples = {name: tokenize(found, tokenizer, given.data) for name, found in rows.items()}
    began = time.process_time()
    look_quickly(rows, examples, given)
    assert time.process_time() - began < 2.0  # 0.3 s where nothing else runs
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Warning: 1 row of train repeats an earlier row of the same set \(.*train.jsonl, line 5\)\.", lines[2])
    assert sum(line.startswith(("Warning: ", "Note: ")) for line in lines) == 6
    assert lines[-2] == "--mode=inspect shows them, and what to do about each."


def test_before_training_a_large_set_is_looked_at_in_part_and_that_is_said(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("jaxft.inspect.look._MOST_ROWS_QUICK", 40)
    given = experiment(tmp_path, clean(90, seed=0), clean(30, seed=1))
    rows = load_splits(given.data, 0)
    look_quickly(rows, {name: tokenize(found, tokenizer, given.data) for name, found in rows.items()}, given)
    assert "40 of the 90 rows of train" in capsys.readouterr().out


def test_the_mode_writes_into_a_free_folder_which_stays_free(tmp_path, tokenizer, capsys):
    given = experiment(tmp_path, *seeded())
    workdir = tmp_path / "run"
    for _ in range(2):
        run.inspect(given, workdir)
    assert {path.name for path in workdir.iterdir()} == {"inspect.json", "inspect.html"}
    assert json.loads((workdir / "inspect.json").read_text(encoding="utf-8"))["experiment"] == "lora_llama2"
    check_workdir(workdir, overrides.to_dict(given))  # a training may begin here
    assert str(workdir / "inspect.html") in capsys.readouterr().out


def test_the_mode_refuses_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    given = experiment(tmp_path, clean(9, seed=0), clean(9, seed=1))
    with pytest.raises(UserError, match="isn't empty and holds no run of jaxft"):
        run.inspect(given, tmp_path)
    assert not (tmp_path / "inspect.json").exists()


def test_no_weights_are_needed(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    transformers.LlamaConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()  # empty: reading it would fail
    given = experiment(tmp_path, clean(30, seed=0), clean(9, seed=1))
    found = run.inspect(dataclasses.replace(given, model=ModelConfig(str(folder))), tmp_path / "run")
    assert len(found.sets[0]) == 30
