"""The chat template: a conversation as tokens, and which tokens belong to which assistant turn."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from jaxft.data.conversations import Conversation, Message
from jaxft.data.examples import special_tokens
from jaxft.errors import UserError, given_path, nearest

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_SENTINEL = "\ue000jaxft\ue001"  # stands for an answer: private-use characters that no template looks at
# Some templates write today's date, and then a run resumed tomorrow would train on other tokens. Llama 3's default date replaces it.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"

# For models whose tokenizer has no template: each role's name on a line of its own, so that no word's first token takes in a space of the
# line before it; an answer ends with the tokenizer's end of text.
_PLAIN = (
    "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the template plain has no turns of ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)
BUILT_IN = {"plain": _PLAIN}  # templates that go by a name

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with its chat template."""

    tokenizer: Any  # a fast tokenizer of transformers
    text: str  # Jinja

    @property
    def marked(self) -> bool:
        """Whether the template itself says what the assistant generates, by `{% generation %}`."""
        return bool(_GENERATION.search(_COMMENT.sub("", self.text)))

    def render(self, messages: Sequence[Message], place: str, generate: bool = False) -> str:
        """Returns the conversation as text; with `generate`, followed by what the assistant's turn begins with."""
        with _explained(messages, place):
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.text, tokenize=False, add_generation_prompt=generate
            )

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """Returns a conversation up to the assistant's answer as text: what stands before what is scored when it is trained on."""
        answered = [*messages, {"role": "assistant", "content": _SENTINEL}]
        if self.marked:
            text, turns = self._marked(answered, place)
            if turns:
                return text[: turns[-1][0]]
        before, whole = self.render(messages, place, generate=True), self.render(answered, place)
        return before if whole.startswith(before) else whole.partition(_SENTINEL)[0]

    def lead(self, messages: Sequence[Message], place: str) -> str:
        """Returns what the template writes between the prompt and an answer, for the model to generate: an empty thought, of some."""
        before, whole = self.prompt(messages, place), self.render([*messages, {"role": "assistant", "content": _SENTINEL}], place)
        return whole[len(before) :].partition(_SENTINEL)[0] if whole.startswith(before) else ""

    def tokens(self, conversations: Sequence[Conversation], places: Sequence[str]) -> list[tuple[np.ndarray, list[Span]]]:
        """Returns each conversation's tokens, and the token spans of its scored turns.

        A span holds what the assistant generates: its answer and the end-of-turn token. It is found in the text of the whole
        conversation, so that no piece is ever tokenized by itself.
        """
        locate = self._marked_turns if self.marked else self._turns
        if not conversations:
            return []
        located = [locate(found, place) for found, place in zip(conversations, places, strict=True)]
        encoded = self.tokenizer([text for text, _ in located], add_special_tokens=False, return_offsets_mapping=True)
        offsets = [np.array(pairs).reshape(-1, 2) for pairs in encoded["offset_mapping"]]
        return [
            (np.asarray(tokens, dtype=np.int32), _token_spans(pairs, spans))
            for tokens, pairs, (_, spans) in zip(encoded["input_ids"], offsets, located, strict=True)
        ]

    def _marked_turns(self, found: Conversation, place: str) -> tuple[str, list[Span]]:
        """Returns the text and the scored turns as the template marks them."""
        text, turns = self._marked(found.messages, place)
        answers = [number for number, message in enumerate(found.messages) if message["role"] == "assistant"]
        if turns and answers:
            last = found.messages[: answers[-1] + 1]
            ending, ended = (text, turns) if len(last) == len(found.messages) else self._marked(last, place)
            behind = ending[ended[-1][1] :] if ended else ""
            turns = [(start, self._through_end(text, start, stop, behind)) for start, stop in turns]
        return text, turns if len(found.scored) == len(answers) else turns[-len(found.scored) :]

    def _marked(self, messages: Sequence[Message], place: str) -> tuple[str, list[Span]]:
        """Returns the text and what of it the template marks, a span a turn."""
        with _explained(messages, place):
            rendered: Any = render_jinja_template(  # annotated as text, but a pair of lists
                [list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        texts, marked = rendered
        turns: list[Span] = []
        for start, stop in marked[0]:
            if turns and turns[-1][1] == start:  # a turn marked in several parts
                turns[-1] = (turns[-1][0], stop)
            elif stop > start:
                turns.append((start, stop))
        return texts[0], turns

    def _through_end(self, text: str, start: int, stop: int, behind: str) -> int:
        """Where a marked turn ends with its end-of-turn token, unless that is marked already.

        It is the special token that follows, whitespace aside, and that follows the last turn of a conversation too: `behind` is what
        stands there. Others begin the next turn.
        """
        special = special_tokens(self.tokenizer)
        if any(text[start:stop].rstrip().endswith(token) for token in special):
            return stop
        following = behind[: _shared(text[stop:], behind)]
        space = len(following) - len(following.lstrip())
        length = max((len(token) for token in special if following.startswith(token, space)), default=0)
        return stop + space + length if length else stop

    def _turns(self, found: Conversation, place: str) -> tuple[str, list[Span]]:
        """Returns the text and the scored turns of a template without markers."""
        text = self.render(found.messages, place)
        return text, [self._turn(text, found.messages, turn, place) for turn in found.scored]

    def _turn(self, text: str, messages: Sequence[Message], turn: int, place: str) -> Span:
        """Returns where in `text` the assistant's turn stands, without the whitespace after it.

        The conversation up to the turn, and up to its end, are prefixes of the whole one for most templates. Where one isn't (the
        template moves the system message, or drops the thinking of earlier turns), the turn is where the whole conversation changes
        when another answer is put in its place.
        """
        before = self.render(messages[:turn], place, generate=True) if turn else None
        start = len(before) if before is not None and text.startswith(before) else None
        through = self.render(messages[: turn + 1], place) if turn + 1 < len(messages) else text
        stop = len(through) if text.startswith(through) else None
        if start is None or stop is None:
            content_start, content_stop = self._exchanged(text, messages, turn, place)
            start = content_start if start is None else start
            stop = content_stop if stop is None else stop
        stop = start + len(text[start:stop].rstrip())
        return start, stop

    def _exchanged(self, text: str, messages: Sequence[Message], turn: int, place: str) -> Span:
        """Returns where in `text` the turn's answer begins, and where its end-of-turn token ends."""
        other = {**messages[turn], "content": _SENTINEL}
        before, _, after = self.render([*messages[:turn], other, *messages[turn + 1 :]], place).partition(_SENTINEL)
        if not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
            raise UserError(
                f"{place}: the chat template changes more than turn {turn + 1} with its answer, so its tokens can't be told apart. "
                "Give --config.data.template with {% generation %} and {% endgeneration %} around what the assistant generates."
            )
        ending = self.render([*messages[:turn], other], place).partition(_SENTINEL)[2]
        return len(before), len(text) - len(after) + _shared(after, ending)


def _shared(one: str, other: str) -> int:
    """Returns how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(one), len(other)))


def chat_template(tokenizer: Any, given: str) -> ChatTemplate | None:
    """Returns the template to use, or None where there is none.

    Args:
        tokenizer: a fast tokenizer of transformers.
        given: `DataConfig.template`: Jinja text, the path of a file, plain, or empty for the tokenizer's own.

    Raises:
        UserError: the file doesn't exist or can't be read; plain, of a tokenizer without an end-of-text token.
    """
    if not given and not tokenizer.chat_template:
        return None
    if given in BUILT_IN and tokenizer.eos_token is None:
        raise UserError(
            f"The tokenizer has no end-of-text token (eos_token), which the template {given} ends answers with. Set it in its files."
        )
    text = _read_template(tokenizer, given) if given else tokenizer.get_chat_template()
    return ChatTemplate(tokenizer, (_FIXED_DATE if "strftime_now" in text else "") + text)


def with_template(tokenizer: Any, given: str) -> Any:
    """Returns the tokenizer with a template that is given as its own: it is exported with what the model learns to answer to.

    Arguments and errors are those of `chat_template`; the tokenizer is changed.
    """
    if given:
        tokenizer.chat_template = _read_template(tokenizer, given)
    return tokenizer


def _read_template(tokenizer: Any, given: str) -> str:
    if given in BUILT_IN:
        begins = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        return ("{{ bos_token }}" if begins else "") + BUILT_IN[given]  # as the tokenizer begins a text by itself
    if "{" in given:
        return given
    path = given_path(given)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"config.data.template: {given} is neither Jinja text nor a readable file ({error}).{nearest(path.name, [*beside, *BUILT_IN])}"
        ) from error


@contextlib.contextmanager
def _explained(messages: Sequence[Message], place: str) -> Iterator[None]:
    """Turns what a template raises into a message with its place."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"The chat template is not valid Jinja: {error.message} (line {error.lineno}). See --config.data.template."
        ) from error
    except Exception as error:  # whatever the template's code raises, the template or the row is at fault
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{place}: the chat template refuses the turns {roles}: {error}. Change the row, or give another --config.data.template."
        ) from error


def _token_spans(offsets: np.ndarray, spans: Sequence[Span]) -> list[Span]:
    """Returns the token spans that cover the text spans; a token that lies only partly in one belongs to it.

    Args:
        offsets: (length, 2) where each token begins and ends in the text.
        spans: where each turn begins and ends in the text.

    >>> _token_spans(np.array([[0, 3], [3, 4], [4, 9], [9, 10]]), [(4, 9)])
    [(2, 3)]
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    found = []
    for start, stop in spans:
        # A token of spaces only may have no width; it stands where it ends.
        last = max(np.searchsorted(begins, stop, side="left"), np.searchsorted(ends, stop, side="right"))
        found.append((int(np.searchsorted(ends, start, side="right")), int(last)))
    return found
