"""The nested files that SQuAD comes in (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822), as rows."""

from collections.abc import Sequence
from typing import Any

_ARTICLE, _PARAGRAPH = "paragraphs", "qas"


def is_squad(records: Sequence[Any]) -> bool:
    """Returns whether the objects are SQuAD's articles, each of paragraphs with their questions.

    >>> is_squad([{"title": "Normans", "paragraphs": [{"context": "...", "qas": []}]}]), is_squad([{"context": "..."}])
    (True, False)
    """
    return bool(records) and all(isinstance(one, dict) and isinstance(one.get(_ARTICLE), list) for one in records)


def squad_rows(articles: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Returns a row a question: id, title, question, context, answers. What people found plausible but isn't an answer is left out.

    Args:
      articles: what `is_squad` knows.
      name: of the file, for messages.

    Raises:
      ValueError: an article of another form, with its place.
    """
    rows = []
    for a, article in enumerate(articles, start=1):
        for p, paragraph in enumerate(article[_ARTICLE], start=1):
            place = f"{name}, article {a}, paragraph {p}"
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get(_PARAGRAPH), list):
                raise ValueError(f'{place}: expected {{"context": text, "qas": [...]}}.')
            for q, asked in enumerate(paragraph[_PARAGRAPH], start=1):
                try:
                    rows.append(_row(article, paragraph, asked))
                except (KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f'{place}, question {q}: expected {{"id": text, "question": text, "answers": [{{"text": text, "answer_start": '
                        f"number}}, ...]}} and a context ({type(error).__name__}: {error})."
                    ) from error
    return rows


def _row(article: dict[str, Any], paragraph: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    answers = asked.get("answers") or []
    return {
        "id": str(asked.get("id", "")),
        "title": article.get("title", ""),
        "question": asked["question"],
        "context": paragraph["context"],
        "answers": {"text": [one["text"] for one in answers], "answer_start": [one["answer_start"] for one in answers]},
    }
