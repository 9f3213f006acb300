"""Token classification: transformers' losses and tags, seqeval's figures, windows, schemes, and rows that are wrong."""

import dataclasses
import functools
import itertools
import json
import string

import datasets
import jax
import numpy as np
import pytest
import seqeval.metrics
import tokenizers
import torch
import transformers
from evaluation_batches import evaluation_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import scheme as schemes
from tiny_models import LABELS, make_pair

from jaxft.config import DataConfig
from jaxft.data.rows import Rows
from jaxft.data.tags import check_scheme, entities_of, mended, scheme_of
from jaxft.data.words import fit_to_words, pieces_of, windows_of
from jaxft.errors import UserError
from jaxft.tasks import TokenClassification
from jaxft.tasks.tag_figures import entity_figures, entity_report, plain_figures

LENGTHS = (3, 17, 9, 24, 1, 12)
LETTERS = string.ascii_lowercase[:20]


def tokenizer():
    """Returns a tokenizer that has a token for each letter, the first of a word or not, with BERT's special tokens."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **special)


def byte_level(*before):
    """Returns a byte-level BPE that tells words by the space before them, behind other splitters."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["the cat sat on the mat"] * 9, tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    if before:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, made.pre_tokenizer])
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def rows(words, tags, features=None):
    made = datasets.Dataset.from_dict({"tokens": words, "tags": tags})
    if features is not None:
        made = made.cast_column("tags", datasets.Sequence(features))
    return Rows(made, "train.jsonl", "line", np.arange(1, len(words) + 1))


def drawn(lengths=LENGTHS, names=LABELS, seed=0):
    """Returns rows of random words of one to four letters, with random tags."""
    random = np.random.default_rng(seed)
    words = [["".join(random.choice(list(LETTERS), random.integers(1, 5))) for _ in range(length)] for length in lengths]
    return rows(words, [random.choice(list(names), length).tolist() for length in lengths])


@functools.cache
def pair(family="bert"):
    return make_pair(family, "token_classification")


def named(*labels):
    """Returns what a task asks of a model beside its outputs."""
    config = type("Config", (), {"labels": labels})
    return type("Model", (), {"config": config, "pooling": "first"})


# ---------------------------------------------------------------- against transformers


def theirs(family, words, tags):
    """Returns transformers' logits at each word's first sub-word, (words, tags), and the loss of a batch, as its own examples have it."""
    reference = pair(family)[0]
    encoded = tokenizer()(words, is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full(encoded["input_ids"].shape, -100)
    for i, row in enumerate(tags):
        numbers = encoded.word_ids(i)
        for at, word in enumerate(numbers):
            if word is not None and word != numbers[at - 1]:
                labels[i, at] = LABELS.index(row[word])
    if family != "bert":
        encoded.pop("token_type_ids")
    with torch.no_grad():
        found = reference(**encoded, labels=labels)
    return found.logits[labels != -100].numpy(), float(found.loss)


@pytest.mark.parametrize(("family", "packing"), [("bert", True), ("bert", False), ("llama", True), ("gpt2", True)])
def test_losses_and_tags_are_those_of_transformers(family, packing):
    _, model, params = pair(family)
    found, task, data = drawn(), TokenClassification(), DataConfig(max_length=80, packing=packing)
    examples = task.examples(found, tokenizer(), data, model)
    assert len(examples) == len(LENGTHS)
    logits, loss = theirs(family, found.dataset["tokens"][:], found.dataset["tags"][:])
    total, weight, made = 0.0, 0.0, []
    program = jax.jit(functools.partial(task.measure, model))
    for batch in evaluation_batches(examples, data, 2, model.pooling == "last"):
        sums, outputs = program(params, batch)
        total, weight = total + float(sums.loss), weight + float(sums.weight)
        made += np.asarray(outputs)[np.asarray(batch["weights"]) > 0].tolist()
    assert weight == sum(LENGTHS)
    np.testing.assert_allclose(total / weight, loss, rtol=1e-4)
    assert sorted(made) == sorted(logits.argmax(-1).tolist())


def test_each_words_logits_in_its_window_are_those_of_transformers_on_that_window():
    reference, model, params = pair()
    found, task, data = drawn((70,)), TokenClassification(stride=6), DataConfig(max_length=40, packing=False)
    examples = task.examples(found, tokenizer(), data, model)
    assert len(examples) > 4
    assert examples.rows.tolist() == [0] * len(examples)
    layout = list(evaluation_batches(examples, data, len(examples), False))
    ours = jax.jit(functools.partial(task.logits, model))(params, layout[0]).reshape(*layout[0]["scored"].shape, -1)
    for i in range(len(examples)):
        part = examples.slots.part(i)
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor(examples.tokens_of(i))[None].long()).logits[0].numpy()
        np.testing.assert_allclose(ours[i, : part.stop - part.start], logits[examples.slots.reads[part]], atol=1e-4)


