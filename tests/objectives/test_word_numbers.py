"""Which tokens may be hidden, and which are one word: against the tokenizer's own words, and in conversations."""

import itertools
import types

import datasets
import numpy as np
import pytest
import tokenizers
import transformers

from jaxft.config import DataConfig
from jaxft.data.examples import Labelled, NextTokens, Slots, noted
from jaxft.data.rows import Rows
from jaxft.data.word_numbers import template_tokens, word_numbers
from jaxft.data.words import fit_to_words
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.objectives import FixMatch
from jaxft.tasks import SequenceClassification, TokenClassification

CLASSES = SequenceClassification()


def tiny_model():
    shape = {"vocab_size": 40000, "labels": ("a", "b"), "problem_type": "single_label_classification"}
    return types.SimpleNamespace(task="sequence_classification", config=types.SimpleNamespace(**shape))


TEXTS = ["Took Zoloft's 50mg, felt un-well (twice)!", "No side-effects at all."]


def labelled(tokens):
    lengths = [len(one) for one in tokens]
    offsets = np.cumsum([0, *lengths])
    none = Slots(offsets * 0, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    return Labelled(np.concatenate(tokens).astype(np.int32), offsets, np.zeros(len(tokens), np.int32), none, np.arange(len(tokens)))


def test_words_of_a_tokenizer_of_words_are_its_own():
    tokenizer = load_tokenizer("bundled:minilm-l6", "main")
    encoded = tokenizer(TEXTS)
    expected = [[0 if word is None else word + 1 for word in encoded.word_ids(i)] for i in range(len(TEXTS))]
    assert word_numbers(labelled(encoded["input_ids"]), tokenizer).tolist() == list(itertools.chain(*expected))


def test_words_of_byte_level_bpe_are_what_spaces_part():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    made.train_from_iterator(["the cat's mat, the hat"] * 5, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    text = "the cat's mat\nhats, the end"
    encoded = tokenizer(text, return_offsets_mapping=True)
    found = word_numbers(labelled([[*encoded["input_ids"], tokenizer.eos_token_id]]), tokenizer)
    assert found[-1] == 0
    pieces = {}
    for number, (start, end) in zip(found[:-1], encoded["offset_mapping"], strict=True):
        pieces[int(number)] = pieces.get(int(number), "") + text[start:end]
    assert [piece.strip() for piece in pieces.values()] == text.split()


def test_tokens_that_the_file_alone_calls_special_are_not_hidden_and_stay_in_every_view():
    tokenizer = load_tokenizer("bundled:minilm-l6", "main")
    tokenizer.add_tokens([tokenizers.AddedToken("[E1]", special=True)])
    tokens = tokenizer("pain [E1] relief")["input_ids"]
    mark = tokenizer.convert_tokens_to_ids("[E1]")
    assert mark not in tokenizer.all_special_ids
    found = word_numbers(labelled([tokens]), tokenizer)
    assert [token for token, number in zip(tokens, found, strict=True) if number] == tokenizer.convert_tokens_to_ids(["pain", "relief"])
    kept = FixMatch().fitted(CLASSES, tiny_model(), tokenizer).special_token_ids
    assert mark in kept
    assert tokenizer.unk_token_id not in kept
    tokenizer.eos_token = tokenizer.unk_token  # one token for both, as GPT-2's
    assert tokenizer.unk_token_id in FixMatch().fitted(CLASSES, tiny_model(), tokenizer).special_token_ids


def test_words_of_tagged_rows_are_the_rows_own():
    random, vocabulary = np.random.default_rng(0), ["pain", "un-well", "zoloft's", "x", "antidepressants"]
    words = [random.choice(vocabulary, length).tolist() for length in (40, 5)]
    rows = Rows(datasets.Dataset.from_dict({"tokens": words, "tags": [["O"] * len(row) for row in words]}), "rows", "line", np.arange(2))
    model = types.SimpleNamespace(config=types.SimpleNamespace(labels=("O", "B-X")), pooling="first")
    tokenizer = fit_to_words(load_tokenizer("bundled:minilm-l6", "main"))
    examples = TokenClassification(stride=6, labels=("O", "B-X")).examples(rows, tokenizer, DataConfig(max_length=40), model)
    found = noted(examples, {"words": word_numbers(examples, tokenizer)}).per_token["words"]
    assert len(examples) > 2  # the first row stands in several windows
    for i, row in enumerate(examples.rows):
        tokens, numbers = examples.tokens_of(i), found[examples.offsets[i] : examples.offsets[i + 1]]
        assert ((numbers > 0) == ~np.isin(tokens, tokenizer.all_special_ids)).all()
        for number in set(numbers[numbers > 0].tolist()):
            part = "".join(tokenizer.convert_ids_to_tokens(tokens[numbers == number].tolist())).replace("##", "")
            word = words[int(row)][number - 1]
            assert part == word or (part in word and number in (numbers[1], numbers[-2]))  # a window may cut its first and last word
    kept = examples.first(1)
    assert len(kept.token_words) == len(kept.tokens)


@pytest.mark.parametrize("several", [True, False])
def test_a_chat_templates_tokens_are_none_to_hide(several):
    # 1 2 question 3 4 [answer 5] 6, again and again: a beginning, what stands before an answer, its end, which is scored, what follows it
    numbers = [([11, 12, 13], [14]), ([15], [16, 17])], [([21], [22, 23]), ([24, 25], [26])], [([31, 32], [33])]
    rows, marks = [], []
    for turns in numbers if several else numbers[:1]:
        rows.append([1, 2, *(token for asked, answer in turns for token in (*asked, 3, 4, *answer, 5, 6))])
        marks += [0, 0, *(mark for asked, answer in turns for mark in (*[0] * len(asked), 0, 0, *[1] * len(answer), 1, 0))]
    offsets, zeros, scored = np.cumsum([0, *map(len, rows)]), np.zeros(len(rows), np.int32), np.asarray(marks, bool)
    examples = NextTokens(np.concatenate(rows).astype(np.int32), offsets, zeros, scored, zeros, ("",) * len(rows))
    found = template_tokens(examples)
    assert not found[scored].any()
    if several:
        assert found.tolist() == np.isin(examples.tokens, (1, 2, 3, 4, 6)).tolist()
    else:  # of one example alone, what it begins with can't be told from its template
        assert found[:7].all()
