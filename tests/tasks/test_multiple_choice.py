"""Multiple choice: the likelihoods of a plain loop over transformers' logits, grouped by row; answers in all the forms of rows."""

import copy
import functools

import jax
import numpy as np
import pytest
import tokenizers
import torch
from datasets import Dataset
from tiny_models import load, make_reference

import jaxft
from jaxft.config import DataConfig
from jaxft.data.batches import each_once, lay_out
from jaxft.data.choices import choices_of
from jaxft.data.rows import Rows
from jaxft.errors import UserError
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.inspect.encoded import encode
from jaxft.inspect.texts import kind_of, read_set
from jaxft.tasks import MultipleChoice
from jaxft.train.step import make_evaluation

ROWS = [
    {"question": "Which animal barks?", "choices": ["a cat", "a dog", "an old, rather slow tortoise"], "answer": "1"},
    {"question": "What do birds do in the air?", "choices": ["swim", "they fly"], "answer": "they fly"},
    {"question": "Where is Nîmes?", "choices": ["France", "Perú", "in the north of Japan", "Texas"], "answer": "A"},
    {"question": "Two and two?", "choices": ["four", "five"], "answer": "0"},
    {"question": "A colour?", "choices": ["stone", "the colour of the sky at noon", "blue"], "answer": "C"},
]
DATA = DataConfig(max_length=160, cache=False)


def rows_of(rows):
    return Rows(Dataset.from_list(rows), "a.jsonl", "line", np.arange(1, len(rows) + 1))


@functools.cache
def tokenizer(chat):
    found = load_tokenizer("bundled:smollm2-135m-instruct")
    if not chat:
        found = copy.deepcopy(found)
        found.chat_template = None
    return found


@functools.cache
def pair():
    reference = make_reference("llama", vocab_size=len(tokenizer(True)), num_hidden_layers=2, max_position_embeddings=256)
    return reference, *load(reference, task="multiple_choice")


def expected(chat):
    """Returns, by a plain loop, the log-likelihood, the tokens and the bytes of each row's choices, and the right ones' loss."""
    found, nll, count = [], 0.0, 0
    for row, right in zip(ROWS, (1, 1, 0, 0, 2), strict=True):
        own = []
        for number, choice in enumerate(row["choices"]):
            asked = row["question"]
            if chat:
                turns = [{"role": "user", "content": asked}]
                asked = tokenizer(chat).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            said = choice if chat else f" {choice}"
            before = len(tokenizer(chat)(asked)["input_ids"])
            tokens = torch.tensor(tokenizer(chat)(asked + said)["input_ids"])
            end = torch.tensor([tokenizer(chat).convert_tokens_to_ids("<|im_end|>")])
            whole = torch.cat([tokens, end])
            with torch.no_grad():
                likelihoods = torch.log_softmax(pair()[0](whole[None]).logits[0].double(), -1)
            each = likelihoods[torch.arange(before - 1, len(whole) - 1), whole[before:]]
            own.append((float(each[:-1].sum()), len(each) - 1, len(choice.encode())))
            if number == right:
                nll, count = nll - float(each.sum()), count + len(each)
        found.append(own)
    return found, nll / count


def measured(task, examples):
    """Returns the sums and the outputs of a set, packed into two batches or so."""
    _, model, params = pair()
    layout = lay_out(examples, np.arange(len(examples)), DATA, True, 0)
    program, frozen = jax.jit(make_evaluation(model, task)), jax.tree.map(lambda _: None, params)
    outputs, totals = np.zeros(len(examples.slots.reads)), []
    for rows, batch in each_once(layout, 2):
        sums, made = program(params, frozen, batch)
        totals.append(sums)
        for b, row in enumerate(rows):
            slots = layout.slots_of(row)
            outputs[slots] = made[b, : len(slots)]
    return jax.tree.map(lambda *parts: float(sum(parts)), *totals), outputs


