"""Sequence classification: transformers' losses, scikit-learn's figures, and labels that are wrong."""

import dataclasses
import functools

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import torchmetrics.functional
import torchmetrics.functional.classification as theirs_of
import transformers
from evaluation_batches import evaluation_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LABELS, make_pair

from jaxft.config import DataConfig
from jaxft.data.labels import label_column
from jaxft.data.sources import Rows, load_rows
from jaxft.data.texts import check_pairs
from jaxft.errors import UserError
from jaxft.models.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from jaxft.tasks import SequenceClassification, class_figures
from jaxft.tasks.class_figures import figures, word_logits

WORDS = [f"w{number}" for number in range(80)]
LENGTHS = (3, 17, 9, 40, 1, 12)


def tokenizer():
    """Returns a tokenizer of words, with BERT's special tokens."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def rows(labels, pairs=False, features=None, seed=0):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, length)) for length in LENGTHS]
    columns = {"text": texts, "label": list(labels)} | ({"text_pair": texts[::-1]} if pairs else {})
    made = datasets.Dataset.from_dict(columns)
    if features is not None:
        made = made.cast_column("label", features)
    return Rows(made, "train.jsonl", "line", np.arange(1, len(texts) + 1))


PROBLEMS = {
    SINGLE_LABEL: ["yes", "no", "maybe", "yes", "no", "no"],
    MULTI_LABEL: [["yes"], [], ["no", "maybe"], ["yes", "no"], ["maybe"], ["no"]],
    REGRESSION: [[0.5, 1.0, -2.0]] * 3 + [[0.25, 0.0, 1.5]] * 3,
}


@functools.cache
def pair(family, problem):
    return make_pair(family, "sequence_classification", problem_type=problem)


def batches(model, task, data, found, size):
    examples = task.examples(found, tokenizer(), data, model)
    return examples, list(evaluation_batches(examples, data, size, model.pooling == "last", 0))


def measured(family, problem, task, data, found, size=2):
    """Returns the sums of a set and the outputs of its examples in the order of the batches' slots."""
    _, model, params = pair(family, problem)
    _, every = batches(model, task, data, found, size)
    program = jax.jit(functools.partial(task.measure, model))
    sums = [program(params, batch) for batch in every]
    return jax.tree.map(lambda *parts: float(sum(parts)), *[one for one, _ in sums])


def theirs(family, problem, found, targets, pairs=()):
    """Returns transformers' mean loss, one text at a time."""
    reference, losses = pair(family, problem)[0], []
    for i, text in enumerate(found.dataset["text"]):
        given = tokenizer()(text, pairs[i] if pairs else None, return_tensors="pt")
        if family != "bert":
            given.pop("token_type_ids")
        with torch.no_grad():
            losses.append(float(reference(**given, labels=torch.tensor(targets[i])[None]).loss))
    return np.mean(losses)


@pytest.mark.parametrize(
    ("family", "problem", "packing"),
    [("bert", SINGLE_LABEL, False), *((family, problem, True) for family in ("bert", "llama", "gpt2") for problem in PROBLEMS)],
)
def test_losses_are_those_of_transformers(family, problem, packing):
    found, task = rows(PROBLEMS[problem]), SequenceClassification()
    assert task.model_options(found, DataConfig())["problem_type"] == problem
    sums = measured(family, problem, task, DataConfig(max_length=64, packing=packing), found)
    targets = task.examples(found, tokenizer(), DataConfig(max_length=64), pair(family, problem)[1]).slots.targets
    expected = theirs(family, problem, found, targets.astype(np.int64) if problem == SINGLE_LABEL else targets)
    assert sums.weight == len(LENGTHS)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-4)


