"""Extractive question answering: transformers' windows, losses and gradients, its rules of the best span, and SQuAD's own figures."""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import re
import string

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import torchmetrics.functional.text
import transformers
from evaluation_batches import evaluation_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import largest_difference, make_pair

from jaxft.config import DataConfig, Experiment, ModelConfig, TrainConfig
from jaxft.data.batches import Room, lay_out
from jaxft.data.questions import Answer, Question
from jaxft.data.rows import Rows
from jaxft.data.sources import load_rows
from jaxft.errors import UserError
from jaxft.hub.names import tensors_of
from jaxft.inspect.encoded import encode
from jaxft.inspect.texts import kind_of, read_set
from jaxft.methods import Full
from jaxft.tasks import QuestionAnswering
from jaxft.tasks.spans import best_answers
from jaxft.tasks.squad_figures import exact_match, f1, normalized, squad_figures
from jaxft.train import run

WORDS = [f"w{number}" for number in range(80)]
TASK = QuestionAnswering(stride=6, question_length=5)
DATA = DataConfig(max_length=24)
FAMILIES = ("bert", "gpt2", "llama")


@functools.cache
def pair(family):
    return make_pair(family, "question_answering")


@functools.cache
def tokenizer(family="bert"):
    """Returns a tokenizer of words, with BERT's special tokens for an encoder, a first one for a Llama, none for a GPT-2."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if family == "bert":
        made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if family == "llama":
        pieces = {"single": "[CLS] $A", "pair": "[CLS] $A $B:1", "special_tokens": [("[CLS]", 2)]}
        made.post_processor = tokenizers.processors.TemplateProcessing(**pieces)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def row(question, context, *answers):
    """Returns a row of SQuAD's; the answers are parts of the context."""
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]},
    }


def rows(*records):
    return Rows(datasets.Dataset.from_list(list(records)), "train.jsonl", "line", np.arange(1, len(records) + 1))


def text(*numbers):
    return " ".join(WORDS[number] for number in numbers)


# Contexts of one window and of several; an answer at an end, one that some windows have half of, and none.
ROWS = rows(
    row("w1 w2", text(*range(10, 20)), text(12, 13)),
    row("w3", text(*range(20, 70)), text(30, 31, 32), text(40)),
    row("w4 w5 w6", text(*range(40, 75)), text(74)),
    row("w7", text(*range(5, 33))),
    row("w1 w2 w3 w4 w5 w6 w7 w8", text(*range(9, 25)), text(9)),
)


def windows_of(family, task=TASK, found=ROWS, data=DATA):
    return task.examples(found, tokenizer(family), data, pair(family)[1])


def features(family):
    """Returns transformers' own windows, prepared as its example of question answering does, with the places of start and end."""
    questions = [" ".join(one.split()[: TASK.question_length]) for one in ROWS.dataset["question"]]
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    encoded = tokenizer(family)(
        questions, list(ROWS.dataset["context"]), truncation="only_second", max_length=DATA.max_length, stride=TASK.stride, **options
    )
    found = []
    for i, number in enumerate(encoded["overflow_to_sample_mapping"]):
        answers, place = ROWS.dataset[number]["answers"], (0, 0)
        offsets = [span if own == 1 else None for span, own in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)]
        if answers["text"]:
            begin, end = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
            starts = [at for at, span in enumerate(offsets) if span and span[0] == begin]
            ends = [at for at, span in enumerate(offsets) if span and span[1] == end]
            place = (starts[0], ends[0]) if starts and ends else (0, 0)
        kinds = encoded["token_type_ids"][i]
        found.append({"row": number, "input_ids": encoded["input_ids"][i], "kinds": kinds, "offsets": offsets, "place": place})
    return found


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_places_are_those_of_transformers(family):
    found, expected = windows_of(family), features(family)
    assert found.rows.tolist() == [one["row"] for one in expected]
    assert collections.Counter(found.rows.tolist())[1] > 2
    for i, one in enumerate(expected):
        part = found.slots.part(i)
        assert found.tokens_of(i).tolist() == one["input_ids"]
        own = [at for at, span in enumerate(one["offsets"]) if span]
        assert found.slots.reads[part].tolist() == [0, *own]
        assert found.spans[part].tolist() == [[0, 0], *[list(one["offsets"][at]) for at in own]]
        places = found.slots.reads[part][found.slots.targets[part].argmax(axis=0)]
        assert places.tolist() == list(one["place"])
    assert 0 < found.answered.sum() < len(found)
    if family == "bert":
        assert np.concatenate([one["kinds"] for one in expected]).tolist() == found.per_token["token_type_ids"].tolist()
    else:
        assert not found.per_token


