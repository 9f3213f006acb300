"""Examples hold the right tokens, are cut only where that leaves something to learn, and come from the cache only when nothing changed."""

import copy
import dataclasses

import datasets
import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data import tokenize as module
from jaxft.data.sources import Rows, load_rows
from jaxft.data.tokenize import COLUMNS, describe, prompt_tokens, tokenize
from jaxft.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, ["hi", "yo", "and?", "so"], strict=True)]


def rows_of(*records):
    return Rows(datasets.Dataset.from_list(list(records)), "a.jsonl", "line", np.arange(1, len(records) + 1))


def scored_text(tokenizer, examples, i=0):
    tokens, scored = examples[i]
    return tokenizer.decode(tokens[scored])


def same(left, right):
    fields = [field.name for field in dataclasses.fields(left)]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in fields)


def test_a_conversation(smollm2):
    examples = tokenize(rows_of({"messages": TALK}, {"messages": TALK[:2]}), smollm2, DataConfig())
    assert len(examples) == 2
    tokens, scored = examples[0]
    assert (tokens.dtype, scored.dtype) == (np.int32, np.bool_)
    assert tokens.tolist() == smollm2.apply_chat_template(TALK)["input_ids"]
    assert scored_text(smollm2, examples) == "yo<|im_end|>so<|im_end|>"
    assert examples.lengths.tolist() == [len(tokens), len(examples[1][0])]


def test_the_prompt_is_what_the_model_is_given(smollm2):
    examples = tokenize(rows_of({"messages": TALK}), smollm2, DataConfig())
    assert examples.prompt(0).tolist() == smollm2.apply_chat_template(TALK[:3], add_generation_prompt=True)["input_ids"]
    assert examples.answer(0) == "so"


def test_real_reviews(smollm2):
    config = DataConfig(prompt="{text} {drug}?", completion="{condition}, {rating}", system="Answer.", max_length=768)
    rows = load_rows("bundled:drug-reviews:test", "test")
    examples = tokenize(rows, smollm2, config)
    for i, row in enumerate(rows.dataset):
        assert scored_text(smollm2, examples, i) == f"{row['condition']}, {row['rating']}<|im_end|>"
        assert examples.answer(i) == f"{row['condition']}, {row['rating']}"
        assert smollm2.decode(examples.prompt(i)).endswith(f"{row['text']} {row['drug']}?<|im_end|>\n<|im_start|>assistant\n")


def test_loss_all_scores_every_token_that_has_one_before_it(smollm2):
    examples = tokenize(rows_of({"messages": TALK}), smollm2, DataConfig(loss="all"))
    assert examples.scored.tolist() == [False] + [True] * (len(examples.tokens) - 1)
    assert smollm2.decode(examples.prompt(0)).endswith("and?<|im_end|>\n<|im_start|>assistant\n")


def test_text_gets_the_first_token_of_the_tokenizer_and_the_end_of_text(metaspace):
    examples = tokenize(rows_of({"text": "the drug"}), metaspace, DataConfig())
    assert examples.tokens.tolist() == [*metaspace("the drug")["input_ids"], metaspace.eos_token_id]
    assert examples.tokens[0] == metaspace.bos_token_id
    assert examples.scored.tolist() == [False] + [True] * (len(examples.tokens) - 1)


def test_a_pair_without_a_template_is_joined(metaspace):
    examples = tokenize(rows_of({"prompt": "the drug", "completion": " felt better"}), metaspace, DataConfig())
    assert examples.tokens.tolist() == [*metaspace("the drug felt better")["input_ids"], metaspace.eos_token_id]
    assert scored_text(metaspace, examples).split() == ["felt", "better</s>"]
    assert examples.answer(0) == " felt better"


def test_a_pair_goes_through_a_template_that_is_given(byte_level):
    examples = tokenize(rows_of({"prompt": "the", "completion": "drug"}), byte_level, DataConfig(template=CHATML))
    assert byte_level.decode(examples.tokens) == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\ndrug<|im_end|>\n"
    assert scored_text(byte_level, examples) == "drug<|im_end|>"


