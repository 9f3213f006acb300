"""Which checkpoint is the best: a direction that would keep the worst is told before anything trains."""

import dataclasses

import pytest

import experiments
from jaxft.errors import UserError
from jaxft.train import setup


@pytest.mark.parametrize(("metric", "mode", "right"), [("accuracy", "min", "max"), ("macro_f1", "min", "max"), ("loss", "max", "min")])
def test_a_mode_that_keeps_the_worst_is_refused(metric, mode, right):
    found = experiments.load("full_bert_sentiment")
    asked = dataclasses.replace(found, train=dataclasses.replace(found.train, best_metric=metric, best_mode=mode))
    with pytest.raises(UserError, match=f"would keep the worst {metric}. Set train.best_mode={right}"):
        setup.describe_run(asked)


def test_a_metric_that_the_task_has_not_is_told():
    found = experiments.load("full_bert_sentiment")
    asked = dataclasses.replace(found, train=dataclasses.replace(found.train, best_metric="acuracy"))
    with pytest.raises(UserError, match=r"no train.best_metric 'acuracy'. Did you mean 'accuracy'"):
        setup.describe_run(asked)


@pytest.mark.parametrize("change", [{"patience": 2, "eval_every": 1}, {"best_metric": "accuracy", "best_mode": "max"}], ids=str)
def test_a_choice_that_needs_a_validation_set_is_told_so(change):
    found = experiments.load("full_bert_sentiment")
    data = dataclasses.replace(found.data, split=(1.0, 0.0, 0.0))
    asked = dataclasses.replace(found, data=data, train=dataclasses.replace(found.train, **change))
    with pytest.raises(UserError, match=f"train.{next(iter(change))} has no effect without a validation set"):
        setup.describe_run(asked)


@pytest.mark.parametrize("change", [{"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_what_only_sampling_reads_is_refused_where_nothing_samples(change):
    found = experiments.load("lora_llama2")
    with pytest.raises(UserError, match=f"eval.{next(iter(change))} has no effect with eval.temperature=0"):
        setup.check(dataclasses.replace(found, eval=dataclasses.replace(found.eval, **change)))