def test_the_first_rows_alone_keep_their_windows():
    found = windows_of("bert")
    first = found.first(2)
    assert first.rows.tolist() == [one for one in found.rows.tolist() if one < 2]
    assert first.questions == found.questions[:2]
    assert len(first.spans) == len(first.slots.reads) == first.slots.offsets[-1]
    assert len(found.first(99)) == len(found)


def test_what_is_cut_or_lost_is_told():
    assert TASK.warnings(tokenizer(), windows_of("bert")) == [
        "1 training questions have more than config.task.question_length=5 tokens and are cut."
    ]
    long = rows(row("w1", text(*range(10, 60)), text(*range(20, 40))))
    warnings = TASK.warnings(tokenizer(), windows_of("bert", found=long))
    assert "1 training answers are whole in no window" in warnings[0]
    assert "every training question has an answer" in warnings[1]


# ---------------------------------------------------------------- loss


def expected_loss(family, grad=False):
    """Returns transformers' loss, the mean over its windows, each by itself."""
    reference, losses = pair(family)[0], []
    for one in features(family):
        inputs = {"input_ids": torch.tensor([one["input_ids"]])} | (
            {"token_type_ids": torch.tensor([one["kinds"]])} if family == "bert" else {}
        )
        with torch.set_grad_enabled(grad):
            out = reference(**inputs)
            own = torch.tensor([0, *[at for at, span in enumerate(one["offsets"]) if span and at > 0]])
            slots = torch.tensor([[own.tolist().index(place)] for place in one["place"]])
            ends = zip((out.start_logits, out.end_logits), slots, strict=True)
            losses.append(sum(torch.nn.functional.cross_entropy(logits[:, own], place) for logits, place in ends) / 2)
    return torch.stack(losses).mean()


def mean_loss(family, packing, params, task=TASK):
    model, found = pair(family)[1], windows_of(family)
    data = dataclasses.replace(DATA, packing=packing, max_length=64)
    totals = [task.sums(model, params, batch, {}) for batch in evaluation_batches(found, data, 3, family != "bert")]
    sums = jax.tree.map(lambda *parts: sum(parts), *totals)
    return sums.loss / sums.weight, sums.weight


@pytest.mark.parametrize(("family", "packing"), [("bert", True), ("bert", False), ("gpt2", True), ("llama", True)])
def test_losses_are_those_of_transformers(family, packing):
    loss, weight = jax.jit(functools.partial(mean_loss, family, packing))(pair(family)[2])
    assert weight == len(windows_of(family))
    np.testing.assert_allclose(loss, expected_loss(family), rtol=1e-4)