@pytest.mark.parametrize("options", [{"balanced": True}, {"class_weights": (("yes", 3.0), ("no", 0.5))}, {"label_smoothing": 0.2}], ids=str)
def test_weights_and_smoothing_are_those_of_torch_and_in_training_alone(options):
    _, model, params = pair()
    found, data, task = drawn(), DataConfig(max_length=80), TokenClassification(**options)
    examples = task.examples(found, tokenizer(), data, model)
    assert set(examples.slots.weights.tolist()) == {1.0}
    (batch,) = evaluation_batches(task.for_training(model, examples), data, 8, False)
    sums = jax.jit(functools.partial(task.measure, model))(params, batch)[0]
    logits, _ = theirs("bert", found.dataset["tokens"][:], found.dataset["tags"][:])
    targets = examples.slots.targets
    weights = np.array([0.5, 1.0, 3.0]) if "class_weights" in options else np.ones(3)
    weights = len(targets) / 3 / np.bincount(targets) if "balanced" in options else weights
    weight = torch.tensor(weights, dtype=torch.float32) if len(set(weights)) > 1 else None
    smoothing = options.get("label_smoothing", 0.0)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets).long(), weight, label_smoothing=smoothing)
    np.testing.assert_allclose(float(sums.loss / sums.weight), float(expected), rtol=1e-4)


# ---------------------------------------------------------------- words and windows


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(6, 40), st.integers(0, 8), st.integers(0, 10**6))
def test_every_word_is_scored_once_in_the_window_where_it_has_most_context(count, longest, max_length, stride, seed):
    sizes = np.random.default_rng(seed).integers(1, longest + 1, count)
    begins, total = 1 + np.cumsum([0, *sizes[:-1]]), int(sizes.sum())
    tokens = np.arange(total + 2, dtype=np.int32)
    pieces = pieces_of([["a"]], tokenizer(), ["row 1"])[0]._replace(tokens=tokens, token_types=None, begins=begins)
    room = max_length - 2
    if total > room and room <= stride:
        with pytest.raises(UserError, match=r"config.task.stride. Raise the one or lower the other"):
            windows_of(pieces, max_length, stride)
        return
    found = windows_of(pieces, max_length, stride)
    assert np.concatenate([window.words for window in found]).tolist() == list(range(count))
    for window in found:
        assert len(window.tokens) == min(max_length, total + 2)
        assert (window.tokens[[0, -1]] == [0, total + 1]).all()
        assert (window.tokens[window.reads] == begins[window.words]).all()
    spans = [(int(window.tokens[1]), int(window.tokens[-2])) for window in found]

    def context(at, span):
        return min(at - span[0], span[1] - at)

    for window, span in zip(found, spans, strict=True):
        for at in begins[window.words]:
            assert context(at, span) == max(context(at, other) for other in spans)
    if longest == 1:  # else a window in the midst of a word scores none, and is left out
        assert all(other[0] <= one[1] + 1 - stride for one, other in itertools.pairwise(spans))