def test_the_second_text_of_a_pair_has_its_own_token_type():
    found, task = rows(PROBLEMS[SINGLE_LABEL], pairs=True), SequenceClassification()
    data = DataConfig(max_length=128)
    targets = task.examples(found, tokenizer(), data, pair("bert", SINGLE_LABEL)[1]).slots.targets
    sums = measured("bert", SINGLE_LABEL, task, data, found)
    expected = theirs("bert", SINGLE_LABEL, found, targets.astype(np.int64), found.dataset["text_pair"])
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-4)


def test_of_a_pair_that_is_too_long_the_longer_text_is_cut_as_transformers_does():
    found, task = rows(PROBLEMS[SINGLE_LABEL], pairs=True), SequenceClassification()
    examples = task.examples(found, tokenizer(), DataConfig(max_length=24), pair("bert", SINGLE_LABEL)[1])
    for i, row in enumerate(found.dataset):
        whole = tokenizer()(row["text"], row["text_pair"])["input_ids"]
        expected = tokenizer()(row["text"], row["text_pair"], truncation=True, max_length=24)["input_ids"]
        assert examples.tokens_of(i).tolist() == expected
        assert examples.cut[i] == len(whole) - len(expected)


@pytest.mark.parametrize("options", [{"balanced": True}, {"class_weights": (("yes", 3.0), ("no", 0.5))}], ids=str)
def test_weights_of_labels_are_those_of_torch_and_in_training_alone(options):
    found, data = rows(PROBLEMS[SINGLE_LABEL]), DataConfig(max_length=64)
    task, (reference, model, params) = SequenceClassification(**options), pair("bert", SINGLE_LABEL)
    examples = task.examples(found, tokenizer(), data, model)
    trained = task.for_training(model, examples)
    assert examples.slots.weights.tolist() == [1.0] * len(LENGTHS)
    (batch,) = evaluation_batches(trained, data, 6, False)
    sums = task.measure(model, params, batch)[0]
    given = tokenizer()(list(found.dataset["text"]), padding=True, return_tensors="pt")
    names = PROBLEMS[SINGLE_LABEL]
    if options.get("balanced"):
        weights = torch.tensor([len(names) / (3 * names.count(label)) for label in LABELS])
    else:
        weights = torch.tensor([0.5, 1.0, 3.0])
    with torch.no_grad():
        targets = torch.tensor(examples.slots.targets).long()
        expected = torch.nn.functional.cross_entropy(reference(**given).logits, targets, weights)
    np.testing.assert_allclose(float(sums.loss / sums.weight), float(expected), rtol=1e-4)


def test_r_drop_adds_half_the_symmetric_divergence_to_the_mean_of_two_passes():
    _, model, params = pair("bert", SINGLE_LABEL)
    task, data = SequenceClassification(label_smoothing=0.1), DataConfig(max_length=64)
    _, (batch,) = batches(model, task, data, rows(PROBLEMS[SINGLE_LABEL]), 6)
    key = jax.random.key(3)
    found = task.sums(model, params, batch, {"dropout": key}, r_drop=0.7)

    def logits(number):
        own = jax.random.fold_in(key, number)
        hidden = task.hidden(model, params, batch, {"dropout": own})
        return model.apply({"params": params}, hidden, method="logits", rngs={"dropout": jax.random.fold_in(key, 2 + number)})

    one, other = logits(0), logits(1)
    targets, weights = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
    mean = (task.loss(model, one, targets, weights).loss + task.loss(model, other, targets, weights).loss) / 2
    first, second = (jax.nn.log_softmax(part) for part in (one, other))
    apart = ((np.exp(first) * (first - second)).sum(-1) + (np.exp(second) * (second - first)).sum(-1)) / 2
    assert float(np.sum(apart * weights)) > 0.01  # dropout is on
    np.testing.assert_allclose(float(found.loss), float(mean + 0.35 * np.sum(apart * weights)), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 5), st.integers(0, 10**6))
