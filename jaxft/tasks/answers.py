"""Generated answers against true ones: exact match, whole and by the fields of the completion's format; words and phrases in common."""

import collections
import re
import string
from collections.abc import Sequence

import sacrebleu

from jaxft.tasks.squad_figures import word_f1

Fields = dict[str, str]


class AnswerFormat:
    """Reads the fields of a completion format back from text.

    Attributes:
      names: the fields, in order; empty where the format has none.

    >>> answers = AnswerFormat("Condition: {condition}. Rating: {rating}")
    >>> answers.read("Condition: Acne. Rating: positive")
    {'condition': 'Acne', 'rating': 'positive'}
    """

    def __init__(self, completion: str):
        pieces = list(string.Formatter().parse(completion.strip())) if completion else []
        self.names = tuple(dict.fromkeys(name for _, name, _, _ in pieces if name))
        pattern, groups = "", dict[str, int]()  # by number: a column's name may be no name of a group
        for text, name, _, _ in pieces:
            pattern += r"\s+".join(re.escape(part) for part in re.split(r"\s+", text))
            if name:
                pattern += f"(?:\\{groups[name]})" if name in groups else "(.*?)"
                groups.setdefault(name, len(groups) + 1)
        self._pattern = re.compile(rf"\s*{pattern}\s*", re.DOTALL)

    def read(self, text: str) -> Fields:
        """Returns the fields of an answer; none where it isn't in the format."""
        found = self._pattern.fullmatch(text) if self.names else None
        return {name: value.strip() for name, value in zip(self.names, found.groups(), strict=True)} if found else {}


def equal_answers(made: Sequence[str], true: Sequence[str], answer_format: AnswerFormat) -> dict[str, float]:
    """Returns the share of answers that equal the true one, surrounding space aside; also by field, where the format has several.

    >>> equal_answers(["a"], ["b"], AnswerFormat(""))
    {'exact_match': 0.0}
    """
    scores = {"exact_match": sum(one.strip() == other.strip() for one, other in zip(made, true, strict=True)) / len(true)}
    if len(answer_format.names) > 1:
        pairs = [(answer_format.read(one), answer_format.read(other)) for one, other in zip(made, true, strict=True)]
        for name in answer_format.names:
            scores[f"exact_match_{name}"] = sum(name in one and one[name] == other.get(name) for one, other in pairs) / len(true)
    return scores


def overlap(made: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Returns how much of the true answers the made ones have, from 0 to 1.

    `token_f1` is the mean F1 of the words that two answers share, without case, punctuation and articles (Rajpurkar et al. 2016,
    arXiv:1606.05250); `rouge_l` the mean F1 of their longest common subsequence, by rouge-score (Lin 2004), which reads a to z and digits
    alone; `bleu` that of all answers together, by sacrebleu (Papineni et al. 2002; Post 2018, arXiv:1804.08771), of fewer than four words
    in a row where no answer has four.

    >>> overlap(["the cat sat"], ["A cat sat."])["token_f1"]
    1.0
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, since nltk comes with it, which takes a second

    scorer, pairs = RougeScorer(["rougeL"]), list(zip(made, true, strict=True))
    bleu = sacrebleu.BLEU(effective_order=True).corpus_score(list(made), [list(true)]).score
    return {
        "token_f1": sum(word_f1(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(scorer.score(other, one)["rougeL"].fmeasure for one, other in pairs) / len(pairs),
        "bleu": bleu / 100,
    }


def majority(training: Sequence[str], answer_format: AnswerFormat) -> Sequence[str] | Fields:
    """Returns what is answered most often in training: by field where the format has several, else as a whole."""
    if len(answer_format.names) > 1:
        fields = [answer_format.read(text) for text in training]
        return {name: _commonest([found[name] for found in fields if name in found]) for name in answer_format.names}
    return [_commonest([text.strip() for text in training])]


def majority_match(training: Sequence[str], true: Sequence[str], answer_format: AnswerFormat) -> dict[str, float]:
    """Returns the exact match of always giving the majority answer."""
    most = majority(training, answer_format)
    if not isinstance(most, dict):
        return equal_answers(list(most) * len(true), true, answer_format)
    read = [answer_format.read(text) for text in true]
    scores = {"exact_match": sum(found == most for found in read) / len(true)}
    return scores | {f"exact_match_{name}": sum(found.get(name) == value for found in read) / len(true) for name, value in most.items()}


def _commonest(values: Sequence[str]) -> str:
    return collections.Counter(values).most_common(1)[0][0] if values else ""
