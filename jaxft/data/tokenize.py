"""Rows as tokens: what the model reads, which tokens are scored, and a cache of both by content."""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
import transformers

from jaxft.config import DataConfig
from jaxft.data.conversations import Conversation, Message, conversation
from jaxft.data.encode import check_fast
from jaxft.data.examples import Examples, NextTokens
from jaxft.data.rows import Rows
from jaxft.data.template import ChatTemplate, Span, chat_template
from jaxft.errors import UserError

VERSION = 2  # of what this code makes of the same rows: raise it when that changes, so that older cache files are not read
CHUNK = 1000  # rows the tokenizer gets at once: it works on them in parallel


def tokenize(rows: Rows, tokenizer: Any, config: DataConfig) -> NextTokens:
    """Returns the rows as tokens, from the cache where the same were tokenized before.

    The cache is the folder `$JAXFT_CACHE`, or ~/.cache/jaxft.

    Args:
        rows: in any of the formats of `conversation`.
        tokenizer: a fast tokenizer of transformers.
        config: all but the sources and packing.

    Raises:
        UserError: a row that is no conversation; one whose scored tokens would all be cut; a tokenizer that lacks what is needed.
    """
    if config.max_length < 2:
        raise UserError(f"config.data.max_length is {config.max_length}: a row needs at least 2 tokens, one to predict the other.")
    check_fast(tokenizer)
    found = [conversation(row, config, rows.place(i)) for i, row in enumerate(rows.dataset)]
    template = chat_template(tokenizer, config.template)
    path = _cache_folder() / f"{_key(found, tokenizer, template, config.max_length)}.safetensors"
    examples = _read_cache(path, len(rows)) if config.cache else None
    if examples is None:
        examples = _collect(_rows(found, rows, tokenizer, template), found, rows, config.max_length)
        if config.cache:
            _write_cache(path, examples)
    return examples


def prompt_tokens(asked: Sequence[Sequence[Message]], places: Sequence[str], tokenizer: Any, config: DataConfig) -> list[np.ndarray]:
    """Returns what the model is given of each conversation to answer it, (length,) int32: as training has it before an answer.

    Args:
        asked: each conversation's turns up to the answer, as `question` gives them.
        places: where each stands, for messages.
        tokenizer: a fast tokenizer of transformers.
        config: of it `template`.
    """
    template = chat_template(tokenizer, config.template)
    if template is None and any(len(turns) > 1 for turns in asked):
        raise UserError(
            "The tokenizer has no chat template, so a prompt is one text. Give --config.data.template=plain, or one, for more turns."
        )
    if template is None:
        found = tokenizer([turns[0]["content"] for turns in asked])["input_ids"]
        found = [tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens for tokens in found]  # as some end every text
    else:
        texts = [template.prompt(turns, place) for turns, place in zip(asked, places, strict=True)]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.asarray(tokens, np.int32) for tokens in found]


COLUMNS = ("set", "rows", "tokens", "min", "median", "mean", "95%", "max", "scored", "cut")


def describe(examples: Examples, name: str) -> tuple[str, ...]:
    """Returns the length statistics of one set's examples, a cell for each of `COLUMNS`, for `jaxft.console.table`.

    Args:
        examples: the set, tokenized.
        name: the set's name, as "train".
    """
    lengths, rows_cut = examples.lengths, int((examples.cut > 0).sum())
    numbers = (lengths.min(), np.median(lengths), lengths.mean(), np.percentile(lengths, 95), lengths.max())
    cut = f"{rows_cut:,} rows, {examples.cut.sum():,} tokens" if rows_cut else "0"
    count, cells = len(np.unique(examples.rows)), (f"{number:,.0f}" for number in (lengths.sum(), *numbers))
    rows = f"{count:,}" if count == len(examples) else f"{count:,} in {len(examples):,} windows"
    return (name, rows, *cells, f"{len(examples.slots.reads) / len(examples.tokens):.1%}", cut)


# ---------------------------------------------------------------- tokens and masks


def _rows(
    found: Sequence[Conversation], rows: Rows, tokenizer: Any, template: ChatTemplate | None
) -> Iterator[tuple[np.ndarray, list[Span]]]:
    """Yields each row's tokens and the spans of its scored turns."""
    for start in range(0, len(found), CHUNK):
        part = found[start : start + CHUNK]
        yield from turn_tokens(part, [rows.place(start + i) for i in range(len(part))], tokenizer, template)


def turn_tokens(
    found: Sequence[Conversation], places: Sequence[str], tokenizer: Any, template: ChatTemplate | None
) -> list[tuple[np.ndarray, list[Span]]]:
    """Returns each conversation's tokens, (length,) int32, uncut, and the token spans of its scored turns.

    Args:
        found: some of the rows, as many as the tokenizer shall work on at once.
        places: where each stands, for messages.
        tokenizer: a fast tokenizer of transformers.
        template: as `chat_template` gives it.

    Raises:
        UserError: a row that the template refuses, or that can't do without one.
    """
    tokens = {}
    if template is not None:
        chats = [i for i, one in enumerate(found) if one.messages]
        tokens = dict(zip(chats, template.tokens([found[i] for i in chats], [places[i] for i in chats]), strict=True))
    return [tokens[i] if i in tokens else _plain_tokens(one, tokenizer, places[i]) for i, one in enumerate(found)]


