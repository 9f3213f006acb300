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
