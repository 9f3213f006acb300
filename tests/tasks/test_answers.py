"""Exact match of generated answers, whole and by field; words and phrases in common, by the libraries that define them."""

import string

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from jaxft.tasks.answers import AnswerFormat, equal_answers, majority, majority_match, overlap

REVIEW = AnswerFormat("Condition: {condition}. Experience: {experience}")
TRUE = ["Condition: Acne. Experience: positive", "Condition: Back pain. Experience: negative", "Condition: Acne. Experience: negative"]


def test_the_whole_answer_and_each_field_are_matched():
    made = ["Condition: Acne. Experience: positive", "Condition: Back pain. Experience: positive", "I don't know."]
    assert equal_answers(made, TRUE, REVIEW) == {
        "exact_match": 1 / 3,
        "exact_match_condition": 2 / 3,
        "exact_match_experience": 1 / 3,
    }


def test_surrounding_space_is_left_aside():
    assert equal_answers([f" {TRUE[0]}\n"], TRUE[:1], REVIEW) == {
        "exact_match": 1.0,
        "exact_match_condition": 1.0,
        "exact_match_experience": 1.0,
    }


def test_without_fields_or_with_one_only_the_whole_answer_is_matched():
    assert equal_answers(["a", "b"], ["a", "c"], AnswerFormat("")) == {"exact_match": 0.5}
    assert equal_answers(["Label: a"], ["Label: a"], AnswerFormat("Label: {label}")) == {"exact_match": 1.0}


@pytest.mark.parametrize("text", ["Condition Acne. Experience: positive", "Well. Condition: Acne. Experience: positive", ""])
def test_text_in_another_form_has_no_fields(text):
    assert REVIEW.read(text) == {}


def test_characters_of_expressions_stand_for_themselves():
    form = AnswerFormat("[{a}] (b|c)* {{literal}} {d}?")
    assert form.read("[x] (b|c)* {literal} y?") == {"a": "x", "d": "y"}


def test_a_field_that_stands_twice_is_the_same_twice():
    form = AnswerFormat("{a} is {a}, {b}")
    assert form.names == ("a", "b")
    assert form.read("x is x, y") == {"a": "x", "b": "y"}
    assert form.read("x is z, y") == {}


def test_lines_and_spaces_of_the_form_are_matched_loosely():
    assert AnswerFormat("A: {a}\nB: {b}").read("A: 1\n  B:  2") == {"a": "1", "b": "2"}


def test_space_around_the_form_is_the_answers_own_and_a_column_has_any_name():
    form = AnswerFormat(" A: {a}\nB: {Best Answer}\n")
    found = equal_answers(["A: 1\nB: 2"], [" A: 1\nB: 2\n"], form)
    assert found == dict.fromkeys(("exact_match", "exact_match_a", "exact_match_Best Answer"), 1.0)
    assert AnswerFormat("{1-a}, {1-a}0 {b}").read("x, x0 y") == {"1-a": "x", "b": "y"}


VALUE = st.text(string.ascii_letters + string.digits + " \n-", min_size=1).map(str.strip).filter(bool)


@given(VALUE, VALUE)
def test_what_is_written_in_the_form_is_read_back(condition, experience):
    text = f"Condition: {condition}. Experience: {experience}"
    assert REVIEW.read(text) == {"condition": condition, "experience": experience}


def test_the_majority_answers_each_field_on_its_own():
    training = [*TRUE, "Condition: Flu. Experience: negative"]
    assert majority(training, REVIEW) == {"condition": "Acne", "experience": "negative"}
    assert majority_match(training, TRUE, REVIEW) == {
        "exact_match": 1 / 3,
        "exact_match_condition": 2 / 3,
        "exact_match_experience": 2 / 3,
    }


def test_the_majority_of_whole_answers_where_there_are_no_fields():
    assert majority(["a", "b ", "b"], AnswerFormat("")) == ["b"]
    assert majority_match(["a", "b ", "b"], ["b", "b", "a", "c"], AnswerFormat("")) == {"exact_match": 0.5}


class Words:
    """SQuAD's words, for rouge-score: its score of single words is then SQuAD's F1."""

    def tokenize(self, text):
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]


ANSWERS = st.lists(st.sampled_from(["The", "a", "cat", "Cat", "sat,", "on", "mat.", "42", "it's"]), min_size=1, max_size=9).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=5))
def test_overlap_is_that_of_the_libraries(pairs):
    made, true = map(list, zip(*pairs, strict=True))
    found = overlap(made, true)
    longest, words = RougeScorer(["rougeL"]), RougeScorer(["rouge1"], tokenizer=Words())
    scores = [words.score(other, one)["rouge1"].fmeasure for one, other in pairs]
    scores = [score if Words().tokenize(one) or Words().tokenize(other) else 1.0 for score, (one, other) in zip(scores, pairs, strict=True)]
    assert found["token_f1"] == pytest.approx(sum(scores) / len(pairs))
    assert found["rouge_l"] == pytest.approx(sum(longest.score(other, one)["rougeL"].fmeasure for one, other in pairs) / len(pairs))
    if any(len(text.split()) >= 4 for text in made):
        assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(made, [true]).score / 100)


@pytest.mark.parametrize("texts", [["positive"], ["Acne.", "Back pain"], ["one two three four five"]])
def test_answers_that_are_the_true_ones_have_all_in_common(texts):
    assert overlap(texts, texts) == pytest.approx({"token_f1": 1.0, "rouge_l": 1.0, "bleu": 1.0})


def test_answers_without_words_are_right_or_wrong_as_a_whole():
    assert overlap(["", "a"], ["the", "cat"])["token_f1"] == 0.5
