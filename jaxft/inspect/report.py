"""The look as text and as JSON."""

import dataclasses
from typing import Any

from jaxft import console
from jaxft.inspect.findings import Case, Finding, counted, shortened
from jaxft.inspect.look import Look, label_counts, length_statistics
from jaxft.inspect.shown import SCORED, Shown

_CASES = 3  # of a finding in the text
_LABELS = 12  # values of a column in the text
_EXCERPT = 110  # characters of a row in the text
_RUN = 240  # characters of what isn't scored, before it is shortened in its middle
OPENS, CLOSES = "⟦", "⟧"  # around scored tokens


def say(look: Look) -> None:
    """Prints the look."""
    columns = ("set", "source", "rows", "tokens", "min", "median", "mean", "95%", "max", "scored", "cut")
    console.table("Data", columns, [_lengths(look, number) for number in range(len(look.sets))])
    for column, values in label_counts(look.sets).items():
        rows = [(shortened(value, _EXCERPT), *_shares(look, column, counts)) for value, counts in list(values.items())[:_LABELS]]
        more = f", the {_LABELS} most frequent of {len(values):,}" if len(values) > _LABELS else ""
        console.table(f"Labels: {column}{more}", ("value", *(texts.name for texts in look.sets)), rows)
    console.say(f"Three rows of train as the model reads them; what is scored stands between {OPENS} and {CLOSES}\n")
    for shown in look.shown:
        console.say(f"{shown.place} ({shown.which}):\n{_marked(shown)}\n")
    if look.sampled:
        console.say(f"{look.sampled}\n")
    if not look.findings:
        console.say("No fault was found.\n")
        return
    console.say(f"{counted(len(look.findings), 'finding')}:\n")
    for found in look.findings:
        _say_finding(found)


def _lengths(look: Look, number: int) -> tuple[str, ...]:
    texts, found = look.sets[number], length_statistics(look.encoded[number])
    cut = f"{found['cut_rows']:,} rows, {found['cut_tokens']:,} tokens" if found["cut_rows"] else "0"
    lengths = (f"{found[name]:,.0f}" for name in ("tokens", "min", "median", "mean", "95%", "max"))
    return (texts.name, texts.rows.name, f"{len(texts.rows):,}", *lengths, f"{found['scored']:.1%}", cut)


def _shares(look: Look, column: str, counts: dict[str, int]) -> list[str]:
    """Each set's number of a value, and its share of the set's values."""
    totals = {texts.name: len(labels.values) for texts in look.sets for labels in texts.labels if labels.name == column}
    return [f"{count:,}  {count / totals[name]:6.1%}" if count else "-" for name, count in counts.items()]


def _marked(shown: Shown) -> str:
    """A row as text with its scored tokens marked."""
    parts = []
    for run in shown.runs():
        if run.state == SCORED:
            parts.append(f"{OPENS}{run.text}{CLOSES}")
        elif run.state == "cut":
            parts.append(f" [cut: {counted(len(run.text), 'character')}]")
        else:
            parts.append(_without_middle(run.text))
    label = f"  -> {shown.answer}" if shown.answer else ""
    return "\n".join(f"    {line}" for line in f"{''.join(parts)}{label}".splitlines())


def _without_middle(text: str) -> str:
    half = _RUN // 2
    return text if len(text) <= 2 * _RUN else f"{text[:half]} [{len(text) - 2 * half:,} characters] {text[-half:]}"


def _say_finding(found: Finding) -> None:
    console.say(f"{found.weight.capitalize()}: {found.title}.\n  {found.advice}")
    for case in found.cases[:_CASES]:
        for line in _case_lines(case):
            console.say(f"    {line}")
    if found.count > _CASES:
        console.say(f"    ... {found.count - _CASES:,} more in inspect.html")
    console.say()


def _case_lines(case: Case) -> list[str]:
    lines = [f"- {case.note}"] if case.note else []
    for spot in case.spots[:_CASES]:
        answer = f" -> {shortened(spot.answer, _EXCERPT // 2)}" if spot.answer else ""
        lead = "  " if case.note else "- " if spot is case.spots[0] else "  "
        lines.append(f"{lead}[{spot.set}] {spot.place}: {shortened(spot.text, _EXCERPT)}{answer}")
    if len(case.spots) > _CASES:
        lines.append(f"  and {counted(len(case.spots) - _CASES, 'row')} more")
    return lines


def as_json(look: Look) -> dict[str, Any]:
    """Returns the look as JSON has it: sets, findings with the rows that show each, the three rows by token."""
    sets = {
        texts.name: {"source": texts.rows.name, "rows": len(texts.rows), "lengths": length_statistics(encoded)}
        for texts, encoded in zip(look.sets, look.encoded, strict=True)
    }
    return {
        "experiment": look.experiment,
        "data": dataclasses.asdict(look.data),
        "sets": sets,
        "labels": label_counts(look.sets),
        "findings": [dataclasses.asdict(one) for one in look.findings],
        "shown": [dataclasses.asdict(one) for one in look.shown],
        "sampled": look.sampled,
    }