def scored_tokens(length: int, turns: Sequence[Span], everything: bool) -> np.ndarray:
    """Returns which of a row's tokens are scored, (length,) bool."""
    scored = np.full(length, everything)
    for begin, end in turns:
        scored[begin:end] = True
    scored[:1] = False  # nothing stands before the first token that could predict it
    return scored


def _plain_tokens(found: Conversation, tokenizer: Any, place: str) -> tuple[np.ndarray, list[Span]]:
    """Returns a row without a chat template: text, or a prompt joined with its completion; then the end-of-text token."""
    if found.messages and not found.plain:
        raise UserError(
            f"{place}: the tokenizer has no chat template, which the row's format needs. Give --config.data.template=plain, or one, or "
            "text formats in --config.data.prompt and --config.data.completion."
        )
    if len(found.messages) > 2:
        raise UserError(
            f"{place}: the tokenizer has no chat template to put config.data.system into. Write it into "
            "config.data.prompt, or give --config.data.template=plain."
        )
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-text token (eos_token), so a model could not learn to stop. Set it in its files.")
    prompt, completion = [message["content"] for message in found.messages] or ["", found.text]
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    tokens = encoded["input_ids"]
    if tokens[-1] != tokenizer.eos_token_id:
        tokens = [*tokens, tokenizer.eos_token_id]
    ends = np.array(encoded["offset_mapping"]).reshape(-1, 2)[:, 1]
    start = int(np.argmax(ends > len(prompt)))
    return np.asarray(tokens, dtype=np.int32), [(start, len(tokens))]


def unscored(scored: np.ndarray, max_length: int) -> str:
    """Returns why a row would leave nothing to learn, or an empty string where it leaves something."""
    if not scored.any():
        return f"none of its {len(scored)} tokens is scored. Check its assistant turns and the template."
    if not scored[:max_length].any():
        first = scored.argmax() + 1
        return (
            f"{len(scored)} tokens, the first scored one at {first}, but config.data.max_length is {max_length}, so no scored token would "
            "be left. Raise it, or shorten or remove the row."
        )
    return ""


def _collect(tokenized: Iterator[tuple[np.ndarray, list[Span]]], found: Sequence[Conversation], rows: Rows, max_length: int) -> NextTokens:
    """Returns the examples, each cut to `max_length`."""
    all_tokens, all_scored, prompts, answers = [], [], [], []
    lengths = np.zeros(len(found), dtype=np.int32)
    for i, (tokens, turns) in enumerate(tokenized):
        scored = scored_tokens(len(tokens), turns, found[i].everything)
        if reason := unscored(scored, max_length):
            raise UserError(f"{rows.place(i)}: {reason}")
        kept = [turn for turn in turns if turn[0] < max_length]
        all_tokens.append(tokens[:max_length])
        all_scored.append(scored[:max_length])
        prompts.append(max(kept[-1][0], 1) if kept else min(len(tokens), max_length))
        answers.append(_answer(found[i], len(turns) - len(kept)))
        lengths[i] = len(tokens)
    offsets = np.cumsum([0, *(len(tokens) for tokens in all_tokens)], dtype=np.int64)
    cut = np.maximum(lengths - max_length, 0)
    return NextTokens(np.concatenate(all_tokens), offsets, cut, np.concatenate(all_scored), np.asarray(prompts, np.int32), tuple(answers))


def _answer(found: Conversation, dropped: int) -> str:
    """Returns the text of the last scored turn but for the `dropped` ones that max_length cut."""
    if not found.messages:
        return found.text
    return found.messages[found.scored[max(len(found.scored) - 1 - dropped, 0)]]["content"]


# ---------------------------------------------------------------- the cache


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "tokens"


def _key(found: Sequence[Conversation], tokenizer: Any, template: ChatTemplate | None, max_length: int) -> str:
    """Returns a digest of all that decides the tokens."""
    digest = hashlib.sha256()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = (VERSION, tokenizers.__version__, transformers.__version__)
    for part in (versions, tokenizer.backend_tokenizer.to_str(), special, template and template.text, max_length):
        digest.update(json.dumps(part).encode() + b"\n")
    for one in found:
        digest.update(json.dumps(dataclasses.astuple(one)).encode() + b"\n")
    return digest.hexdigest()


def _read_cache(path: pathlib.Path, count: int) -> NextTokens | None:
    """Returns the examples of a cache file, or None where there is none or it is damaged."""
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
        answers = tuple(json.loads(arrays.pop("answers").tobytes()))
        examples = NextTokens(answers=answers, **arrays)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return None
    whole = len(examples) == len(answers) == len(examples.prompts) == len(examples.cut) == count
    return examples if whole and examples.offsets[-1] == len(examples.tokens) == len(examples.scored) else None


def _write_cache(path: pathlib.Path, examples: NextTokens) -> None:
    """Writes the file beside its place and renames it into it, so that no reader ever sees half of it."""
    arrays = {field.name: getattr(examples, field.name) for field in dataclasses.fields(examples)}
    arrays["answers"] = np.frombuffer(json.dumps(examples.answers).encode(), dtype=np.uint8)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = pathlib.Path(file.name)
            file.write(safetensors.numpy.save(arrays))
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"The cache folder {path.parent} can't be written ({error.strerror}). Set JAXFT_CACHE to another, or --config.data.cache=False."
        ) from error
