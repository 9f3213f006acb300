"""Masked language modelling: transformers' loss for the same hidden tokens, drawn anew in each step, on texts of any length."""

import dataclasses
import functools
import tempfile

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from datasets import Dataset
from evaluation_batches import evaluation_batches
from tiny_models import VOCABULARY, load, make_pair, make_reference

import jaxft
from jaxft.config import DataConfig, Experiment, ModelConfig
from jaxft.data.examples import Labelled, Slots
from jaxft.data.rows import Rows
from jaxft.errors import UserError
from jaxft.hub.peft import has_form
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.inspect.encoded import encode
from jaxft.inspect.texts import kind_of, read_set
from jaxft.methods.head import with_head
from jaxft.tasks import SFT, MaskedLM
from jaxft.train.run import generate
from jaxft.train.state import new_state
from jaxft.train.step import make_evaluation, make_step

MASK = 4
TASK = MaskedLM(mask_token_id=MASK, head_chunk=5, rate=0.3)


@functools.cache
def pair():
    return make_pair("bert", "masked_lm")


@functools.cache
def tokenizer():
    return load_tokenizer("bundled:minilm-l6")


def rows_of(*texts):
    return Rows(Dataset.from_dict({"text": list(texts)}), "a.jsonl", "line", np.arange(1, len(texts) + 1))


def examples_of(lengths):
    """Returns examples of random tokens between two special ones."""
    random = np.random.default_rng(0)
    tokens = [np.asarray([1, *random.integers(5, VOCABULARY, length - 2), 2], np.int32) for length in lengths]
    words = [np.asarray([0, *range(1, length - 1), 0], np.int32) for length in lengths]
    counts = [round(0.3 * (length - 2)) for length in lengths]
    offsets, slots = (np.cumsum([0, *sizes], dtype=np.int64) for sizes in (lengths, counts))
    zeros = np.zeros(slots[-1], np.int32)
    held, beside = Slots(slots, zeros, zeros, np.ones(slots[-1], np.float32)), {"words": np.concatenate(words)}
    return Labelled(np.concatenate(tokens), offsets, np.zeros(len(lengths), np.int32), held, np.arange(len(lengths)), beside)


def batch_of(lengths, packing=False):
    (batch,) = evaluation_batches(examples_of(lengths), DataConfig(max_length=64, packing=packing), 1 if packing else len(lengths), False)
    return batch


def test_the_loss_is_that_of_transformers_for_what_is_hidden():
    reference, model, params = pair()
    batch = batch_of([20, 9, 14])
    sums, _ = jax.jit(make_evaluation(model, TASK))(params, jax.tree.map(lambda _: None, params), batch)
    seen = TASK.hide(model, batch, jax.random.key(0))
    labels = np.full(batch["tokens"].shape, -100)
    for row, (places, targets, weights) in enumerate(zip(seen["scored"], seen["targets"], seen["weights"], strict=True)):
        labels[row, np.asarray(places)[np.asarray(weights) > 0]] = np.asarray(targets)[np.asarray(weights) > 0]
    hidden = labels >= 0
    assert hidden.sum() == float(sums.weight) == batch["weights"].sum()
    np.testing.assert_array_equal(labels[hidden], batch["tokens"][hidden])
    assert (np.asarray(seen["tokens"])[~hidden] == batch["tokens"][~hidden]).all()
    given = [torch.tensor(np.asarray(array)).long() for array in (seen["tokens"], batch["segment_ids"] > 0, labels)]
    with torch.no_grad():
        expected = reference(given[0], attention_mask=given[1], labels=given[2])
    assert float(sums.nll / sums.weight) == pytest.approx(float(expected.loss), abs=1e-4)
    right = (expected.logits.argmax(-1).numpy() == labels)[hidden].mean()
    assert float(sums.correct / sums.weight) == pytest.approx(right)


SIZES = [20, 9, 14, 31, 3, 17]


@pytest.mark.parametrize("policy", [{}, {"whole_words": True, "spans": True}], ids=str)
def test_what_is_hidden_of_a_text_in_evaluation_follows_from_its_tokens_and_the_seed_alone(policy):
    model, examples, task = pair()[1], examples_of(SIZES), dataclasses.replace(TASK, **policy)
    every = np.arange(len(examples))
    whole, other = (task.for_evaluation(model, examples, order) for order in (every, every[::-1][:4]))
    moved = dataclasses.replace(task, evaluation_seed=1).for_evaluation(model, examples, every)
    for i in every:
        places, targets = whole.slots.reads[whole.slots.part(i)], whole.slots.targets[whole.slots.part(i)]
        np.testing.assert_array_equal(targets, examples.tokens_of(i)[places])
        assert len(places) == examples.slots.counts[i]
        same = np.delete(np.arange(SIZES[i]), places)
        np.testing.assert_array_equal(whole.tokens_of(i)[same], examples.tokens_of(i)[same])
        if i in every[::-1][:4]:
            np.testing.assert_array_equal(other.tokens_of(i), whole.tokens_of(i))
            np.testing.assert_array_equal(other.slots.reads[other.slots.part(i)], places)
    assert (whole.slots.reads != moved.slots.reads).any()


