"""Partial fine-tuning of the BERT of full_bert_sentiment, on its data: the last two layers.

    python launch.py --experiment=partial_bert_sentiment

The four layers below, and the embeddings, are frozen and take no backward pass; the head trains too.

Hardware: two CPU cores, 2.6 GB of memory.
Its result on the test reviews isn't measured yet.
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