@pytest.mark.parametrize("virtual", [0, 3])
def test_windows_behind_virtual_tokens_have_a_loss_of_their_own_each(virtual):
    found, room = windows_of("bert"), Room(virtual)
    layout = lay_out(found, np.arange(len(found)), dataclasses.replace(DATA, max_length=64), False, 0, room)
    scores = np.random.default_rng(0).normal(size=(len(found.slots.reads), 2)).astype(np.float32)
    total = 0.0
    for number in range(len(layout.rows)):
        batch, slots = layout.fill([number]), layout.slots_of(number)
        logits = np.zeros((batch["scored"].shape[1], 2), np.float32)
        logits[: len(slots)] = scores[slots]
        likelihoods = TASK.outputs(pair("bert")[1], jnp.asarray(logits), batch)
        total += float(TASK.loss(None, likelihoods, batch["targets"].reshape(-1, 2), batch["weights"].reshape(-1)).loss)
    expected = 0.0
    for window in range(len(found)):
        own = torch.tensor(scores[found.slots.part(window)])
        places = torch.tensor(found.slots.targets[found.slots.part(window)]).argmax(0)
        expected += float(torch.nn.functional.cross_entropy(own.T, places)) if len(own) else 0.0
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_the_loss_and_gradients_of_a_window_without_question_are_those_of_transformers_class():
    """BertForQuestionAnswering's own loss goes over all tokens: with a context alone those are the slots, but for one [SEP]."""
    reference, model, params = pair("bert")
    tokens = np.asarray([2, *range(10, 20)], np.int32)  # [CLS] and the context
    targets = np.zeros((11, 2), np.float32)
    targets[4, 0] = targets[6, 1] = 1
    batch = {
        "tokens": np.tile(tokens, 2)[None],
        "segment_ids": np.repeat([1, 2], 11)[None].astype(np.int32),
        "positions": np.tile(np.arange(11, dtype=np.int32), 2)[None],
        "scored": np.arange(24, dtype=np.int32)[None] % 22,
        "targets": np.concatenate([targets, np.roll(targets, 2, axis=0), np.zeros((2, 2), np.float32)])[None],
        "weights": (np.arange(24) < 22).astype(np.float32)[None],
    }

    def loss(params):
        sums = TASK.sums(model, params, batch, {})
        return sums.loss / sums.weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)

    def torchs(model):
        places = {"start_positions": torch.tensor([4, 6]), "end_positions": torch.tensor([6, 8])}
        model.zero_grad()
        found = model(input_ids=torch.tensor(np.tile(tokens, (2, 1))), **places).loss
        found.backward()
        return found.item(), {name: parameter.grad.double().numpy() for name, parameter in model.named_parameters()}

    (expected, exact), (_, rounded) = torchs(copy.deepcopy(reference).double()), torchs(reference)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for entry in tensors_of(model, gradients):
        gradient, theirs = entry.leaf.value if entry.index is None else entry.leaf.value[entry.index], exact[entry.name]
        error = np.abs(entry.swap(np.asarray(gradient)) - theirs).max()
        # Keys' gradients are sums that cancel, to nothing for their biases: there torch's own float32 says what rounding's order is.
        assert error <= max(1e-4 * np.abs(theirs).max(), 10 * np.abs(rounded[entry.name] - theirs).max()), entry.name


def test_r_drop_of_two_equal_passes_is_the_loss():
    _, model, params = pair("bert")
    (batch, *_) = evaluation_batches(windows_of("bert"), dataclasses.replace(DATA, max_length=64), 3, False)
    once, twice = (jax.jit(lambda weight: TASK.sums(model, params, batch, {}, weight), static_argnums=0)(weight) for weight in (0.0, 2.0))
    assert largest_difference(once, twice) <= 1e-4


def test_the_divergence_of_two_outputs_is_the_mean_of_both_kullback_leibler_divergences():
    random = np.random.default_rng(0)
    one, other = (torch.log_softmax(torch.tensor(random.normal(size=(7, 2))), dim=0) for _ in range(2))
    expected = sum(torch.nn.functional.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((one, other), (other, one))) / 4
    np.testing.assert_allclose(TASK.divergence(None, one.numpy(), other.numpy()).sum(), expected, rtol=1e-5)


# ---------------------------------------------------------------- best spans


def transformers_answers(starts, ends, n_best, longest, no_answer, threshold):
    """What transformers' example of question answering makes of its own windows' logits (run_qa.py, `postprocess_qa_predictions`), told
    anew: of each window all pairs of the `n_best` highest starts and ends of the whole window, in the context, of a length that is allowed;
    of those of all windows the `n_best` best; none where the lowest score of a first token is more than the threshold above the best.

    Args:
      starts: (windows, tokens) of `features("bert")`, filled up at their end.
      ends: the same.
    """
    answers, windows = [], features("bert")
    for number, asked in enumerate(ROWS.dataset):
        spans, nothing = [], []
        for start, end, window in zip(starts, ends, windows, strict=True):
            if window["row"] != number:
                continue
            nothing.append(start[0] + end[0])
            likely = [sorted(range(len(scores)), key=lambda at, scores=scores: -scores[at])[:n_best] for scores in (start, end)]
            for first, last in itertools.product(*likely):
                inside = all(at < len(window["offsets"]) and window["offsets"][at] for at in (first, last))
                if inside and 0 <= last - first < longest:
                    found = asked["context"][window["offsets"][first][0] : window["offsets"][last][1]]
                    spans.append((start[first] + end[last], found))
        score, best = max(spans, default=(-np.inf, ""))  # theirs says "empty" where there is no pair
        answers.append("" if no_answer and min(nothing) - score > threshold else best)
    return answers