def test_the_figures_of_evaluation_change_neither_with_packing_nor_with_the_batch():
    _, model, params = pair()
    examples = TASK.for_evaluation(model, examples_of(SIZES), np.arange(len(SIZES)))
    program, none, found = jax.jit(make_evaluation(model, TASK)), jax.tree.map(lambda _: None, params), []
    for packing, size in ((False, 6), (True, 1), (True, 2)):
        batches = evaluation_batches(examples, DataConfig(max_length=64, packing=packing), size, False)
        sums = jax.tree.map(lambda *parts: float(sum(parts)), *[program(params, none, batch)[0] for batch in batches])
        found.append([sums.nll / sums.weight, sums.correct, sums.weight])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


def test_a_step_hides_other_tokens_each_time_and_compiles_once():
    _, model, params = pair()
    optimizer = optax.sgd(0.0)  # so that nothing but what is hidden differs
    seen = []

    class Watched(MaskedLM):
        def hide(self, model, batch, rng):
            found = super().hide(model, batch, rng)
            jax.debug.callback(lambda tokens: seen.append(np.asarray(tokens)), found["tokens"])
            return found

    task = Watched(mask_token_id=MASK, rate=0.3)
    step = jax.jit(make_step(model, task, optimizer, seed=0, r_drop=0.5))
    batch = {name: array[None] for name, array in batch_of([20, 9, 14]).items()}
    state, losses = new_state(params, optimizer), []
    for _ in range(3):
        state, metrics = step(state, jax.tree.map(lambda _: None, params), batch)
        losses.append(float(metrics["loss"]))
    jax.effects_barrier()
    assert step._cache_size() == 1
    assert len(set(losses)) == 3
    assert len({tokens.tobytes() for tokens in seen}) == 3


def test_texts_that_are_too_long_become_several_examples_and_nothing_is_dropped():
    long = " ".join(f"unflappability {number}" for number in range(30))
    rows, task = rows_of("A short text.", long, "Another one."), MaskedLM()
    found = task.examples(rows, tokenizer(), DataConfig(max_length=24), pair()[1])
    assert found.rows.tolist() == [0, *[1] * (len(found) - 2), 2]
    assert found.lengths.max() <= 24
    assert np.ptp(found.lengths[1:-1]) <= len(found) - 2  # pieces of nearly one length
    inner = np.concatenate([found.tokens_of(i)[1:-1] for i in range(1, len(found) - 1)])
    assert inner.tolist() == tokenizer()(long, add_special_tokens=False)["input_ids"]
    assert found.first(2).rows.max() == 1
    words = found.per_token["words"]
    special = np.isin(found.tokens, [tokenizer().cls_token_id, tokenizer().sep_token_id])
    np.testing.assert_array_equal(words == 0, special)
    pieces = [tokenizer().convert_ids_to_tokens(int(token)) for token in found.tokens]
    joined = [i for i in range(1, len(pieces)) if pieces[i].startswith("##") and words[i - 1]]
    assert joined
    assert all(words[i] == words[i - 1] for i in joined)
    assert (np.diff(found.slots.offsets) == [max(round(0.15 * (length - 2)), 1) for length in found.lengths]).all()


def test_inspection_reads_texts_and_finds_nothing_cut():
    texts = read_set("train", rows_of("A short text.", "A long one, " * 20, " "), DataConfig(), kind_of("masked_lm"))
    assert texts.texts[0] == "A short text."
    assert [one.reason for one in texts.refused] == ["the text is empty."]
    assert not encode(texts, tokenizer(), DataConfig(max_length=8)).cut.any()


def test_the_words_of_training_make_the_majority():
    found = MaskedLM().examples(rows_of("a b a", "a c"), tokenizer(), DataConfig(max_length=24), pair()[1])
    big = type("Model", (), {"config": type("Config", (), {"vocab_size": len(tokenizer())})})
    scores = MaskedLM().majority(big, found, found)
    total = 5 + len(tokenizer())
    assert scores["accuracy"] == 3 / 5
    assert scores["loss"] == pytest.approx(-(3 * np.log(4 / total) + 2 * np.log(2 / total)) / 5)


@pytest.fixture(scope="module")
def bare():
    """A folder of a BERT without a head."""
    with tempfile.TemporaryDirectory() as folder:
        make_reference("bert", "masked_lm").bert.save_pretrained(folder)
        yield folder


