"""Each row format becomes the same conversation; each mistake in a row is named with its place."""

import re

import pytest

from jaxft.config import DataConfig
from jaxft.data.conversations import conversation, question
from jaxft.errors import UserError

PLACE = "a.jsonl, line 7"
USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
ROWS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "pair": {"prompt": "2 + 2?", "completion": "4"},
    "pair of messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "alpaca without input": {"instruction": "2 + 2?", "output": "4"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "empty system": {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]},
    "messages before others": {"prompt": "2 + 2?", "prompt_id": "x", "messages": [USER, ASSISTANT]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_formats(row):
    found = conversation(row, DataConfig(), PLACE)
    assert found.messages == (USER, ASSISTANT)
    assert found.scored == (1,)
    assert not found.everything


def test_a_prompt_that_is_given_is_asked_whatever_the_pattern_names():
    assert question({"prompt": "2 + 2?"}, DataConfig(prompt="Q: {text}"), PLACE) == (USER,)
    assert question({"prompt": "2 + 2?"}, DataConfig(prompt="Always this."), PLACE) == (USER,)
    assert question({"text": "2 + 2?"}, DataConfig(prompt="{text}"), PLACE) == (USER,)
    with pytest.raises(UserError, match=r"config.data.prompt: .*Write {{ and }} for braces"):
        question({"prompt": "2 + 2?"}, DataConfig(prompt="{"), PLACE)


def test_alpaca_input_follows_the_instruction():
    found = conversation({"instruction": "Add.", "input": "2, 2", "output": "4"}, DataConfig(), PLACE)
    assert found.messages[0]["content"] == "Add.\n\n2, 2"


def test_text_is_scored_throughout():
    found = conversation({"text": "once upon"}, DataConfig(), PLACE)
    assert (found.text, found.everything, found.messages) == ("once upon", True, ())


def test_format_strings_over_columns():
    config = DataConfig(prompt="{drug} {{x}}", completion="{n}", system="For {drug}")
    found = conversation({"drug": "Zomig", "n": 3, "text": "unused"}, config, PLACE)
    assert [message["content"] for message in found.messages] == ["For Zomig", "Zomig {x}", "3"]


def test_a_system_message_stays_where_the_row_has_one():
    own = {"role": "system", "content": "own"}
    assert conversation({"messages": [own, USER, ASSISTANT]}, DataConfig(system="ours"), PLACE).messages[0] == own
    assert conversation(ROWS["messages"], DataConfig(system="ours"), PLACE).messages[0]["content"] == "ours"


@pytest.mark.parametrize(("loss", "scored"), [("auto", (1, 3)), ("assistant", (1, 3)), ("completion", (3,)), ("all", (1, 3))])
def test_loss_says_which_turns_are_scored(loss, scored):
    found = conversation({"messages": [USER, ASSISTANT] * 2}, DataConfig(loss=loss), PLACE)
    assert found.scored == scored
    assert found.everything == (loss == "all")


def test_only_the_completion_of_message_lists_is_scored():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert conversation(row, DataConfig(), PLACE).scored == (3,)
    assert conversation(row, DataConfig(loss="assistant"), PLACE).scored == (1, 3)


BAD_ROWS = {
    "unknown columns": (
        {"question": "a", "answer": "b"},
        "no format understood has the columns question, answer. Formats: messages | prompt",
    ),
    "messages no list": ({"messages": "hi"}, "'messages' must be a list of {role, content}, not str 'hi'"),
    "turn no object": ({"messages": ["hi"]}, "messages, turn 1 must be {role, content}, not str 'hi'"),
    "turn without content": ({"messages": [{"role": "user"}]}, "messages, turn 1 must be {role, content}, not dict"),
    "content no text": ({"messages": [{"role": "user", "content": 3}]}, "'messages, turn 1' must be text, not int 3"),
    "unknown role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        "unknown role str 'asistant'. Did you mean 'assistant'? Known: system",
    ),
    "unknown speaker": ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations, turn 1 has the unknown role str 'bot'"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "empty turn": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "'messages, turn 2' is empty"),
    "no assistant": ({"messages": [USER]}, "no assistant turn, so there is nothing to learn. Roles: user"),
    "completion no assistant": ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "'completion' has no assistant turn"),
    "tool calls": ({"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "f"}]}]}, "turn 2 has 'tool_calls', which is not supported"),
    "prompt no text": ({"prompt": 3, "completion": "a"}, "'prompt' must be text, not int 3"),
    "empty completion": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "alpaca null": ({"instruction": None, "output": "a"}, "'instruction' must be text, not NoneType None"),
    "empty text": ({"text": "\n"}, "'text' is empty"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(row, message):
    with pytest.raises(UserError, match=f"{re.escape(PLACE)}.*{re.escape(message)}"):
        conversation(row, DataConfig(), PLACE)


BAD_CONFIGS = {
    "absent column": (
        {"prompt": "{drugs}", "completion": "{n}"},
        "names the column 'drugs'. Did you mean 'drug'? a.jsonl, line 7 has drug, n",
    ),
    "half a pair": ({"prompt": "{drug}"}, "config.data.prompt and config.data.completion go together"),
    "open brace": ({"prompt": "{drug", "completion": "{n}"}, "config.data.prompt: "),
    "attribute": ({"prompt": "{drug.x}", "completion": "{n}"}, "names the column 'drug.x'"),
    "conversion": ({"prompt": "{drug!r}", "completion": "{n}"}, "'drug' has a conversion"),
    "null value": ({"prompt": "{drug}", "completion": "{none}"}, "column 'none' must hold text or a number"),
    "unknown loss": ({"loss": "asistant"}, "no loss 'asistant'. Did you mean 'assistant'"),
}


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        conversation({"drug": "a", "n": 1, "none": None}, DataConfig(**config), PLACE)


@pytest.mark.parametrize(
    ("config", "message"), [({"loss": "assistant"}, "config.data.loss=all"), ({"system": "x"}, "config.data.system is set")]
)
def test_text_has_no_turns(config, message):
    with pytest.raises(UserError, match=message):
        conversation({"text": "a"}, DataConfig(**config), PLACE)