def test_figures_are_those_of_torchmetrics(count, labels, seed):
    random = np.random.default_rng(seed)
    outputs = random.standard_normal((count, labels)).astype(np.float32)
    true = random.integers(0, labels, count)
    found, made = figures(true, outputs, SINGLE_LABEL), outputs.argmax(1)
    single = {"preds": torch.tensor(outputs), "target": torch.tensor(true), "num_classes": labels}
    assert found["accuracy"] == pytest.approx(float(theirs_of.multiclass_accuracy(**single, average="micro")))
    assert found["macro_f1"] == pytest.approx(float(theirs_of.multiclass_f1_score(**single, average="macro")), abs=1e-6)
    if len(set(true)) > 1 and len(set(made)) > 1:  # else the correlation is 0 over 0
        assert found["mcc"] == pytest.approx(float(theirs_of.multiclass_matthews_corrcoef(**single)), abs=1e-6)
    several = random.integers(0, 2, (count, labels))
    found = figures(several, outputs, MULTI_LABEL)
    multiple = {"preds": torch.tensor(outputs).sigmoid(), "target": torch.tensor(several), "num_labels": labels}
    assert found["accuracy"] == pytest.approx(float(theirs_of.multilabel_exact_match(**multiple)))
    assert found["micro_f1"] == pytest.approx(float(theirs_of.multilabel_f1_score(**multiple, average="micro")), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(float(theirs_of.multilabel_f1_score(**multiple, average="macro")), abs=1e-6)
    values = random.standard_normal((count, 1)).astype(np.float32)
    found, pair_of = figures(values, outputs[:, :1], REGRESSION), [torch.tensor(part[:, 0]) for part in (outputs, values)]
    assert found["pearson"] == pytest.approx(float(torchmetrics.functional.pearson_corrcoef(*pair_of)), abs=1e-5)
    assert found["spearman"] == pytest.approx(float(torchmetrics.functional.spearman_corrcoef(*pair_of)), abs=1e-5)


def test_a_correlation_with_a_constant_is_0():
    assert figures(np.ones((4, 1), np.float32), np.arange(4.0)[:, None], REGRESSION) == {"pearson": 0.0, "spearman": 0.0}


def test_the_majority_has_the_loss_of_the_shares_in_training():
    _, model, _ = pair("bert", SINGLE_LABEL)
    task, data = SequenceClassification(), DataConfig(max_length=64)
    training = task.examples(rows(["no", "no", "no", "no", "yes", "maybe"]), tokenizer(), data, model)
    test = task.examples(rows(["no", "yes", "yes", "no", "no", "maybe"]), tokenizer(), data, model)
    found = task.majority(model, training, test)
    shares = {"no": 5 / 9, "yes": 2 / 9, "maybe": 2 / 9}
    expected = np.mean([-np.log(shares[label]) for label in ["no", "yes", "yes", "no", "no", "maybe"]])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == 0.5


def test_the_linear_baseline_knows_words_and_does_without():
    texts, classes = ["good pill", "bad pill", "good day", "bad day"] * 5, np.array([0, 1, 0, 1] * 5)
    assert word_logits(texts, classes, ["good night", "bad night"], 2).argmax(1).tolist() == [0, 1]
    assert np.ptp(word_logits(["!!", "??"], np.array([0, 1]), ["!"], 2)) == 0


def test_the_linear_baseline_draws_from_all_rows_where_there_are_many(monkeypatch):
    monkeypatch.setattr(class_figures, "MOST_TEXTS", 20)
    texts, classes = [*["good pill"] * 30, *["bad pill"] * 30], np.repeat([0, 1], 30)  # sorted by their label, as files often are
    one, again, other = (word_logits(texts, classes, ["good", "bad"], 2, seed) for seed in (0, 0, 1))
    assert one.argmax(1).tolist() == [0, 1]
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_the_report_counts_each_label():
    _, model, _ = pair("bert", SINGLE_LABEL)
    task, data = SequenceClassification(), DataConfig(max_length=64)
    examples = task.examples(rows(PROBLEMS[SINGLE_LABEL]), tokenizer(), data, model)
    outputs = np.eye(3, dtype=np.float32)[[2, 0, 0, 2, 0, 1]]  # yes no no yes no maybe, of yes no maybe yes no no
    report = task.report(model, examples, outputs)
    assert report.tables[0].rows == (
        ("no", "66.7%", "66.7%", "66.7%", "3"),
        ("maybe", "0.0%", "0.0%", "0.0%", "1"),
        ("yes", "100.0%", "100.0%", "100.0%", "2"),
    )
    assert report.pictures["confusion.png"].startswith(b"\x89PNG")
    assert task.shown(model, examples, outputs, [0, 5]) == [("yes", "yes"), ("no", "maybe")]


def test_names_with_dollars_are_no_formulas():
    found = class_figures.class_report(np.asarray([0, 1]), np.eye(2), ["$1_$", "a"], SINGLE_LABEL)
    assert found.pictures["confusion.png"].startswith(b"\x89PNG")


def test_figures_of_a_model_in_bfloat16_are_of_float32():
    _, model, params = pair("bert", REGRESSION)
    model = model.clone(dtype=jnp.bfloat16)
    task, data = SequenceClassification(), DataConfig(max_length=64)
    _, (batch,) = batches(model, task, data, rows(PROBLEMS[REGRESSION]), 6)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert jax.eval_shape(functools.partial(task.measure, model), params, batch)[1].dtype == jnp.float32


def test_rows_that_name_no_label_are_refused():
    with pytest.raises(UserError, match="names no label at all"):
        SequenceClassification().model_options(rows([[]] * len(LENGTHS)), DataConfig())


def test_a_second_text_is_in_all_sets_or_in_none():
    with_pairs, without = rows(PROBLEMS[SINGLE_LABEL], pairs=True), rows(PROBLEMS[SINGLE_LABEL])
    check_pairs({"train": without, "test": without}, DataConfig())
    check_pairs({"train": with_pairs, "test": without}, DataConfig(text_pair="{text}"))
    with pytest.raises(UserError, match=r"train has the column 'text_pair', and validation, test hasn't"):
        check_pairs({"train": with_pairs, "validation": without, "test": without}, DataConfig())


def test_labels_are_the_rows_own_sorted_or_the_features_or_the_given_ones():
    options = functools.partial(SequenceClassification().model_options, data=DataConfig())
    assert options(rows(PROBLEMS[SINGLE_LABEL]))["labels"] == ("maybe", "no", "yes")
    assert options(rows([10, 9, 2, 2, 10, 9]))["labels"] == ("2", "9", "10")
    feature = datasets.ClassLabel(names=["b", "a"])
    assert options(rows([0, 1, 1, 0, 0, 1], features=feature))["labels"] == ("b", "a")
    given = SequenceClassification(labels=LABELS)
    assert given.model_options(rows([0, 1, 2, 0, 0, 1]), DataConfig())["labels"] == LABELS
    _, model, _ = pair("bert", SINGLE_LABEL)
    examples = given.examples(rows([0, 1, 2, 0, 0, 1]), tokenizer(), DataConfig(), model)
    assert examples.slots.targets.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["0.5", "1.25", "-2", "3e-1", "0", "1"], REGRESSION),
        (["1.0", "2.0", "1.0", "1.0", "2.0", "2.0"], REGRESSION),  # as in JSON
        (["1", "2", "1", "3", "2", "1"], SINGLE_LABEL),
        (["0.5", "good", "0.5", "bad", "good", "bad"], SINGLE_LABEL),
        (["1", "nan", "2", "nan", "1", "2"], SINGLE_LABEL),
    ],
    ids=str,
)
def test_labels_of_a_text_file_are_of_the_kind_that_json_lines_have(labels, problem, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"w1 w2,{label}\n" for label in labels))
    found, task = load_rows(str(tmp_path / "rows.csv"), "train"), SequenceClassification()
    options = task.model_options(found, DataConfig())
    assert options["problem_type"] == problem
    if problem == REGRESSION:
        assert options["labels"] == ("LABEL_0",)
        column = label_column(found, "label")
        np.testing.assert_allclose(column.numbers(1)[:, 0], [float(label) for label in labels])