@settings(max_examples=80, deadline=None)
@given(
    peaks=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 23), st.integers(0, 23), st.floats(-6, 6)), max_size=12),
    n_best=st.integers(2, 20),
    longest=st.integers(1, 12),
    no_answer=st.booleans(),
    threshold=st.floats(-4, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_answers_are_those_of_transformers_on_the_logits_of_its_own_windows(peaks, n_best, longest, no_answer, threshold, seed):
    found, windows = windows_of("bert"), features("bert")
    logits = np.random.default_rng(seed).normal(size=(2, len(windows), DATA.max_length))
    for window, first, last, height in peaks:
        logits[0, window % len(windows), first] += height
        logits[1, window % len(windows), last] += height
    for window, one in enumerate(windows):  # theirs looks at the question too, before it drops what it finds there
        outside = [at for at in range(1, DATA.max_length) if at >= len(one["offsets"]) or not one["offsets"][at]]
        logits[:, window, outside] -= 1e4
    outputs = np.concatenate([logits[:, i, found.slots.reads[found.slots.part(i)]].T for i in range(len(windows))])
    expected = transformers_answers(*logits, n_best, longest, no_answer, threshold)
    task = dataclasses.replace(TASK, n_best=n_best, max_answer_length=longest, no_answer=no_answer)
    task = dataclasses.replace(task, no_answer_threshold=threshold if no_answer else 0.0)
    assert task.answers(found, outputs) == expected


def test_an_answer_is_cut_from_the_text_as_it_stands_there():
    context = "Dr. Müller  gave me ÉPINÉPHRINE\tfor it; why?"
    found = windows_of("bert", found=rows(row("w1", context, "ÉPINÉPHRINE\tfor")), task=QuestionAnswering(stride=0))
    outputs = np.log(found.slots.targets * 100 + 1)
    assert best_answers(found, outputs, 20, 30, True, 0.0) == ["ÉPINÉPHRINE\tfor"]
    assert best_answers(found, np.zeros_like(outputs), 20, 30, True, -1.0) == [""]


# ---------------------------------------------------------------- figures

SOME = st.lists(st.sampled_from(["the", "a", "Birth", "birth", "control", "pill,", "pain", "--", " "]), max_size=4).map(" ".join)


def official(made, true):
    """SQuAD 2.0's evaluation, as its paper and script describe it, written once more: exact match and F1 of one question."""

    def words(answer):
        kept = "".join(character for character in answer.lower() if character not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    scores = []
    for one in [answer for answer in true if words(answer)] or [""]:
        left, right, same = words(made), words(one), 0
        rest = list(right)
        for word in left:
            if word in rest:
                rest.remove(word)
                same += 1
        if not left or not right:
            overlap = int(left == right)
        else:
            precision, recall = same / len(left), same / len(right)
            overlap = 0 if not same else 2 * precision * recall / (precision + recall)
        scores.append((int(left == right), overlap))
    return tuple(max(column) for column in zip(*scores, strict=True))


@settings(max_examples=150, deadline=None)
@given(made=SOME, true=st.lists(SOME, max_size=3))
def test_exact_match_and_f1_are_those_of_the_official_rules(made, true):
    np.testing.assert_allclose((exact_match(made, true), f1(made, true)), official(made, true))


@settings(max_examples=80, deadline=None)
@given(made=SOME, true=st.lists(SOME.filter(normalized), min_size=1, max_size=3))
def test_exact_match_and_f1_of_answered_questions_are_those_of_torchmetrics(made, true):
    asked = {"answers": {"text": true, "answer_start": [0] * len(true)}, "id": "1"}
    expected = torchmetrics.functional.text.squad([{"prediction_text": made, "id": "1"}], [asked])
    assert (exact_match(made, true), f1(made, true)) == pytest.approx([float(expected[name]) / 100 for name in ("exact_match", "f1")])


KNOWN = [  # answer, true ones, exact match, F1: worked out by hand
    ("The migraine.", ["migraine"], 1.0, 1.0),
    ("chronic migraine", ["migraine", "chronic severe migraine"], 0.0, 0.8),
    ("", [], 1.0, 1.0),
    ("pain", [], 0.0, 0.0),
    ("", ["pain"], 0.0, 0.0),
    ("an apple a day", ["apple day"], 1.0, 1.0),
    ("pain pain", ["pain"], 0.0, 2 / 3),
]


def test_known_values():
    for made, true, exact, words in KNOWN:
        assert (exact_match(made, true), f1(made, true)) == pytest.approx((exact, words)), made
    questions = [Question("?", "...", tuple(Answer(answer, 0) for answer in true)) for _, true, _, _ in KNOWN]
    found = squad_figures([made for made, *_ in KNOWN], questions)
    assert found == pytest.approx(
        {"exact_match": 3 / 7, "f1": (1 + 0.8 + 1 + 1 + 2 / 3) / 7, "exact_match_answered": 0.4}
        | {"answered_f1": (1 + 0.8 + 1 + 2 / 3) / 5, "exact_match_unanswerable": 0.5}
    )
    assert set(squad_figures(["a"], [questions[0]])) == {"exact_match", "f1"}


def test_the_scores_of_a_perfect_head_and_the_majority_answer():
    found, model = windows_of("bert"), pair("bert")[1]
    outputs = found.slots.targets * 10
    outputs[found.slots.offsets[:-1][~found.answered]] = 1  # lower than an answer elsewhere
    sums = TASK.loss(model, jax.numpy.log(found.slots.targets + 1e-9), found.slots.targets, found.slots.weights)
    scores = TASK.scores(model, found, jax.device_get(sums), outputs)
    assert scores == pytest.approx({"loss": 0.0} | dict.fromkeys(list(scores)[1:], 1.0), abs=1e-5)
    assert TASK.shown(model, found, outputs, [0, 1]) == [("w12 w13", "w12 w13"), ("w30 w31 w32 / w40", "w30 w31 w32")]
    (table,) = TASK.report(model, found, outputs).tables
    assert [one[-1] for one in table.rows] == ["4", "1"]
    training = windows_of("bert", found=rows(*[row("w1", "w2 w3", "w2")] * 2, row("w1", "w2 w9 w3", "w9"), row("w1", "w3 w4")))
    assert TASK.majority(model, training, training)["exact_match"] == 0.5


@pytest.mark.usefixtures("as_launched")
def test_a_run_measures_shows_and_exports_what_transformers_loads(tmp_path, capsys):
    pair("bert")[0].save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in ROWS.dataset))
    found = Experiment(
        name="questions",
        model=ModelConfig(source=str(tmp_path / "model")),
        data=dataclasses.replace(DATA, train=str(file), validation=str(file), test=str(file)),
        method=Full(),
        task=TASK,
        train=TrainConfig(steps=2, batch_size=4, eval_every=1, best_metric="f1", best_mode="max"),
    )
    after = run.train(found, tmp_path / "run")["eval"]["after"]
    printed = capsys.readouterr().out
    assert f"5 in {len(windows_of('bert'))} windows" in printed
    assert "AutoModelForQuestionAnswering.from_pretrained" in printed
    assert "F1 of answered" in printed
    assert "true:  w12 w13\n" in printed
    exported = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run/export/hf", attn_implementation="eager").eval()
    examples, outputs = windows_of("bert"), []
    kinds = examples.per_token["token_type_ids"]
    for i in range(len(examples)):
        given = {"input_ids": examples.tokens_of(i), "token_type_ids": kinds[examples.offsets[i] : examples.offsets[i + 1]]}
        with torch.no_grad():
            out = exported(**{name: torch.tensor(value)[None].long() for name, value in given.items()})
        outputs.append(torch.stack([out.start_logits[0], out.end_logits[0]], dim=1).numpy()[examples.slots.reads[examples.slots.part(i)]])
    expected = squad_figures(TASK.answers(examples, np.concatenate(outputs)), examples.questions)
    assert {name: after[name] for name in expected} == pytest.approx(expected)


