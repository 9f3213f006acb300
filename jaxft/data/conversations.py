"""One row, in any of the formats understood, as a conversation or as plain text."""

import dataclasses
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxft.config import DataConfig
from jaxft.errors import UserError, nearest, unknown

FORMATS = "messages | prompt, completion | instruction, input, output | conversations | text"
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool"}
LOSSES = ("auto", "assistant", "completion", "all")
# Parts of a message beside its content that a template would render: leaving them out would train on something else than the row.
UNSUPPORTED_PARTS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one row says, and which part of it is scored."""

    messages: tuple[Message, ...] = ()  # each {"role", "content"}; empty for plain text
    scored: tuple[int, ...] = ()  # messages whose tokens are scored: assistant turns
    text: str = ""  # the row of plain text; empty for messages
    everything: bool = False  # every token is scored, not only those of `scored`
    plain: bool = False  # a prompt and a completion, which can also be joined without a chat template


def conversation(row: Mapping[str, Any], config: DataConfig, place: str) -> Conversation:
    """Returns the conversation of one row.

    Args:
        row: column -> value.
        config: of it `prompt`, `completion`, `system` and `loss`.
        place: where the row stands, for messages.

    Raises:
        UserError: columns that no format has, a value of a wrong type, an unknown role, an empty message, no assistant turn.

    >>> conversation({"prompt": "2 + 2?", "completion": "4"}, DataConfig(), "a.jsonl, line 1").messages
    ({'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'})
    """
    if config.loss not in LOSSES:
        raise unknown("loss", config.loss, LOSSES)
    if bool(config.prompt) != bool(config.completion):
        raise UserError("config.data.prompt and config.data.completion go together: give both, or neither.")
    if config.prompt:
        prompt, completion = fill(config.prompt, row, "prompt", place), fill(config.completion, row, "completion", place)
        return _from_pair(prompt, completion, row, config, place)
    if row.get("messages") is not None:
        return _from_messages(_messages(row["messages"], "messages", place), row, config, place)
    if row.get("conversations") is not None:
        return _from_messages(_sharegpt(row["conversations"], place), row, config, place)
    if "prompt" in row and "completion" in row:
        return _from_pair(row["prompt"], row["completion"], row, config, place)
    if "instruction" in row and "output" in row:
        prompt, further = _text(row["instruction"], "instruction", place), row.get("input")
        prompt += f"\n\n{_text(further, 'input', place)}" if further else ""
        return dataclasses.replace(_from_pair(prompt, row["output"], row, config, place), plain=False)
    if "text" in row:
        return _from_text(_filled(_text(row["text"], "text", place), "text", place), config, place)
    raise UserError(
        f"{place}: no format understood has the columns {', '.join(row)}. Formats: {FORMATS}. Name the columns in "
        '--config.data.prompt="Question: {question}" --config.data.completion="{answer}", or rename them.'
    )


def are_texts(columns: Collection[str]) -> bool:
    """Returns whether rows with these columns are plain texts, as `conversation` takes them.

    >>> are_texts(["id", "text"]), are_texts(["text", "messages"])
    (True, False)
    """
    turns = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})
    return "text" in columns and not any(names <= set(columns) for names in turns)


def question(row: Mapping[str, Any], config: DataConfig, place: str) -> tuple[Message, ...]:
    """Returns what comes before the answer that a row asks for: system and user turns, or earlier turns too.

    Args:
        row: a row of the data, with or without its answer, or {"prompt": text}.
        config: of it `prompt` and `system`.
        place: where the row stands, for messages.

    Raises:
        UserError: no prompt in it.

    >>> question({"instruction": "Add.", "output": "4"}, DataConfig(), "prompt 1")
    ({'role': 'user', 'content': 'Add.'},)
    """
    columns = {column for _, column, _, _ in _parsed(config.prompt, "prompt") if column}
    if config.prompt and ((columns and columns <= row.keys()) or "prompt" not in row):
        messages = _part(fill(config.prompt, row, "prompt", place), "prompt", "user", place)
    elif row.get("prompt") is not None:
        messages = _part(row["prompt"], "prompt", "user", place)
    elif row.get("messages") is not None:
        messages = _before_answer(_messages(row["messages"], "messages", place))
    elif row.get("conversations") is not None:
        messages = _before_answer(_sharegpt(row["conversations"], place))
    elif "instruction" in row:
        further = f"\n\n{row['input']}" if row.get("input") else ""
        messages = _part(f"{row['instruction']}{further}", "instruction", "user", place)
    elif isinstance(row.get("text"), str):
        return tuple(_part(row["text"], "text", "user", place))
    else:
        raise UserError(f'{place} has the columns {", ".join(row)}; give {{"prompt": "..."}}, or a row of the data.')
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": fill(config.system, row, "system", place)}, *messages]
    return tuple(messages)


def _before_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" and len(messages) > 1 else messages


def _parsed(pattern: str, field: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """The pieces of a pattern: text, column, format, conversion."""
    try:
        return list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(
            f"config.data.{field}: {error}, in {pattern!r}. Write {{{{ and }}}} for braces that stand for themselves."
        ) from error


def fill(pattern: str, row: Mapping[str, Any], field: str, place: str) -> str:
    """Returns `pattern` with each column named in braces replaced by the row's value.

    Args:
        pattern: text with `{column}`, or `{column:.1200}` with a format as Python's; `{{` and `}}` stand for braces.
        row: column -> text or number.
        field: the name of the config field that holds the pattern, for messages.
        place: where the row stands, for messages.

    >>> fill("Drug: {drug}", {"drug": "Zomig"}, "prompt", "a.jsonl, line 1")
    'Drug: Zomig'
    """
    filled = []
    for literal, column, specification, conversion in _parsed(pattern, field):
        filled.append(literal)
        if column is None:
            continue
        if conversion:
            raise UserError(
                f"config.data.{field}: '{column}' has a conversion, !{conversion}; braces hold a column's name and a format only."
            )
        if column not in row:
            raise UserError(f"config.data.{field} names the column '{column}'.{nearest(column, row)} {place} has {', '.join(row)}.")
        if not isinstance(row[column], str | int | float):
            raise UserError(f"{place}: column '{column}' must hold text or a number for config.data.{field}, not {_shown(row[column])}.")
        try:
            filled.append(format(row[column], specification or ""))
        except ValueError as error:
            raise UserError(
                f"config.data.{field}: {row[column]!r} of {place} can't be written as '{{{column}:{specification}}}': {error}."
            ) from error
    return "".join(filled)


def _from_pair(prompt: Any, completion: Any, row: Mapping[str, Any], config: DataConfig, place: str) -> Conversation:
    before = _part(prompt, "prompt", "user", place)
    after = _part(completion, "completion", "assistant", place)
    found = _from_messages(before + after, row, config, place)
    if config.loss in ("auto", "completion"):
        answers = tuple(i for i in found.scored if i >= len(found.messages) - len(after))
        if not answers:
            raise UserError(f"{place}: 'completion' has no assistant turn, so there is nothing to learn.")
        found = dataclasses.replace(found, scored=answers)
    return dataclasses.replace(found, plain=isinstance(prompt, str) and isinstance(completion, str))


def _part(value: Any, column: str, role: str, place: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, column, place)
    return [{"role": role, "content": _filled(_text(value, column, place), column, place)}]


def _from_messages(messages: list[Message], row: Mapping[str, Any], config: DataConfig, place: str) -> Conversation:
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": fill(config.system, row, "system", place)}, *messages]
    answers = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if not answers:
        raise UserError(f"{place}: no assistant turn, so there is nothing to learn. Roles: {', '.join(m['role'] for m in messages)}.")
    scored = answers[-1:] if config.loss == "completion" else answers
    return Conversation(messages=tuple(messages), scored=scored, everything=config.loss == "all")


def _from_text(text: str, config: DataConfig, place: str) -> Conversation:
    if config.loss not in ("auto", "all"):
        raise UserError(f"{place}: config.data.loss is '{config.loss}', but a row of 'text' has no turns. Use --config.data.loss=all.")
    if config.system:
        raise UserError(f"{place}: config.data.system is set, but a row of 'text' has no turns. Clear it, or write it into the text.")
    return Conversation(text=text, everything=True)


def _messages(value: Any, column: str, place: str) -> list[Message]:
    return _turns(value, column, ("role", "content"), {role: role for role in ROLES}, place)


def _sharegpt(value: Any, place: str) -> list[Message]:
    return _turns(value, "conversations", ("from", "value"), SHAREGPT_ROLES, place)


def _turns(value: Any, column: str, keys: tuple[str, str], roles: Mapping[str, str], place: str) -> list[Message]:
    """Returns the messages of a list of turns, without empty system messages."""
    role_key, content_key = keys
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{place}: '{column}' must be a list of {{{role_key}, {content_key}}}, not {_shown(value)}.")
    messages = []
    for number, turn in enumerate(value, start=1):
        where = f"{column}, turn {number}"
        if not isinstance(turn, Mapping) or not {role_key, content_key} <= turn.keys():
            raise UserError(f"{place}: {where} must be {{{role_key}, {content_key}}}, not {_shown(turn)}.")
        role, content = turn[role_key], turn[content_key]
        if role not in roles:
            known = f"{nearest(str(role), roles)} Known: {', '.join(roles)}."
            raise UserError(f"{place}: {where} has the unknown role {_shown(role)}.{known}")
        further = [part for part in UNSUPPORTED_PARTS if turn.get(part)]
        if further:
            raise UserError(f"{place}: {where} has '{further[0]}', which is not supported. Write it into '{content_key}' as text.")
        content = _text(content, where, place)
        if roles[role] != "system" or content.strip():
            messages.append({"role": roles[role], "content": _filled(content, where, place)})
    if not messages:
        raise UserError(f"{place}: '{column}' is empty: expected at least a user turn and an assistant turn.")
    return messages


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: '{name}' must be text, not {_shown(value)}.")
    return value


def _filled(text: str, name: str, place: str) -> str:
    if not text.strip():
        raise UserError(f"{place}: '{name}' is empty.")
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
