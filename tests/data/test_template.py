"""The scored tokens are what the assistant generates, exactly, whether or not the template marks it."""

import copy

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.config import DataConfig
from jaxft.data.conversations import conversation
from jaxft.data.template import chat_template
from jaxft.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
# As Qwen3: the thinking of turns before the last question is left out.
FORGETS_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% if loop.index0 < ns.last %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% elif '</think>' not in content %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}"
    "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral: the system message stands in the last question, so that no earlier part is a prefix of the whole.
MOVES_SYSTEM = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% set last = turns | selectattr('role', 'equalto', 'user') | list | last %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (ns.system + '\n\n' if m is sameas last else '') + m.content + '[/INST]' }}"
    "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
ENDS_ONCE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% endgeneration %}{% else %}{{ '\n### ' + m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "forgets_thinking": FORGETS_THINKING,
    "moves_system": MOVES_SYSTEM,
    "ends_once": ENDS_ONCE,
}


def unmarked(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def turns_of(tokenizer, template, messages, loss="auto"):
    """Returns the tokens, and each scored turn's token span."""
    found = conversation({"messages": messages}, DataConfig(loss=loss), "row 1")
    return chat_template(tokenizer, template).tokens([found], ["row 1"])[0]


def texts_of(tokenizer, template, messages, loss="auto"):
    tokens, turns = turns_of(tokenizer, template, messages, loss)
    return [tokenizer.decode(tokens[begin:end]) for begin, end in turns]


def dialogue(*contents, system=""):
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


TALK = dialogue("Which drug?", "The drug.", "And then?", "<think>\nhm\n</think>\n\nBetter 😀")


def test_scores_answers_with_their_end_of_turn_token_and_no_whitespace_after(smollm2):
    assert texts_of(smollm2, "", dialogue("hi", "yo", "and?", "so")) == ["yo<|im_end|>", "so<|im_end|>"]


def test_the_last_turn_alone_with_loss_completion(byte_level):
    for template in (CHATML, unmarked(CHATML)):
        assert texts_of(byte_level, template, dialogue("hi", "yo", "and?", "so"), loss="completion") == ["so<|im_end|>"]


def test_llama2_scores_from_the_end_of_the_instruction(metaspace):
    tokens, turns = turns_of(metaspace, unmarked(LLAMA2), dialogue("the drug", "the week"))
    (begin, end), text = turns[0], "the drug"
    assert metaspace.decode(tokens[begin:end]) == "the week </s>"
    assert tokens[:begin].tolist() == metaspace(f"<s>[INST] {text} [/INST]", add_special_tokens=False)["input_ids"]
    assert end == len(tokens)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["smollm2", "byte_level", "metaspace"])
def test_finds_the_turns_that_markers_mark(name, kind, request):
    tokenizer = request.getfixturevalue(kind)
    for messages in (TALK, dialogue("What?", "It", system="Be brief."), dialogue("a", "the", "a", "a", "b", "the", system="the")):
        tokens, turns = turns_of(tokenizer, unmarked(TEMPLATES[name]), messages)
        expected_tokens, expected_turns = turns_of(tokenizer, TEMPLATES[name], messages)
        assert tokens.tolist() == expected_tokens.tolist()
        assert turns == expected_turns
        assert len(turns) == sum(message["role"] == "assistant" for message in messages)


CONTENT = st.text(st.sampled_from("ab.\n \t😀é<|{}") | st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@pytest.mark.parametrize("name", ["chatml", "llama2", "moves_system"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_finds_the_turns_that_markers_mark_whatever_they_say(name, contents, byte_level):
    messages = dialogue(*contents)
    tokens, turns = turns_of(byte_level, unmarked(TEMPLATES[name]), messages)
    expected_tokens, expected_turns = turns_of(byte_level, TEMPLATES[name], messages)
    assert tokens.tolist() == expected_tokens.tolist()
    assert turns == expected_turns


@pytest.mark.parametrize(("name", "kind"), [("chatml", "byte_level"), ("forgets_thinking", "smollm2"), ("llama2", "metaspace")])
def test_agrees_with_transformers_own_mask(name, kind, request):
    # Not Llama 2's template on bytes: the answers begin with a space there, which no token's offsets hold, and transformers then stops.
    tokenizer = request.getfixturevalue(kind)
    reference = tokenizer.apply_chat_template(TALK, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True)
    for template in (TEMPLATES[name], unmarked(TEMPLATES[name])):
        tokens, turns = turns_of(tokenizer, template, TALK)
        mask = np.zeros(len(tokens), int)
        for begin, end in turns:
            mask[begin:end] = 1
        assert tokens.tolist() == reference["input_ids"]
        assert mask.tolist() == reference["assistant_masks"]


def test_marked_spaces_at_the_end_are_scored_though_offsets_leave_them_out(byte_level):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    assert texts_of(byte_level, template, dialogue("a", "the   "))[-1] == "the   <|im_end|>"


def test_the_end_of_turn_token_behind_a_marked_answer_is_scored(byte_level):
    end = "<|im_end|>"
    for inside, outside in (("", end), (end, ""), (end, end)):
        answer = f"{{% generation %}}{{{{ m.content }}}}{inside}{{% endgeneration %}}{outside}"
        turn = f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}<{{{{ m.content }}}}>{{% endif %}}"
        template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
        assert texts_of(byte_level, template, dialogue("a", "the"))[-1] == f"the{end}"


@pytest.mark.parametrize(
    ("behind", "before", "expected"),
    [
        ("", "<|im_start|>", ["the", "for"]),  # begins the next turn
        (" <|im_end|>", "", ["the <|im_end|>", "for <|im_end|>"]),
        ("<|stop|>", "", ["the<|stop|>", "for<|stop|>"]),  # special by the tokenizer's file alone
        ("<|other|>", "", ["the", "for"]),  # not special
    ],
)
def test_what_follows_every_marked_answer_is_its_end(behind, before, expected, byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens([tokenizers.AddedToken("<|stop|>", special=True), tokenizers.AddedToken("<|other|>", special=False)])
    turn = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}" + behind
    template = "{% for m in messages %}" + turn + "{% else %}" + before + "{{ m.content }}:{% endif %}{% endfor %}"
    for question in ([], [{"role": "user", "content": "so"}]):
        assert texts_of(tokenizer, template, [*dialogue("a", "the", "b", "for"), *question]) == expected


def prompt_and_lead(tokenizer, template):
    found = chat_template(tokenizer, template)
    question = dialogue("a")
    return found.prompt(question, "row 1"), found.lead(question, "row 1")


def test_a_prompt_is_what_stands_before_an_answer_in_training(byte_level):
    assert prompt_and_lead(byte_level, CHATML) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "")
    assert prompt_and_lead(byte_level, unmarked(CHATML)) == prompt_and_lead(byte_level, CHATML)
    thinks = unmarked(CHATML).replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert prompt_and_lead(byte_level, thinks) == prompt_and_lead(byte_level, CHATML)
    thought = "<think>\n\n</think>\n\n"
    assert prompt_and_lead(byte_level, unmarked(FORGETS_THINKING)) == (prompt_and_lead(byte_level, CHATML)[0], thought)
    assert prompt_and_lead(byte_level, FORGETS_THINKING) == (prompt_and_lead(byte_level, CHATML)[0], thought)


def test_a_marker_in_a_comment_is_none(byte_level):
    template = "{# {% generation %} #}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    assert texts_of(byte_level, template, dialogue("a", "the"))[-1] == "<assistant>the<|im_end|>"


def test_earlier_thinking_that_the_template_drops_is_not_scored(byte_level):
    talk = dialogue("a", "<think>\nhm\n</think>\n\nthe", "b", "<think>\nso\n</think>\n\nfor")
    assert texts_of(byte_level, unmarked(FORGETS_THINKING), talk) == ["the<|im_end|>", "<think>\nso\n</think>\n\nfor<|im_end|>"]


def test_a_template_whose_turns_cannot_be_told_apart_is_refused(byte_level):
    counts = "{{ messages | map(attribute='content') | join | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"row 1: the chat template changes more than turn 2 .* generation"):
        turns_of(byte_level, counts, dialogue("a", "the", "b", "for"))


def test_a_template_that_refuses_the_row_says_where(byte_level):
    with pytest.raises(UserError, match=r"row 1: the chat template refuses the turns user, assistant: Only system!"):
        turns_of(byte_level, "{{ raise_exception('Only system!') }}", dialogue("a", "the"))


def test_broken_jinja_is_named(byte_level):
    with pytest.raises(UserError, match=r"not valid Jinja.*line 1.*config.data.template"):
        turns_of(byte_level, "{% for m in messages %}", dialogue("a", "the"))


def test_a_missing_template_file_names_the_nearest(byte_level, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with pytest.raises(UserError, match=r"chatm.jinja is neither Jinja text nor a readable file.*Did you mean 'chatml.jinja'"):
        chat_template(byte_level, str(tmp_path / "chatm.jinja"))
    assert chat_template(byte_level, str(tmp_path / "chatml.jinja")).text == CHATML


def test_todays_date_does_not_reach_the_tokens(byte_level):
    dated = "{{ strftime_now('%d %b %Y') }}" + unmarked(CHATML)
    tokens, _ = turns_of(byte_level, dated, dialogue("a", "the"))
    assert byte_level.decode(tokens).startswith("26 Jul 2024<|im_start|>user")


def test_no_template_is_none(byte_level):
    assert chat_template(byte_level, "") is None