def test_a_head_that_the_files_lack_is_drawn_where_it_is_asked_for(bare):
    with pytest.raises(UserError, match=r"isn't drawn anew.*new_head=True \(config.task.new_head\)"):
        jaxft.load_pretrained(bare, task="masked_lm")
    model, params = jaxft.load_pretrained(bare, task="masked_lm", new_head=True, seed=1)
    head = params["lm_head"]
    assert model.head == ("lm_head",)
    assert "decoder" not in head  # the embedding is the files' own
    assert (head["norm"]["scale"] == 1).all()
    assert not any(bias.any() for bias in (head["bias"], head["norm"]["bias"], head["dense"]["bias"]))
    assert np.std(head["dense"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    method = with_head(jaxft.methods.LoRA(rank=2), model, jaxft.methods.LoRA(rank=2).init(jax.random.key(0), model, params))
    mask = method.mask(method.init(jax.random.key(0), model, params))
    assert all(jax.tree.leaves(mask["lm_head"]))
    for adapter in (method, jaxft.methods.IA3() + jaxft.methods.Partial(targets=("lm_head",))):
        held = adapter.init(jax.random.key(0), model, params)
        assert not has_form(model, held, adapter)  # so that a run writes the whole model
        with pytest.raises(UserError, match="an adapter can't bring a new head along"), tempfile.TemporaryDirectory() as folder:
            jaxft.save_adapter(f"{folder}/adapter", model, held, adapter)
    with tempfile.TemporaryDirectory() as folder:
        jaxft.save_pretrained(folder, model, params)
        again = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        np.testing.assert_array_equal(again.cls.predictions.transform.dense.weight.detach().numpy().T, head["dense"]["kernel"])
        whole = jaxft.load_pretrained(folder, task="masked_lm", new_head=True)
    assert whole[0].head == ()  # these files have one, which is taken
    np.testing.assert_array_equal(whole[1]["lm_head"]["dense"]["kernel"], head["dense"]["kernel"])


def test_a_causal_model_has_no_masked_tokens_and_an_encoder_no_next_ones(bare):
    with pytest.raises(UserError, match="llama models have no head for masked_lm. Choose one of their tasks .*: causal_lm"):
        load(make_reference("llama"), task=MaskedLM.model_task)
    with pytest.raises(UserError, match="bert models have no head for causal_lm. Choose one of their tasks .*: masked_lm"):
        jaxft.load_pretrained(bare, task=SFT.model_task)
    with pytest.raises(UserError, match="new_head is for masked_lm"):
        jaxft.load_pretrained(bare, task="question_answering", new_head=True)


def test_an_encoder_is_not_asked_to_generate(tmp_path):
    experiment = Experiment("one", ModelConfig("bundled:minilm-l6"), DataConfig(), jaxft.methods.Full(), MaskedLM())
    with pytest.raises(UserError, match="The task MaskedLM has no text to generate"):
        generate(experiment, tmp_path, [{"prompt": "Hello"}], None)


def test_a_tokenizer_needs_a_mask_token():
    assert MaskedLM().tokenized(tokenizer()).mask_token_id == tokenizer().mask_token_id
    assert MaskedLM(mask_token_id=7).tokenized(tokenizer()).mask_token_id == 7
    with pytest.raises(UserError, match="The tokenizer has no mask token"):
        MaskedLM().tokenized(type("Tokenizer", (), {"mask_token_id": None}))
    with pytest.raises(UserError, match="tokenized"):
        MaskedLM().hide(pair()[1], batch_of([9]), jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "task.rate .* not 0.0"),
        ({"masked": 0.9, "random": 0.2}, "task.masked and task.random .* not 0.9 and 0.2"),
        ({"head_chunk": 0}, "task.head_chunk .* not 0"),
        ({"span_p": 0.0}, "task.span_p .* not 0.0"),
        ({"mask_token_id": -2}, "task.mask_token_id .* not -2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MaskedLM(**settings)


def test_a_mask_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=f"task.mask_token_id is {VOCABULARY}; the model has {VOCABULARY} tokens"):
        MaskedLM(mask_token_id=VOCABULARY).examples(rows_of("a"), tokenizer(), DataConfig(max_length=24), pair()[1])


@pytest.mark.parametrize(
    ("text", "length", "message"), [(" ", 24, "a.jsonl, line 1: the text is empty"), ("a", 2, "max_length is 2: 2 special tokens")]
)
def test_texts_that_cannot_be_read_are_refused(text, length, message):
    with pytest.raises(UserError, match=message):
        MaskedLM().examples(rows_of(text), tokenizer(), DataConfig(max_length=length), pair()[1])
