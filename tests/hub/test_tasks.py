"""A model's task: files of the bare model, of the task and of other tasks; labels; what is drawn anew; what is written."""

import copy
import functools
import json
import shutil
import tempfile

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import torch
import transformers
from tiny_models import LABELS, same_bits

import jaxft
from jaxft.errors import UserError
from jaxft.hub.load import describe_pretrained
from jaxft.hub.save import auto_class

# float32 on both sides, outputs of order 1 to 10: a wrong operation is off by far more, rounding by far less
TOLERANCE = 1e-4

CLASSES, TAGS, SPANS, WORDS = "sequence_classification", "token_classification", "question_answering", "masked_lm"
CASES = [
    *((family, task) for family in ("bert", "roberta", "distilbert", "electra") for task in (CLASSES, TAGS, SPANS, WORDS)),
    ("xlm-roberta", CLASSES),
    ("camembert", WORDS),
    *(("gpt2", task) for task in (CLASSES, TAGS, SPANS)),
    *(("qwen2", task) for task in (CLASSES, TAGS, SPANS)),
    ("mistral", SPANS),
]


@functools.cache
def _saved(family, task, settings="{}"):
    reference = tiny_models.make_reference(family, task, **json.loads(settings))
    folder = tempfile.mkdtemp()
    reference.save_pretrained(folder)
    return reference, folder


@pytest.fixture
def theirs(tmp_path):
    """Writes a model of transformers with a head, returns it and its folder, which may be changed."""

    def make(family, task, **settings):
        reference, folder = _saved(family, task, json.dumps(settings))
        shutil.copytree(folder, tmp_path / "theirs")
        return reference, tmp_path / "theirs"

    return make


@pytest.fixture
def bare(tmp_path):
    """Writes the model without a head of a BERT with tags, returns it and its folder."""
    reference = _saved("bert", TAGS)[0].bert
    reference.save_pretrained(tmp_path / "bare")
    return reference, tmp_path / "bare"


def edit(folder, change):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path, metadata={"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def outputs(out):
    """Returns a head's outputs as one array."""
    if getattr(out, "logits", None) is None:
        return np.stack([np.asarray(out.start_logits), np.asarray(out.end_logits)])
    return np.asarray(out.logits)


def difference(model, params, reference):
    """Returns the largest difference of a head's outputs on rows without padding."""
    ids = np.random.default_rng(1).integers(2, tiny_models.VOCABULARY, (2, 9)).astype(np.int32)
    with torch.no_grad():
        expected = outputs(reference(torch.tensor(ids)))
    found = outputs(model.apply({"params": params}, ids))
    assert found.shape == expected.shape
    return np.abs(found - expected).max()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_what_is_written_is_loaded_by_transformers(family, task, theirs, tmp_path):
    original, folder = theirs(family, task, **({"problem_type": "multi_label_classification"} if task == CLASSES else {}))
    model, params = jaxft.load_pretrained(folder, task=task)
    params = jax.tree.map(lambda leaf: leaf * 1.25, params)
    jaxft.save_pretrained(tmp_path / "ours", model, params)
    reference, info = getattr(transformers, auto_class(task)).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(reference) is type(original)
    assert difference(model, params, reference.eval()) <= TOLERANCE
    assert reference.config.id2label == original.config.id2label
    assert reference.config.label2id == original.config.label2id
    assert reference.config.problem_type == original.config.problem_type
    again, loaded = jaxft.load_pretrained(tmp_path / "ours", task=task)
    assert same_bits(params, loaded)
    assert {**vars(again.config), "hf": ""} == {**vars(model.config), "hf": ""}


def test_the_name_of_an_unlabelled_model_of_one_number_survives(theirs, tmp_path):
    _, folder = theirs("bert", CLASSES, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}, problem_type="regression")
    model, params = jaxft.load_pretrained(folder, task=CLASSES)
    assert (model.config.labels, model.config.problem_type) == (("LABEL_0",), "regression")
    jaxft.save_pretrained(tmp_path / "ours", model, params)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (config.num_labels, config.problem_type) == (1, "regression")


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of the tiny models' vocabulary."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(tiny_models.VOCABULARY - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(tmp_path / "vocab.txt"))