def test_inspection_reads_question_and_context_as_a_pair_and_cuts_nothing():
    set_of_rows = read_set("train", ROWS, DATA, kind_of("question_answering"))
    found = encode(set_of_rows, tokenizer(), dataclasses.replace(DATA, max_length=24))
    for i, one in enumerate(ROWS.dataset):
        assert found.tokens[i].tolist() == tokenizer()(one["question"], one["context"])["input_ids"]
        scored = tokenizer().decode(found.tokens[i][found.scored[i]])
        assert scored == (one["answers"]["text"][0] if one["answers"]["text"] else "[CLS]")
    assert not found.cut.any()
    assert found.whole_lengths.max() > 24


# ---------------------------------------------------------------- rows that are wrong, and files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["w12"], "answer_start": [1]}}, "train.jsonl, line 2: the answer 'w12' .* answer_start, 1, .* stands at 8"),
        ({"answers": {"text": ["zebra"], "answer_start": [0]}}, "line 2: the answer 'zebra' isn't .* stands nowhere in it"),
        ({"answers": {"text": ["w12", "w13"], "answer_start": [8]}}, "line 2: answers has 2 texts, but 1 of answer_start"),
        ({"answers": {"text": [" "], "answer_start": [0]}}, "line 2: an answer's text is ' '"),
        ({"answers": {"text": ["w12"], "answer_start": [None]}}, "line 2: answer_start of 'w12' is None"),
        ({"context": " "}, "line 2: 'context' is empty"),
        ({"question": None}, "line 2: 'question' must be text, not None"),
    ],
)
def test_a_wrong_row_is_told_by_its_place(change, message):
    good = row("w1", "w10 w11 w12", "w11")
    with pytest.raises(UserError, match=message):
        windows_of("bert", found=rows(good, good | change))


