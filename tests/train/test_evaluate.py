"""What is generated and compared: answers as the tokens say them, none of plain texts, and a word where none can be right."""

import types

import datasets
import numpy as np
import pytest
import tokenizers
import transformers

from jaxft.config import DataConfig, EvalConfig
from jaxft.data.rows import Rows
from jaxft.data.tokenize import tokenize
from jaxft.tasks import SFT
from jaxft.train.evaluate import Evaluator, answer_texts

TEST, UNCACHED = EvalConfig(split="test"), DataConfig(cache=False)
WORDS = ["[UNK]", "[END]", "Yes", ",", "it", "does", ".", "No"]


@pytest.fixture
def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]", "eos_token": "[END]", "pad_token": "[END]", "clean_up_tokenization_spaces": True}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)


def setup(tokenizer, rows, evaluation=TEST, data=UNCACHED):
    experiment = types.SimpleNamespace(data=data, task=SFT(), eval=evaluation)
    found = Rows(datasets.Dataset.from_list(rows), "test.jsonl", "line", np.arange(1, len(rows) + 1))
    examples = tokenize(found, tokenizer, data)
    return types.SimpleNamespace(experiment=experiment, rows={"test": found}, examples={"test": examples}, tokenizer=tokenizer)


def test_an_answer_is_what_its_tokens_say(tokenizer):
    """A tokenizer that tidies spaces when it decodes would never give the true text back."""
    made = tokenizer("Yes , it does .")["input_ids"]
    assert tokenizer.decode(made) == "Yes, it does."
    found = setup(tokenizer, [{"prompt": "it does", "completion": "Yes , it does ."}])
    assert answer_texts(found, [made]) == ["Yes , it does ."]


def evaluator(found):
    made = Evaluator.__new__(Evaluator)  # what compiles isn't needed
    made._setup = found
    return made


def test_plain_texts_have_no_answer_to_generate(tokenizer):
    assert not evaluator(setup(tokenizer, [{"text": "Yes , it does ."}])).generates
    assert evaluator(setup(tokenizer, [{"prompt": "it", "completion": "No"}])).generates
    filled = DataConfig(prompt="{text}", completion="{text}", cache=False)
    assert evaluator(setup(tokenizer, [{"text": "No"}], data=filled)).generates
    assert not evaluator(setup(tokenizer, [{"prompt": "it", "completion": "No"}], EvalConfig(split="test", generate=False))).generates


def test_answers_that_are_longer_than_generated_ones_are_told(tokenizer, capsys):
    rows = [{"prompt": "it", "completion": "Yes , it does ."}, {"prompt": "it", "completion": "No"}]
    evaluator(setup(tokenizer, rows, EvalConfig(split="test", max_new_tokens=4))).warn("test")
    assert "1 of 2 answers of test have more than 4 tokens, up to 5" in capsys.readouterr().out.replace("\n", " ")
    evaluator(setup(tokenizer, rows, EvalConfig(split="test", max_new_tokens=5))).warn("test")
    evaluator(setup(tokenizer, [{"text": "Yes , it does ."}], EvalConfig(split="test", max_new_tokens=1))).warn("test")
    assert not capsys.readouterr().out