def test_pipelines_name_the_classes(theirs, tokenizer, tmp_path):
    _, folder = theirs("bert", CLASSES)
    model, params = jaxft.load_pretrained(folder, task=CLASSES, labels=("bad", "good"), seed=4)
    jaxft.save_pretrained(tmp_path / "ours", model, params, tokenizer)
    found = transformers.pipeline("text-classification", str(tmp_path / "ours"), top_k=None)(["w7 w11 w3"])[0]
    ids = np.array([tokenizer("w7 w11 w3")["input_ids"]], np.int32)
    expected = jax.nn.softmax(model.apply({"params": params}, ids).logits[0])
    scores = {row["label"]: row["score"] for row in found}
    assert sorted(scores) == ["bad", "good"]
    np.testing.assert_allclose([scores["bad"], scores["good"]], expected, rtol=1e-5)


def test_a_causal_model_without_a_padding_token_gets_the_tokenizers_for_batches(theirs, tokenizer, tmp_path):
    _, folder = theirs("qwen2", CLASSES)
    configure(folder, pad_token_id=None)
    model, params = jaxft.load_pretrained(folder, task=CLASSES)
    jaxft.save_pretrained(tmp_path / "ours", model, params, tokenizer)
    texts = ["w7 w11 w3", "w5", "w9 w9"]
    found = transformers.pipeline("text-classification", str(tmp_path / "ours"), tokenizer=tokenizer, top_k=None)(texts, batch_size=3)
    batch = tokenizer(texts, padding=True, return_tensors="np")
    logits = model.apply({"params": params}, batch["input_ids"].astype(np.int32), attention_mask=batch["attention_mask"]).logits
    scores = [[next(row["score"] for row in rows if row["label"] == label) for label in LABELS] for rows in found]
    np.testing.assert_allclose(scores, jax.nn.softmax(logits), rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tokenizer_without_a_padding_token_pads_with_its_end_as_training_does(family, theirs, tokenizer, tmp_path):
    """GPT-2's and Llama 2's own have none, and transformers' pipeline would take one text at a time."""
    _, folder = theirs(family, CLASSES)
    configure(folder, pad_token_id=None)
    own = copy.deepcopy(tokenizer)
    own.pad_token, own.eos_token = None, "[SEP]"
    model, params = jaxft.load_pretrained(folder, task=CLASSES)
    jaxft.save_pretrained(tmp_path / "ours", model, params, own)
    assert own.pad_token is None
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert written.pad_token == "[SEP]"
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["pad_token_id"] == written.pad_token_id
    texts = ["w7 w11 w3", "w5", "w9 w9"]
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "ours"), top_k=None)
    together, alone = pipeline(texts, batch_size=3), [pipeline([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        scores = [{row["label"]: row["score"] for row in rows} for rows in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_an_untied_head_takes_the_bias_that_its_files_have_once(theirs):
    """As transformers 4 wrote it, where the bias of the head and of its last layer were one."""
    folder = theirs("bert", WORDS, tie_word_embeddings=False)[1]
    params = jaxft.load_pretrained(folder, task=WORDS)[1]
    bias = np.random.default_rng(0).normal(size=len(params["lm_head"]["decoder"]["bias"])).astype(np.float32)

    def without(name):
        return lambda tensors: {own: value for own, value in tensors.items() if own != f"cls.predictions.decoder.{name}"}

    edit(folder, lambda tensors: without("bias")(tensors) | {"cls.predictions.bias": bias})
    np.testing.assert_array_equal(jaxft.load_pretrained(folder, task=WORDS)[1]["lm_head"]["decoder"]["bias"], bias)
    edit(folder, without("weight"))
    with pytest.raises(UserError, match=r"lacks cls\.predictions\.decoder\.weight"):  # the table of words is no head's weight
        jaxft.load_pretrained(folder, task=WORDS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_sees_what_stands_behind_is_refused(family, theirs):
    _, folder = theirs(family, CLASSES)
    configure(folder, is_causal=False)
    with pytest.raises(UserError, match="is_causal false"):
        jaxft.load_pretrained(folder, task=CLASSES)


def test_a_config_that_lacks_its_class_or_its_type_is_told_what_to_write(theirs):
    _, folder = theirs("bert", WORDS)
    whole = json.loads((folder / "config.json").read_text())
    configure(folder, architectures=None)
    with pytest.raises(UserError, match=r'as "architectures": \["BertForMaskedLM"\], or one of .*BertModel'):
        jaxft.load_pretrained(folder, task=WORDS)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in whole.items() if name != "model_type"}))
    with pytest.raises(UserError, match='Write into it "model_type": "bert"'):
        jaxft.load_pretrained(folder, task=WORDS)


def test_a_pickled_model_is_to_be_converted_by_the_class_that_has_all_of_it(theirs):
    _, folder = theirs("bert", TAGS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(UserError, match=r"t\.BertForTokenClassification\.from_pretrained"):
            jaxft.load_pretrained(source, task=TAGS)


def test_a_head_of_the_bare_models_files_is_drawn_from_the_seed_and_the_rest_is_theirs(bare):
    reference, folder = bare
    model, params = jaxft.load_pretrained(folder, task=CLASSES, labels=("a", "b", "c", "d"), seed=1)
    assert (model.config.architecture, model.config.labels) == ("BertForSequenceClassification", ("a", "b", "c", "d"))
    assert model.head == ("pooler", "classifier")
    ids = np.arange(2, 9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).last_hidden_state.numpy()
    assert np.abs(model.apply({"params": params}, ids, method="features") - expected).max() <= TOLERANCE
    _, again = jaxft.load_pretrained(folder, task=CLASSES, labels=("a", "b", "c", "d"), seed=1)
    _, other = jaxft.load_pretrained(folder, task=CLASSES, labels=("a", "b", "c", "d"), seed=2)
    assert same_bits(params, again)
    assert not np.array_equal(params["classifier"]["kernel"], other["classifier"]["kernel"])
    for part in ("pooler", "classifier"):
        kernel = np.asarray(params[part]["kernel"])
        assert abs(kernel.std() - 0.02) <= 0.02 * 3 / np.sqrt(2 * kernel.size)  # three standard errors
        assert not np.any(params[part]["bias"])


@pytest.mark.parametrize(("task", "labels"), [(CLASSES, ("a", "b")), (TAGS, ("a", "b")), (SPANS, ())])
def test_files_of_another_task_give_the_base(task, labels, theirs):
    reference, folder = theirs("bert", WORDS)
    model, params = jaxft.load_pretrained(folder, task=task, labels=labels)
    assert "lm_head" not in params
    ids = np.arange(2, 9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference.bert(torch.tensor(ids)).last_hidden_state.numpy()
    assert np.abs(model.apply({"params": params}, ids, method="features") - expected).max() <= TOLERANCE


def test_a_language_model_of_pretraining_is_a_masked_lm(tmp_path):
    fields = tiny_models.SMALL | {"num_key_value_heads": None}
    reference = tiny_models.randomized(transformers.BertForPreTraining(transformers.BertConfig(**fields)))
    reference.save_pretrained(tmp_path / "model")
    model, params = jaxft.load_pretrained(tmp_path / "model", task=WORDS)
    ids = np.arange(2, 9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).prediction_logits.numpy()
    assert np.abs(model.apply({"params": params}, ids).logits - expected).max() <= TOLERANCE
    _, params = jaxft.load_pretrained(tmp_path / "model", task=CLASSES, labels=("a", "b"))
    assert np.array_equal(params["pooler"]["kernel"], reference.bert.pooler.dense.weight.detach().numpy().T)


def test_old_files_call_a_norms_parameters_gamma_and_beta(theirs):
    reference, folder = theirs("bert", CLASSES)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name):
        return next((name.replace(new, before) for new, before in old.items() if name.endswith(new)), name)

    positions = {"bert.embeddings.position_ids": np.arange(160)[None]}
    edit(folder, lambda tensors: {renamed(name): value for name, value in tensors.items()} | positions)
    assert difference(*jaxft.load_pretrained(folder, task=CLASSES), reference) <= TOLERANCE


def test_labels_are_those_of_the_files_unless_others_are_given(theirs):
    reference, folder = theirs("bert", CLASSES)
    for labels in ((), LABELS, tuple(reversed(LABELS))):
        model, params = jaxft.load_pretrained(folder, task=CLASSES, labels=labels)
        assert model.config.labels == LABELS
        assert difference(model, params, reference) <= TOLERANCE
    for labels in (("a", "b", "c"), ("a", "b")):  # other names as much as another number
        model, params = jaxft.load_pretrained(folder, task=CLASSES, labels=labels)
        assert model.config.labels == labels
        assert params["classifier"]["kernel"].std() < 0.05
        assert params["pooler"]["kernel"].std() > 0.1  # the files' own


def test_a_problem_type_is_kept_or_replaced(theirs):
    _, folder = theirs("bert", CLASSES, problem_type="multi_label_classification")
    assert jaxft.load_pretrained(folder, task=CLASSES)[0].config.problem_type == "multi_label_classification"
    model, _ = jaxft.load_pretrained(folder, task=CLASSES, problem_type="single_label_classification")
    assert model.config.problem_type == "single_label_classification"
    assert jaxft.load_pretrained(folder, task=TAGS, labels=("a", "b"))[0].config.problem_type == ""


def test_regression_needs_no_label(bare):
    model, params = jaxft.load_pretrained(bare[1], task=CLASSES, problem_type="regression")
    assert (model.config.labels, params["classifier"]["kernel"].shape) == (("LABEL_0",), (32, 1))


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_shapes_are_described_without_the_weights(family, theirs):
    _, folder = theirs(family, CLASSES)
    options = {"task": CLASSES, "labels": ("a", "b"), "problem_type": "multi_label_classification", "seed": 3}
    model, params = jaxft.load_pretrained(folder, **options)
    (folder / "model.safetensors").unlink()
    described, shapes = describe_pretrained(folder, **options)
    assert described.config == model.config
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_in_the_type_asked_for(dtype, theirs):
    _, folder = theirs("bert", WORDS)
    model, params = jaxft.load_pretrained(folder, task=TAGS, labels=("a", "b"), dtype=dtype)
    _, wide = jaxft.load_pretrained(folder, task=TAGS, labels=("a", "b"))
    assert model.dtype == dtype
    assert same_bits(params, jax.tree.map(lambda leaf: leaf.astype(dtype), wide))


@pytest.mark.parametrize(
    ("name", "family"), [("ElectraForPreTraining", "electra"), ("RobertaForCausalLM", "roberta"), ("GPT2DoubleHeadsModel", "gpt2")]
)
def test_files_with_a_head_that_jaxft_has_not_give_the_base(name, family, tmp_path):
    config = transformers.AutoConfig.for_model(family, **tiny_models.fields_of(family))
    reference = tiny_models.randomized(getattr(transformers, name)(config))
    reference.save_pretrained(tmp_path / "model")
    model, params = jaxft.load_pretrained(tmp_path / "model", task=TAGS, labels=("a", "b"))
    ids = np.arange(4, 9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference.base_model(torch.tensor(ids)).last_hidden_state.numpy()
    assert np.abs(model.apply({"params": params}, ids, method="features") - expected).max() <= TOLERANCE


def test_an_electra_of_narrow_embeddings_is_a_bert_behind_a_projection(theirs):
    reference, folder = theirs("electra", CLASSES, embedding_size=20)
    model, params = jaxft.load_pretrained(folder, task=CLASSES)
    assert params["embed_projection"]["kernel"].shape == (20, 32)
    assert difference(model, params, reference) <= TOLERANCE


def test_a_roberta_has_the_positions_behind_its_padding_token(theirs):
    _, folder = theirs("roberta", CLASSES, pad_token_id=1)
    assert jaxft.load_pretrained(folder, task=CLASSES)[0].config.max_position_embeddings == 158
    configure(folder, pad_token_id=None)
    with pytest.raises(UserError, match="no pad_token_id, which says where"):
        jaxft.load_pretrained(folder, task=CLASSES)


REFUSED = {
    "an encoder generates nothing": ("bert", CLASSES, {}, "is a BertForSequenceClassification, and bert models have no head for causal_lm"),
    "a causal model fills no gap": (
        "qwen2",
        CLASSES,
        {"task": WORDS},
        "and qwen2 models have no head for masked_lm.*causal_lm, seq",
    ),
    "no words in the files": ("bert", CLASSES, {"task": WORDS}, "files have sequence_classification, and none for masked_lm"),
    "no causal head": ("gpt2", CLASSES, {"task": "causal_lm", "labels": ()}, None),
    "no labels": ("bert", WORDS, {"task": CLASSES}, r'needs the names of its classes. Pass them: labels=\("negative", "positive"\)'),
    "labels twice": ("bert", WORDS, {"task": CLASSES, "labels": ("a", "b", "a")}, "labels names 'a' twice"),
    "labels of a language model": ("bert", WORDS, {"task": WORDS, "labels": ("a",)}, "masked_lm has none"),
    "problem of a tagger": ("bert", TAGS, {"task": TAGS, "problem_type": "regression"}, "token_classification has none"),
    "unknown problem": ("bert", CLASSES, {"task": CLASSES, "problem_type": "regresion"}, "Did you mean 'regression'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_message(case, theirs):
    family, task, options, message = REFUSED[case]
    _, folder = theirs(family, task)
    if message is None:
        message = "GPT2ForSequenceClassification: its files have sequence_classification, and none for causal_lm"
        configure(folder, tie_word_embeddings=False)
    for load in (jaxft.load_pretrained, describe_pretrained):
        with pytest.raises(UserError, match=message):
            load(folder, **options)


def test_a_tied_head_needs_no_files_of_its_own(theirs):
    """Its numbers are the embedding's: a GPT-2 with a classifier still has its words."""
    reference, folder = theirs("gpt2", CLASSES)
    model, params = jaxft.load_pretrained(folder)
    ids = np.arange(2, 9, dtype=np.int32)[None]
    with torch.no_grad():
        expected = (reference.transformer(torch.tensor(ids)).last_hidden_state @ reference.transformer.wte.weight.T).numpy()
    assert np.abs(model.apply({"params": params}, ids).logits - expected).max() <= TOLERANCE


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _plus(name, *shape):
    return lambda tensors: tensors | {name: np.ones(shape, np.float32)}


BROKEN = {
    "missing": (_without("bert.encoder.layer.1.output.dense.bias"), "it lacks bert.encoder.layer.1.output.dense.bias"),
    "left over": (_plus("bert.more.weight", 2), "no place for: bert.more"),
    "shape": (_plus("bert.embeddings.LayerNorm.bias", 2), r"LayerNorm.bias \(2,\) for \(32,\)"),
    "no classifier": (_without("classifier.weight"), "it lacks classifier.weight"),
    "another size": (_plus("classifier.weight", 4, 32), r"classifier.weight \(4, 32\) for \(3, 32\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_gives_one_clear_message(fault, theirs):
    _, folder = theirs("bert", CLASSES)
    change, message = BROKEN[fault]
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(folder, task=CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is a decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_act": "gelu_nwe"}, "no activation .* 'gelu_nwe'. Did you mean 'gelu_new'"),
        ({"num_attention_heads": 5}, "hidden_size 32 isn't a multiple of num_attention_heads 5"),
    ],
)
def test_what_a_bert_cannot_be_is_refused(fields, message, theirs):
    _, folder = theirs("bert", CLASSES)
    configure(folder, **fields)
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(folder, task=CLASSES)