@pytest.mark.parametrize("chat", [True, False])
def test_likelihoods_and_accuracies_are_those_of_a_plain_loop(chat):
    task = MultipleChoice(head_chunk=13)
    examples = task.examples(rows_of(ROWS), tokenizer(chat), DATA, pair()[1])
    if chat:
        # the template of SmolLM2 puts a line break behind the end, which is scored too: the loss has it, the likelihoods don't
        assert examples.slots.counts.sum() >= examples.said.sum() + len(examples)
    sums, outputs = measured(task, examples)
    found, loss = expected(chat)
    whole, by_tokens = task.likelihoods(examples, outputs)
    flat = [choice for row in found for choice in row]
    np.testing.assert_allclose(whole, [total for total, _, _ in flat], rtol=1e-4)
    np.testing.assert_allclose(by_tokens, [total / count for total, count, _ in flat], rtol=1e-4)
    by_bytes = MultipleChoice(normalize="bytes").likelihoods(examples, outputs)[1]
    np.testing.assert_allclose(by_bytes, [total / size for total, _, size in flat], rtol=1e-4)
    if not chat:
        assert sums.nll / sums.weight == pytest.approx(loss, abs=1e-4)
    rights = (1, 1, 0, 0, 2)
    scores = task.scores(pair()[1], examples, sums, outputs)
    for name, size in (("accuracy", lambda _: 1), ("accuracy_normalized", lambda choice: choice[1])):
        picks = [int(np.argmax([choice[0] / size(choice) for choice in row])) for row in found]
        assert scores[name] == pytest.approx(np.mean([pick == right for pick, right in zip(picks, rights, strict=True)]))
    assert set(scores) == set(task.metrics(pair()[1]))


def test_a_special_token_without_a_name_ends_an_answer_too():
    """As Phi-3's <|end|>: the tokenizer's file alone calls it special."""
    own = copy.deepcopy(tokenizer(False))
    own.add_tokens(tokenizers.AddedToken("<|done|>", special=True))
    assert own.convert_tokens_to_ids("<|done|>") not in own.all_special_ids
    own.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|done|>{% endif %}{% endfor %}"
    examples = MultipleChoice().examples(rows_of(ROWS[:1]), own, DATA, pair()[1])
    ends = examples.slots.targets == own.convert_tokens_to_ids("<|done|>")
    assert ends.sum() == 3
    assert not examples.said[ends].any()
    assert examples.said[~ends].all()


def test_training_sees_the_right_choices_alone_and_their_loss_is_that_of_sft():
    task = MultipleChoice(head_chunk=13)
    examples = task.examples(rows_of(ROWS), tokenizer(False), DATA, pair()[1])
    training = task.for_training(pair()[1], examples)
    texts = [tokenizer(False).decode(training.tokens_of(i), skip_special_tokens=True) for i in range(len(training))]
    assert texts == [f"{row['question']} {row['choices'][right]}" for row, right in zip(ROWS, (1, 1, 0, 0, 2), strict=True)]
    assert (training.slots.weights == 1).all()
    sums, _ = measured(task, training)
    assert sums.nll / sums.weight == pytest.approx(expected(False)[1], abs=1e-4)
    _, model, params = pair()
    batch = lay_out(training, np.arange(5), DATA, True, 0).fill([0])
    by_step, by_measure = task.sums(model, params, batch, {}), task.measure(model, params, batch)[0]
    np.testing.assert_allclose(jax.tree.leaves(by_step), jax.tree.leaves(by_measure), rtol=1e-5)


