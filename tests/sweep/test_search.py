"""What Optuna proposes, is told, and gives up: without a run."""

import itertools
import math

import pytest

from experiments import full_bert_sentiment
from jaxft.errors import UserError
from jaxft.sweep import Search, choice, log_uniform, uniform
from jaxft.sweep.runs import DONE, RUNNING, name_runs
from jaxft.sweep.search import Searcher, check_search

RATE = {"optimizer.learning_rate": log_uniform(1e-5, 1e-1)}
CHOICES = {"method.rank": choice(2, 4, 8), "train.seed": choice(0, 1)}


def searched(search, value, count, mode="min", kept=()):
    """Returns the runs of a search, which come to `value(overrides)`; `kept` are those of an earlier start."""
    searcher, runs = Searcher(search, mode), list(kept)
    for number in itertools.count():
        if number >= len(runs):
            if number == count or (proposed := searcher.propose(number)) is None:
                return runs
            runs += name_runs([proposed], first=number)
        searcher.adopt(runs[number])
        searcher.observe(runs[number].id, DONE, [(1, value(runs[number].overrides))])


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_run_is_proposed_twice_and_a_space_without_another_ends(sampler):
    runs = searched(Search(CHOICES, trials=50, sampler=sampler), lambda run: float(run["method.rank"]), 50)
    found = [tuple(run.overrides.items()) for run in runs]
    assert len(found) == len(set(found)) == 6


@pytest.mark.parametrize("mode", ["min", "max"])
def test_tpe_comes_back_to_what_was_good_and_random_draws_do_not(mode):
    def distance(run):  # from a rate of 1e-2, which is best
        return abs(math.log10(run["optimizer.learning_rate"]) + 2)

    near = {}
    for sampler in ("tpe", "random"):
        runs = searched(Search(RATE, sampler=sampler), lambda run: distance(run) * (1 if mode == "min" else -1), 40, mode)
        near[sampler] = sum(distance(run.overrides) < 0.5 for run in runs[20:])
    assert near["tpe"] >= 12
    assert near["random"] <= 8


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_goes_on_proposes_what_one_left_alone_does(sampler):
    def value(run):
        return run["optimizer.learning_rate"] * run["method.rank"]

    search = Search(RATE | CHOICES, sampler=sampler)
    whole = searched(search, value, 25)
    assert searched(search, value, 25, kept=whole[:14]) == whole


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_a_run_that_is_far_worse_is_given_up_and_a_good_one_is_not(pruner):
    searcher = Searcher(Search(RATE, trials=20, sampler="random", pruner=pruner), "min")
    for number in range(10):
        (run,) = name_runs([searcher.propose(number)], first=number)
        searcher.adopt(run)
        searcher.observe(run.id, DONE, [(step, 1.0 - step / 100 + number / 1000) for step in range(1, 9)])
    given_up = []
    for number, value in ((10, 9.0), (11, 0.1)):
        (run,) = name_runs([searcher.propose(number)], first=number)
        searcher.adopt(run)
        given_up.append(any(searcher.observe(run.id, RUNNING, [(step, value) for step in range(1, last)]) for last in range(2, 9)))
    assert given_up == [True, False]


def test_without_a_pruner_nothing_is_given_up():
    searcher = Searcher(Search(RATE, sampler="random"), "min")
    for number in range(8):
        (run,) = name_runs([searcher.propose(number)], first=number)
        searcher.adopt(run)
        assert not searcher.observe(run.id, RUNNING, [(step, float(number)) for step in range(1, 9)])
        searcher.observe(run.id, DONE, [(9, float(number))])


def test_a_space_of_other_things_than_draws_is_refused():
    with pytest.raises(UserError, match=r"draws optimizer.learning_rate by uniform\(\), .* not from \(1e-05, 0.01\)"):
        check_search(Search({"optimizer.learning_rate": (1e-5, 1e-2)}), full_bert_sentiment.get_config())
    check_search(Search({"optimizer.learning_rate": uniform(1e-5, 1e-2)}), full_bert_sentiment.get_config())