def test_columns_settings_and_lengths_that_are_wrong():
    with pytest.raises(UserError, match="train.jsonl, line 1: there is no column 'answers'. Did you mean 'answer'"):
        windows_of("bert", found=rows({"question": "w1", "context": "w2", "answer": "w2"}))
    with pytest.raises(UserError, match="answers is 'w2'. Give"):
        windows_of("bert", found=rows({"question": "w1", "context": "w2", "answers": "w2"}))
    with pytest.raises(UserError, match="line 4: the question has no answer, and config.task.no_answer is off"):
        windows_of("bert", task=dataclasses.replace(TASK, no_answer=False))
    with pytest.raises(UserError, match="max_length is 12: 3 special tokens and a question of 5 leave 4 .* config.task.stride, .* is 6"):
        windows_of("bert", data=DataConfig(max_length=12))
    with pytest.raises(UserError, match="config.data.label has no effect .* columns of fixed names"):
        TASK.check(DataConfig(label="rating"))
    for settings_, message in (
        ({"n_best": 0}, "task.n_best is 1 or more"),
        ({"stride": -1}, "task.stride"),
        ({"no_answer": False, "no_answer_threshold": 1.0}, "no_answer_threshold has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            QuestionAnswering(**settings_)


def test_squads_own_nested_file_and_lists_of_answers(tmp_path):
    asked = [{"id": "a", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False}]
    asked += [
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x", "answer_start": 0}]}
    ]
    file = tmp_path / "train-v2.0.json"
    article = {"title": "T", "paragraphs": [{"context": "Ann did it.", "qas": asked}]}
    file.write_text(json.dumps({"version": "v2.0", "data": [article, article]}))
    found = load_rows(str(file), "train")
    assert len(found) == 4
    assert found.dataset[1]["question"] == "Why?"
    read = windows_of("bert", found=found).questions
    assert read[0] == Question("Who?", "Ann did it.", (Answer("Ann", 0),))
    assert read[3].answers == ()
    assert found.place(2).endswith("train-v2.0.json, question 3")
    del article["paragraphs"][0]["qas"][1]["question"]
    file.write_text(json.dumps({"data": [article]}))
    with pytest.raises(UserError, match="article 1, paragraph 1, question 2: expected"):
        load_rows(str(file), "train")
    listed = rows({"question": "w1", "context": "w2", "answers": [{"text": "w2", "answer_start": 0}]})
    assert windows_of("bert", found=listed).questions[0].answers == (Answer("w2", 0),)


def test_the_bundled_questions():
    sets = {name: load_rows(f"bundled:drug-questions:{name}", name) for name in ("train", "validation", "test")}
    contexts = {name: set(found.dataset["context"]) for name, found in sets.items()}
    assert not contexts["train"] & contexts["validation"]
    for found in sets.values():
        windows_of("bert", task=QuestionAnswering(stride=0), found=found, data=DataConfig())  # each answer stands where it says
        without = sum(not answers["text"] for answers in found.dataset["answers"]) / len(found)
        assert 0.25 < without < 0.4
    answers = {text for found in sets.values() for own in found.dataset["answers"] for text in own["text"]}
    assert {"bipolar disorder", "fibromyalgia", "migraines"} <= {answer.lower() for answer in answers}