def test_rows_keep_their_choices_and_majority_is_a_place():
    examples = MultipleChoice().examples(rows_of(ROWS), tokenizer(True), DATA, pair()[1])
    assert examples.rows.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4]
    first = examples.first(2)
    assert first.rows.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(first.tokens, examples.tokens[: first.offsets[-1]])
    # first or second is right twice each; the first of the two counts
    assert MultipleChoice().majority(pair()[1], examples, examples) == {"accuracy": 0.4, "accuracy_normalized": 0.4}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["a", "b"], 1, 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "1", 1),
        (["x", "y "], "y", 1),
        (["2", "1"], "1", 1),  # a text is that text
        (["B", "A"], "A", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", 0),
        ({"text": ["x", "y"], "label": ["p", "q"]}, "q", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, 1, 0),  # a number is the label
        ({"text": ["x", "y"], "label": ["p", "q"]}, 1, 1),
        ([2, 3, 4, 5], 3, 1),  # a number among numbers is that one
        ([2, 3, 4, 5], "3", 1),
        (["2", "3", "4"], 2, 2),  # among texts it is a place
        ([0.5, 1.5], 1.5, 1),
    ],
)
def test_the_answer_is_a_number_a_letter_a_name_or_the_text(choices, answer, right):
    assert choices_of({"choices": choices, "answer": answer}, "a").right == right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"]}, "there is no 'answer'"),
        ({"answer": 1}, "there is no 'choices'"),
        ({"choices": "ab", "answer": 1}, "'choices' must be a list of texts, not 'ab'"),
        ({"choices": ["a"], "answer": 0}, "'choices' has 1: there is nothing to choose from"),
        ({"choices": ["a", " "], "answer": 0}, "choice 2 is empty"),
        ({"choices": ["a", "a"], "answer": 0}, "'choices' has 'a' twice"),
        ({"choices": ["a", "b"], "answer": 2}, r"the answer is none of the 2 choices \(A to B, 0 to 1, or one's text\)"),
        ({"choices": [7, 8], "answer": 1}, r"the answer is none of the 2 choices \(A to B, or one's text\)"),
        ({"choices": ["a", "b"], "answer": "C"}, "the answer is none of the 2 choices"),
        ({"choices": ["a", "b"], "answer": True}, "the answer is none of the 2 choices"),
        ({"choices": {"text": ["a", "b"], "label": ["p", "q"]}, "answer": "A"}, r"the answer is none of the 2 choices \(p, q, or one"),
    ],
)
def test_rows_that_are_no_choice_are_refused_with_their_place(row, message):
    with pytest.raises(UserError, match=f"a.jsonl, line 3: {message}"):
        choices_of(row, "a.jsonl, line 3")


def test_a_choice_that_would_be_cut_is_refused_with_its_place():
    rows = [ROWS[0], {**ROWS[1], "choices": ["to fly " * 80, "no"], "answer": "B"}]
    with pytest.raises(UserError, match=r"a.jsonl, line 2: config.data.max_length is 160, which cuts a choice. Raise it to \d+"):
        MultipleChoice().examples(rows_of(rows), tokenizer(True), DATA, pair()[1])


def test_an_encoder_has_no_such_model():
    with pytest.raises(UserError, match="bert models have no head for causal_lm"):
        jaxft.load_pretrained("bundled:minilm-l6", task=MultipleChoice.model_task)


def test_inspection_reads_questions_with_their_choices():
    texts = read_set("train", rows_of(ROWS), DATA, kind_of("multiple_choice"))
    assert texts.texts[0] == "Which animal barks?\na cat\na dog\nan old, rather slow tortoise"
    assert texts.answers == ("a dog", "they fly", "France", "four", "blue")
    assert not encode(texts, tokenizer(True), DataConfig(max_length=8)).cut.any()
    refused = read_set("train", rows_of([*ROWS[:2], {**ROWS[2], "answer": "Z"}]), DATA, kind_of("multiple_choice"))
    assert refused.refused[0].reason.startswith("the answer is none of the 4 choices")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "words"}, "task.normalize"),
        ({"label_smoothing": 1.0}, "task.label_smoothing"),
        ({"head_chunk": 0}, "task.head_chunk"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MultipleChoice(**settings)