NO_TEMPLATE = {
    "messages": (
        {"messages": TALK},
        {},
        "line 1: the tokenizer has no chat template, which the row's format needs. Give --config.data.template=plain",
    ),
    "alpaca": ({"instruction": "a", "output": "b"}, {}, "no chat template, which the row's format needs"),
    "system": ({"prompt": "a", "completion": "b"}, {"system": "x"}, "no chat template to put config.data.system into"),
}


@pytest.mark.parametrize(("row", "fields", "message"), NO_TEMPLATE.values(), ids=NO_TEMPLATE)
def test_rows_that_need_a_template(row, fields, message, byte_level):
    with pytest.raises(UserError, match=message):
        tokenize(rows_of(row), byte_level, DataConfig(**fields))


def test_the_plain_template_is_for_tokenizers_without_one(byte_level):
    row = {"messages": [{"role": "system", "content": "be brief"}, *TALK]}
    examples = tokenize(rows_of(row), byte_level, DataConfig(template="plain"))
    text = "\n\n".join(
        ["be brief", *(f"### {turn['role'].title()}:\n{turn['content']}{'<|im_end|>' * (turn['role'] == 'assistant')}" for turn in TALK)]
    )
    assert byte_level.decode(examples.tokens) == text
    assert scored_text(byte_level, examples) == "".join(f"{turn['content']}<|im_end|>" for turn in TALK if turn["role"] == "assistant")
    (asked,) = prompt_tokens([row["messages"][:-1]], ["line 1"], byte_level, DataConfig(template="plain"))
    assert asked.tolist() == examples.prompt(0).tolist()
    assert byte_level.decode(asked).endswith("\n\n### Assistant:\n")


def test_the_plain_template_begins_as_the_tokenizer_does(metaspace):
    """Llama's kind puts <s> before each text; so does the template, and so do prompts."""
    examples = tokenize(rows_of({"messages": TALK}), metaspace, DataConfig(template="plain"))
    assert metaspace.encode("")[0] == metaspace.bos_token_id
    assert (examples.tokens == metaspace.bos_token_id).nonzero()[0].tolist() == [0]
    (asked,) = prompt_tokens([TALK[:-1]], ["line 1"], metaspace, DataConfig(template="plain"))
    assert asked.tolist() == examples.prompt(0).tolist()


def test_the_plain_template_needs_an_end_of_text(byte_level):
    endless = copy.deepcopy(byte_level)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token .eos_token., which the template plain ends answers with"):
        tokenize(rows_of({"messages": TALK}), endless, DataConfig(template="plain"))


# ---------------------------------------------------------------- cutting


def test_cuts_from_the_right(byte_level):
    row = {"messages": TALK}
    whole = tokenize(rows_of(row), byte_level, DataConfig(template=CHATML))
    length = int(whole.prompts[0]) + 1
    examples = tokenize(rows_of(row), byte_level, DataConfig(template=CHATML, max_length=length))
    assert examples.tokens.tolist() == whole.tokens[:length].tolist()
    assert examples.cut.tolist() == [len(whole.tokens) - length]


def test_a_turn_that_is_cut_off_is_no_longer_the_last(byte_level):
    whole = tokenize(rows_of({"messages": TALK}), byte_level, DataConfig(template=CHATML))
    config = DataConfig(template=CHATML, max_length=int(whole.prompts[0]))
    examples = tokenize(rows_of({"messages": TALK}), byte_level, config)
    assert examples.answer(0) == "yo"
    assert scored_text(byte_level, examples) == "yo<|im_end|>"
    assert byte_level.decode(examples.prompt(0)).endswith("hi<|im_end|>\n<|im_start|>assistant\n")


def test_refuses_to_cut_all_that_is_scored(byte_level):
    rows = rows_of({"prompt": "a", "completion": "b"}, {"prompt": "a" * 60, "completion": "b"})
    with pytest.raises(
        UserError, match=r"a.jsonl, line 2: \d\d\d? tokens, the first scored one at \d\d\d?, but config.data.max_length is 50"
    ):
        tokenize(rows, byte_level, DataConfig(template=CHATML, max_length=50))


