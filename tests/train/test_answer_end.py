"""What ends an answer, and the warning where nothing does."""

import dataclasses
import json
import types

import numpy as np
import pytest
import tokenizers
from tiny_models import make_examples

import experiments
from jaxft.data import tokenize
from jaxft.train import data, setup

END = 3
ADDED = {END: tokenizers.AddedToken("<end>", special=True), 50: tokenizers.AddedToken("<think>", special=False)}
TOKENIZER = types.SimpleNamespace(eos_token_id=2, all_special_ids=[2], all_special_tokens=["</s>"], added_tokens_decoder=ADDED)


def model_of(hf):
    return types.SimpleNamespace(config=types.SimpleNamespace(hf=json.dumps(hf)))


def ending_with(token, cut=0):
    """Returns three examples whose last scored token is `token`; one line break, not scored, stands behind it."""
    examples = make_examples([9, 6, 12], answer=4)
    tokens, scored, ends = examples.tokens.copy(), examples.scored.copy(), examples.offsets[1:]
    tokens[ends - 2], scored[ends - 1], scored[ends - 2] = token, False, True
    return dataclasses.replace(examples, tokens=tokens, scored=scored, cut=np.full(3, cut, np.int32))


@pytest.mark.parametrize(("examples", "end", "stops"), [(ending_with(END), END, (2, 3)), (ending_with(50), None, (2,))])
def test_the_last_scored_token_ends_an_answer_if_it_is_special(examples, end, stops):
    assert setup.answer_end(TOKENIZER, examples) == end
    assert setup.end_tokens(types.SimpleNamespace(tokenizer=TOKENIZER, answer_end=end, model=model_of({}))) == stops


def test_where_all_is_scored_the_line_break_behind_the_end_is_no_end():
    examples = ending_with(END)
    blank = examples.offsets[1:] - 1
    tokens = examples.tokens.copy()
    tokens[blank] = 40
    tokenizer = types.SimpleNamespace(**vars(TOKENIZER), decode=lambda ids: {40: "\n"}.get(ids[0], "word"))
    every = dataclasses.replace(examples, tokens=tokens, scored=np.ones_like(examples.scored))
    assert setup.answer_end(tokenizer, every) == END
    tokens[blank - 1] = 50  # text, then a line break
    assert setup.answer_end(tokenizer, every) is None


@pytest.mark.parametrize(
    ("hf", "stops"),
    [
        ({"eos_token_id": 7}, (2, END, 7)),
        ({"eos_token_id": 7, "generation_config": {"eos_token_id": [8, 9]}}, (2, END, 8, 9)),
        ({"eos_token_id": None}, (2, END)),
    ],
)
def test_what_ends_a_text_for_transformers_ends_it_here(hf, stops):
    assert setup.end_tokens(types.SimpleNamespace(tokenizer=TOKENIZER, answer_end=END, model=model_of(hf))) == stops


@pytest.mark.parametrize(("examples", "warned"), [(ending_with(END), False), (ending_with(50), True), (ending_with(50, cut=1), False)])
def test_a_template_that_ends_no_answer_is_told(monkeypatch, capsys, examples, warned):
    monkeypatch.setattr(tokenize, "tokenize", lambda *_: examples)
    monkeypatch.setattr(data, "look_quickly", lambda *_: None)
    data.load_examples(experiments.load("lora_llama2"), {"train": "rows", "validation": "rows"}, TOKENIZER, None)
    said = " ".join(capsys.readouterr().out.split())
    assert ("the model won't learn where to stop. Put {{ eos_token }} behind the answer" in said) == warned
