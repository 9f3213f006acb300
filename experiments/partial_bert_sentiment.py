"""Partial fine-tuning of the BERT of full_bert_sentiment, on its data: the last two layers.

    python launch.py --experiment=partial_bert_sentiment

The four layers below, and the embeddings, are frozen and take no backward pass; the head trains too.

Hardware: two CPU cores, 1.9 GB of memory; 7 minutes on one of them. 3,697,923 of 22,714,371 parameters train.
Its result over several seeds isn't measured yet. One run (seed 0) had 70.4% accuracy, 46.0% macro F1 and a loss of 0.722 on the test;
full_bert_sentiment with that seed 73.4%, 48.6% and 0.709, the majority class 65.4%, 26.4% and 0.849.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import Partial

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment, with the last two layers trained."""
    if variant:
        raise unknown("partial_bert_sentiment variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name="partial_bert_sentiment",
        method=Partial(last=2),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=1e-4),
    )