def test_refuses_a_row_without_a_scored_token(byte_level):
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(UserError, match=r"a.jsonl, line 1: none of its \d+ tokens is scored"):
        tokenize(rows_of({"messages": TALK}), byte_level, DataConfig(template=silent))


def test_refuses_rows_of_one_token(byte_level):
    with pytest.raises(UserError, match=r"config.data.max_length is 1"):
        tokenize(rows_of({"text": "a"}), byte_level, DataConfig(max_length=1))


def test_describe_counts_rows_tokens_and_what_was_cut(byte_level):
    examples = tokenize(rows_of(*({"text": "a" * n} for n in (3, 5, 30))), byte_level, DataConfig(max_length=10))
    cells = dict(zip(COLUMNS, describe(examples, "train"), strict=True))
    assert cells == {
        "set": "train",
        "rows": "3",
        "tokens": "20",
        "min": "4",
        "median": "6",
        "mean": "7",
        "95%": "10",
        "max": "10",
        "scored": "85.0%",
        "cut": "1 rows, 21 tokens",
    }


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch):
    """Counts how often rows were really tokenized."""
    calls = []
    collect = module._collect
    monkeypatch.setattr(module, "_collect", lambda *args: calls.append(1) or collect(*args))
    return calls


def files(cache):
    return sorted(cache.rglob("*"), key=str) if cache.exists() else []


def test_the_same_rows_are_tokenized_once(byte_level, counted, cache):
    config = DataConfig(template=CHATML)
    first = tokenize(rows_of({"messages": TALK}), byte_level, config)
    again = tokenize(rows_of({"messages": TALK}), byte_level, dataclasses.replace(config, packing=False, split=(1.0, 0.0, 0.0)))
    assert same(first, again)
    assert len(counted) == 1
    assert [path.suffix for path in files(cache) if path.is_file()] == [".safetensors"]


CHANGES = {
    "row": ({"messages": TALK[:2]}, {}),
    "template": ({"messages": TALK}, {"template": CHATML + " "}),
    "loss": ({"messages": TALK}, {"loss": "completion"}),
    "max_length": ({"messages": TALK}, {"max_length": 100}),
    "system": ({"messages": TALK}, {"system": "x"}),
}


@pytest.mark.parametrize(("row", "fields"), CHANGES.values(), ids=CHANGES)
def test_any_change_is_tokenized_again(row, fields, byte_level, counted):
    tokenize(rows_of({"messages": TALK}), byte_level, DataConfig(template=CHATML))
    tokenize(rows_of(row), byte_level, DataConfig(**{"template": CHATML, **fields}))
    assert len(counted) == 2


def test_another_tokenizer_and_another_version_are_tokenized_again(byte_level, metaspace, counted, monkeypatch):
    for tokenizer in (byte_level, metaspace):
        tokenize(rows_of({"text": "a"}), tokenizer, DataConfig())
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    tokenize(rows_of({"text": "a"}), byte_level, DataConfig())
    assert len(counted) == 3


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"{}" * 50], ids=["empty", "half", "foreign"]
)
def test_a_damaged_file_is_ignored_and_written_again(damage, byte_level, counted, cache):
    first = tokenize(rows_of({"text": "a drug"}), byte_level, DataConfig())
    (path,) = [path for path in files(cache) if path.is_file()]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(tokenize(rows_of({"text": "a drug"}), byte_level, DataConfig()), first)
    assert len(counted) == 2
    assert path.read_bytes() == whole


def test_no_cache_where_it_is_off(byte_level, cache):
    tokenize(rows_of({"text": "a"}), byte_level, DataConfig(cache=False))
    assert not files(cache)


def test_a_cache_that_cannot_be_written_says_so(byte_level, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache folder .* can't be written .* JAXFT_CACHE .*--config.data.cache=False"):
        tokenize(rows_of({"text": "a"}), byte_level, DataConfig())