def test_words_of_a_byte_level_tokenizer_are_those_of_transformers_rule_and_it_is_written_so(tmp_path):
    made = byte_level()
    vocabulary, merges = json.loads(made.to_str())["model"]["vocab"], json.loads(made.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in merges]
    reference = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges, add_prefix_space=True)
    ours = fit_to_words(transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges))
    words = ["the", "cat", "sat,", "on", "9", "the\u2026"]
    ours.save_pretrained(tmp_path)
    for one in (ours, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        (found,) = pieces_of([words], one, ["row 1"])
        expected = reference(words, is_split_into_words=True)
        assert found.tokens.tolist() == expected["input_ids"]
        assert found.begins.tolist() == [expected.word_ids().index(number) for number in range(len(words))]


def test_words_behind_another_splitter_have_the_space_that_a_text_gives_them():
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    made = fit_to_words(transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(digits)))
    words = ["the", "cat", "sat", "12", "9"]
    (found,) = pieces_of([words], made, ["row 1"])
    assert found.tokens.tolist() == made(" ".join(words))["input_ids"]
    assert len(found.begins) == len(words)


def test_a_word_that_the_tokenizer_strips_stands_as_unknown_and_is_scored():
    found = pieces_of([["ab", "\u200d", "c"], ["a"]], tokenizer(), ["row 1", "row 2"])
    assert tokenizer().convert_ids_to_tokens(found[0].tokens) == ["[CLS]", "a", "##b", "[UNK]", "c", "[SEP]"]
    assert found[0].begins.tolist() == [1, 3, 4]
    without = tokenizer()
    without.unk_token = None
    with pytest.raises(UserError, match=r"row 1: word 2, '\\u200d', is nothing to the tokenizer"):
        pieces_of([["ab", "\u200d", "c"]], without, ["row 1"])


def test_a_number_of_rows_is_all_of_their_windows():
    task = TokenClassification(stride=4)
    examples = task.examples(drawn((30, 3, 20)), tokenizer(), DataConfig(max_length=24), pair()[1])
    first = examples.first(1)
    assert set(first.rows.tolist()) == {0}
    assert len(first) > 1
    assert len(first.words) == len(first.slots.reads) == 30
    assert [part.stop - part.start for part in examples.texts] == [30, 3, 20]
    assert examples.cut.sum() == 0


# ---------------------------------------------------------------- schemes and figures

KINDS = ("DRUG", "SIDE-EFFECT")
REFERENCES = {"IOB2": schemes.IOB2, "IOBES": schemes.IOBES, "BILOU": schemes.BILOU}
LETTERS_OF = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}
NAMES = {name: ["O", *(f"{letter}-{kind}" for letter in letters for kind in KINDS)] for name, letters in LETTERS_OF.items()}


def texts(names):
    """Texts of tags: true and predicted ones, of the same lengths."""
    pairs = st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), min_size=1, max_size=12)
    return st.lists(pairs, min_size=1, max_size=6).map(
        lambda found: ([[one for one, _ in row] for row in found], [[other for _, other in row] for row in found])
    )