def test_several_labels_are_right_where_all_are_in_training_and_in_evaluation():
    _, model, params = pair("bert", MULTI_LABEL)
    task, data = SequenceClassification(), DataConfig(max_length=64)
    _, (batch,) = batches(model, task, data, rows(PROBLEMS[MULTI_LABEL]), 6)
    sums, outputs = task.measure(model, params, batch)
    trained = task.sums(model, params, batch, {})
    real = batch["weights"].reshape(-1) > 0
    true, made = (np.asarray(part).reshape(-1, 3)[real] for part in (batch["targets"], outputs))
    accuracy = figures(true, made, MULTI_LABEL)["accuracy"]
    assert ((made > 0) == true).mean() not in (0.0, 1.0, accuracy)
    assert float(trained.correct / trained.weight) == pytest.approx(accuracy) == pytest.approx(float(sums.correct / sums.weight))


WRONG = {
    "of another set": (["yes", "no", "yess", "no", "no", "no"], {}, r"train.jsonl, line 3: label 'yess' .* Did you mean 'yes'"),
    "out of range": ([0, 1, 3, 0, 0, 1], {"labels": LABELS}, r"line 3: label 3 is none of the 3 classes, 0 to 2"),
    "none": (["yes", None, "no", "no", "no", "no"], {}, r"line 2: .*label"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_label_that_the_model_has_not_is_told_with_its_place(name):
    labels, options, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        SequenceClassification(**options).examples(rows(labels), tokenizer(), DataConfig(), pair("bert", SINGLE_LABEL)[1])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["yes", "", "no", "no", "no", "no"], {}, "line 2: column 'label' is empty"),
        ([["yes"], ["no", None], ["no"], ["no"], ["no"], ["no"]], {}, "line 2: column 'label' is empty"),
        ([{"a": 1}] * 6, {}, "line 1: column 'label' holds {'a': 1}"),
        (["yes"] * 6, {}, "one label only, 'yes'"),
        (PROBLEMS[MULTI_LABEL], {"balanced": True}, "are for single labels, not for multi_label_classification"),
        (PROBLEMS[REGRESSION], {"label_smoothing": 0.1}, "label_smoothing is for single labels"),
        (PROBLEMS[SINGLE_LABEL], {"class_weights": (("maybee", 2.0),)}, "no label in task.class_weights 'maybee'"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_the_settings_are_refused_before_the_model_is_loaded(labels, options, message):
    with pytest.raises(UserError, match=message):
        SequenceClassification(**options).model_options(rows(labels), DataConfig())


def test_a_column_or_a_text_that_is_missing_is_told():
    found = rows(PROBLEMS[SINGLE_LABEL])
    task, model = SequenceClassification(), pair("bert", SINGLE_LABEL)[1]
    with pytest.raises(UserError, match=r"has no column 'labels' of labels. Did you mean 'label'"):
        task.model_options(found, DataConfig(label="labels"))
    empty = dataclasses.replace(found, dataset=found.dataset.map(lambda row, i: {"text": "" if i == 3 else row["text"]}, with_indices=True))
    with pytest.raises(UserError, match=r"train.jsonl, line 4: the text is empty"):
        task.examples(empty, tokenizer(), DataConfig(), model)
    with pytest.raises(UserError, match=r"max_length is 2: 2 special tokens leave no room"):
        task.examples(found, tokenizer(), DataConfig(max_length=2), model)


def test_settings_of_another_task_are_refused():
    with pytest.raises(UserError, match="config.data.completion has no effect with the task SequenceClassification"):
        SequenceClassification().check(DataConfig(prompt="{text}", completion="{label}"))
