"""Questions for the drug and the condition of patients' reviews, made of the reviews' own fields, in the form of SQuAD 2.0."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_UNANSWERABLE = 3  # of the reviews that could make a question without an answer, each third one does: about a third of all questions


def drug_questions(reviews: Sequence[Mapping[str, str]], known: Sequence[Mapping[str, str]], no_condition: str) -> list[dict[str, Any]]:
    """Returns rows with id, question, context and answers, in the order of the reviews.

    A review whose text names its drug makes a question for the drug, one that names its condition a question for that; the answers are
    all places that name it. A review that names none of the known drugs (conditions) makes a question without an answer, in each third
    case. Where a review names others only, nothing says which of them is right, and nothing is asked.

    Names are found whatever their case, as whole words, with one letter more at their end: plural forms, and names that the data set has
    cut short by one ("Bipolar Disorde"); one that begins with a small letter has lost the first ("ibromyalgia").

    Args:
      reviews: of the set: drug, condition, text.
      known: all reviews, for the names of drugs and conditions.
      no_condition: what stands for a condition that isn't told.
    """
    names = {
        "drug": {part for review in known for part in (review["drug"], *review["drug"].split(" / "))},
        "condition": {review["condition"] for review in known} - {no_condition},
    }
    patterns = {field: [_pattern(name) for name in sorted(found)] for field, found in names.items()}
    rows, unnamed = [], dict.fromkeys(names, 0)
    for number, review in enumerate(reviews, start=1):
        for field in names:
            if review[field] == no_condition:
                continue
            answers = [(found.group(), found.start()) for found in _pattern(review[field]).finditer(review["text"])]
            if not answers:
                if any(pattern.search(review["text"]) for pattern in patterns[field]):
                    continue
                unnamed[field] += 1
                if unnamed[field] % _UNANSWERABLE:
                    continue
            rows.append(_row(f"{number}-{field}", _question(field, review, no_condition), review["text"], answers))
    return rows


def _row(name: str, question: str, context: str, answers: Sequence[tuple[str, int]]) -> dict[str, Any]:
    columns = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return {"id": name, "question": question, "context": context, "answers": columns}


def _question(field: str, review: Mapping[str, str], no_condition: str) -> str:
    if field == "condition":
        return f"Which condition is {review['drug']} taken for?"
    return "Which drug is taken?" if review["condition"] == no_condition else f"Which drug is taken for {review['condition']}?"


def _pattern(name: str) -> re.Pattern[str]:
    lost = r"\w" if name[0].islower() else ""
    return re.compile(rf"\b{lost}{re.escape(name)}\w?\b", re.IGNORECASE)