@pytest.mark.parametrize("scheme", NAMES)
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_figures_are_those_of_seqeval(scheme, data):
    true, made = data.draw(texts(NAMES[scheme]))
    if scheme != "BILOU":  # which seqeval reads in its strict mode alone
        found = entity_figures(true, made, scheme)
        for name in ("precision", "recall", "f1"):
            assert found[name] == pytest.approx(getattr(seqeval.metrics, f"{name}_score")(true, made, zero_division=0))
        assert found["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(true, made))
    true, made = ([mended(row, scheme) for row in part] for part in (true, made))
    for row in (*true, *made):
        check_scheme(row, scheme, "row 1")
    strict = functools.partial(seqeval.metrics.f1_score, true, made, mode="strict", scheme=REFERENCES[scheme], zero_division=0)
    assert entity_figures(true, made, scheme)["f1"] == pytest.approx(strict())


@pytest.mark.parametrize("scheme", NAMES)
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_tags_are_refused_just_where_seqeval_reads_other_entities_strictly(scheme, data):
    tags = data.draw(st.lists(st.sampled_from(NAMES[scheme]), min_size=1, max_size=10))
    strict = schemes.Entities([tags], REFERENCES[scheme]).entities[0]
    covered = sum(entity.end - entity.start for entity in strict) == sum(tag != "O" for tag in tags)
    try:
        check_scheme(tags, scheme, "row 1")
    except UserError:
        assert not covered
    else:
        assert covered
        assert [(entity.tag, entity.start, entity.end - 1) for entity in strict] == [tuple(entity) for entity in entities_of(tags, scheme)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("O", "B-X", "I-X"), "IOB2"),
        (("O", "I-X"), "IOB2"),
        (("B", "I", "O"), "IOB2"),
        (("O", "S-X"), "IOBES"),
        (("O", "U-X", "L-X", "B-X"), "BILOU"),
        (("ADJ", "NOUN", "SYM"), "plain"),
        (("0", "1"), "plain"),
    ],
    ids=str,
)
def test_the_scheme_is_told_by_the_tags_names(names, expected):
    assert scheme_of(names) == expected
    assert scheme_of(names, "plain") == "plain"


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_plain_tags_are_measured_by_word(count, seed):
    true, made = np.random.default_rng(seed).integers(0, 4, (2, count))
    found = plain_figures(true, made)
    assert found["accuracy"] == pytest.approx((true == made).mean())
    assert 0 <= found["macro_f1"] <= 1


def test_report_shown_and_majority():
    model, task = named("B-DRUG", "B-SIGN", "I-SIGN", "O"), TokenClassification()
    found = rows([list("abcde"), list("fg")], [["B-DRUG", "O", "B-SIGN", "I-SIGN", "O"], ["O", "B-DRUG"]])
    examples = task.examples(found, tokenizer(), DataConfig(), model)
    outputs = np.array([0, 3, 1, 3, 3, 3, 0], np.int32)
    (table,) = task.report(model, examples, outputs).tables
    assert table.columns == ("type", "precision", "recall", "F1", "entities")
    assert table.rows == (("DRUG", "100.0%", "100.0%", "100.0%", "2"), ("SIGN", "0.0%", "0.0%", "0.0%", "1"))
    assert task.shown(model, examples, outputs, [0, 1]) == [("DRUG a; SIGN c d", "DRUG a; SIGN c"), ("DRUG g", "DRUG g")]
    most = task.majority(model, examples, examples)
    shares = {"O": 4 / 11, "B-DRUG": 3 / 11, "B-SIGN": 2 / 11, "I-SIGN": 2 / 11}
    tags = [tag for row in found.dataset["tags"] for tag in row]
    assert most["loss"] == pytest.approx(np.mean([-np.log(shares[tag]) for tag in tags]), rel=1e-5)
    assert (most["f1"], most["accuracy"]) == (0.0, pytest.approx(3 / 7))
    assert task.metrics(model) == ("loss", "precision", "recall", "f1", "accuracy")
    assert entity_report([["O"]], [["O"]], "IOB2").tables == ()


def test_each_words_commonest_tag_is_measured_beside_it():
    model, task, data = named("B-DRUG", "O"), TokenClassification(), DataConfig()
    training = rows([["Pill", "pill", "pill", "day"], ["day"]], [["B-DRUG", "B-DRUG", "O", "O"], ["O"]])
    test = rows([["PILL", "day", "night"]], [["B-DRUG", "B-DRUG", "O"]])
    sets = [(found, task.examples(found, tokenizer(), data, model)) for found in (training, test)]
    found = task.word_baseline(model, data, 0, *sets)["commonest"]
    drug, other = 3 / 7, 4 / 7  # of all tags, with one of each added
    shares = [(2 + drug) / 4, drug / 3, other]  # of pill's three, day's two, and a word that training lacks
    assert found["loss"] == pytest.approx(-np.log(shares).mean())
    assert (found["precision"], found["recall"], found["accuracy"]) == (1.0, 0.5, pytest.approx(2 / 3))


def test_report_and_shown_of_plain_tags():
    model, task = named("DET", "NOUN"), TokenClassification()
    examples = task.examples(rows([list("ab")], [["DET", "NOUN"]]), tokenizer(), DataConfig(), model)
    outputs = np.array([0, 0], np.int32)
    assert task.report(model, examples, outputs).tables[0].rows[0] == ("DET", "50.0%", "100.0%", "66.7%", "1")
    assert task.shown(model, examples, outputs, [0]) == [("a/DET b/NOUN", "a/DET b/DET")]
    assert task.metrics(model) == ("loss", "accuracy", "macro_f1")


# ---------------------------------------------------------------- labels and what is wrong


def test_labels_are_the_rows_own_sorted_or_the_features_or_the_given_ones():
    options = functools.partial(TokenClassification().model_options, data=DataConfig())
    assert options(drawn())["labels"] == ("maybe", "no", "yes")
    assert options(rows([["a", "b", "c"]], [[10, 9, 2]]))["labels"] == ("2", "9", "10")
    feature = datasets.ClassLabel(names=["O", "B-X"])
    assert options(rows([["a", "b"]], [[1, 0]], feature))["labels"] == ("O", "B-X")
    examples = TokenClassification().examples(rows([["a", "b"]], [[1, 0]], feature), tokenizer(), DataConfig(), named("O", "B-X"))
    assert examples.slots.targets.tolist() == [1, 0]
    given = TokenClassification(labels=LABELS)
    assert given.model_options(rows([["a", "b"]], [[2, 0]]), DataConfig())["labels"] == LABELS
    assert given.examples(rows([["a", "b"]], [[2, 0]]), tokenizer(), DataConfig(), named(*LABELS)).slots.targets.tolist() == [2, 0]


def test_numbers_are_what_the_sets_own_feature_calls_them():
    """Another set's feature, or the model's files, may have the names in another order."""
    found = rows([["a", "b", "c"]], [[1, 2, 0]], datasets.ClassLabel(names=["O", "B-X", "I-X"]))
    model, task = named("O", "I-X", "B-X"), TokenClassification()
    assert task.examples(found, tokenizer(), DataConfig(), model).slots.targets.tolist() == [2, 1, 0]
    assert not task.faults(found, tokenizer(), DataConfig(), {"labels": model.config.labels})
    mending = TokenClassification(mend_tags=True)
    assert mending.examples(found, tokenizer(), DataConfig(), model).slots.targets.tolist() == [2, 1, 0]
    given = TokenClassification(labels=("O", "B-X", "I-X"))  # which the model has in the order of its files
    numbers = rows([["a", "b", "c"]], [[1, 2, 0]])
    assert given.examples(numbers, tokenizer(), DataConfig(), model).slots.targets.tolist() == [2, 1, 0]


def test_tags_of_iob1_are_mended_where_that_is_asked():
    found, task = rows([list("abcd")], [["I-X", "I-X", "B-X", "O"]]), TokenClassification(mend_tags=True)
    assert task.model_options(found, DataConfig()) == {"labels": ("B-X", "I-X", "O")}
    examples = task.examples(found, tokenizer(), DataConfig(), named("B-X", "I-X", "O"))
    assert examples.slots.targets.tolist() == [0, 1, 0, 2]
    only = rows([list("ab")], [["I-X", "O"]])
    assert task.model_options(only, DataConfig())["labels"] == ("B-X", "O")
    with pytest.raises(UserError, match="task.mend_tags is for tags that mark entities"):
        task.model_options(drawn(), DataConfig())


WRONG = {
    "of another length": ([["a", "b"]], [["B-X"]], r"train.jsonl, line 1: 2 words in 'tokens', but 1 tags in 'tags'"),
    "empty": ([["a"], []], [["O"], []], r"line 2: 'tokens' is empty"),
    "blank word": ([["a", " "]], [["O", "O"]], r"line 1: word 2 of 'tokens' has no letters"),
    "no word": ([["a", None]], [["O", "O"]], r"line 1: word 2 of 'tokens' must be text, not None"),
    "no tag": ([["a", "b"]], [["O", None]], r"line 1: tag 2 of 'tags' is empty"),
    "unknown": ([["a", "b"]], [["O", "B-Y"]], r"line 1: tag 2 'B-Y' is none of the model's. Did you mean 'B-X'\?.*config.task.labels"),
    "continues nothing": ([["a", "b"]], [["O", "I-X"]], r"line 1: tag 2 is 'I-X' after O, which is not IOB2: 'B-X' would be.*mend_tags"),
    "text": (["a b"], [["O", "B-X"]], r"line 1: 'tokens' must be a list, one part a word, not 'a b'"),
    "out of range": ([["a"]], [[7]], r"line 1: tag 1 '7' is none of the model's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_wrong_is_told_with_its_place(name):
    words, tags, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        TokenClassification().examples(rows(words, tags), tokenizer(), DataConfig(), named("B-X", "I-X", "O"))


@pytest.mark.parametrize(
    ("tags", "options", "message"),
    [
        (["O", "O"], {}, "column 'tags' has one tag only, 'O'"),
        (["B-X", "DRUG"], {}, "tag 'DRUG' isn't one of the scheme IOB2, as others are: B-..., I-... and O.*config.task.scheme=plain"),
        (["NOUN", "DET"], {"scheme": "IOBES"}, "tag 'DET' isn't one of the scheme IOBES"),
        (["O", "B-X"], {"class_weights": (("B-Y", 2.0),)}, "no label in task.class_weights 'B-Y'"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_the_settings_are_refused_before_the_model_is_loaded(tags, options, message):
    with pytest.raises(UserError, match=message):
        TokenClassification(**options).model_options(rows([["a", "b"]], [tags]), DataConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "IOB1"}, "no task.scheme 'IOB1'. Did you mean 'IOB2'"),
        ({"stride": -1}, "task.stride is a number of sub-words, 0 or more"),
        ({"label_smoothing": 1.0}, "task.label_smoothing is a share"),
        ({"balanced": True, "class_weights": (("O", 0.1),)}, "Give one of them"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TokenClassification(**options)


def test_of_a_scheme_the_rows_that_are_not_are_told_without_a_model():
    tags = [["B-X", "I-X"], ["O", "X"], ["O", "I-X"], ["B-X", "O"]]
    found = Rows(datasets.Dataset.from_dict({"tokens": [["a", "b"]] * 4, "tags": tags}), "train.jsonl", "line", np.arange(1, 5))

    def faults(task, options=None):
        return task.faults(found, None, DataConfig(), options or {})

    assert {i: reason[:25] for i, reason in faults(TokenClassification()).items()} == {
        1: "The tag 'X' isn't one of ",
        2: "tag 2 is 'I-X' after O, w",
    }
    assert list(faults(TokenClassification(mend_tags=True))) == [1]
    assert faults(TokenClassification(scheme="plain")) == {}
    assert list(faults(TokenClassification(scheme="plain"), {"labels": ("B-X", "I-X", "O")})) == [1]


def test_columns_have_other_names_where_that_is_said():
    found, data = drawn(), DataConfig(tokens="words", tags="ner_tags")
    with pytest.raises(UserError, match=r"train.jsonl, line 1: there is no column 'words'.*has: tokens, tags.*in config.data.tokens"):
        TokenClassification().model_options(found, data)
    renamed = dataclasses.replace(found, dataset=found.dataset.rename_columns({"tokens": "words", "tags": "ner_tags"}))
    assert TokenClassification().model_options(renamed, data)["labels"] == ("maybe", "no", "yes")
    with pytest.raises(UserError, match="config.data.label has no effect with the task TokenClassification"):
        TokenClassification().check(DataConfig(label="ner_tags"))
