"""Partial fine-tuning of the BERT of full_bert_sentiment, on its data: the last two layers.

    python launch.py --experiment=partial_bert_sentiment

The four layers below, and the embeddings, are frozen and take no backward pass; the head trains too.

Hardware: two CPU cores, 1.9 GB of memory; 7 minutes on one of them. 3,697,923 of 22,714,371 parameters train.
On the test, mean and deviation of seeds 0, 1, 2: 70.7% (4.6) accuracy, 40.2% (12.0) macro F1, a loss of 0.731 (0.048): two seeds reach what
full_bert_sentiment does (72.8% and 73.9%), the best checkpoint of the third answers the majority class, which has 65.4%, 26.4% and 0.849; a
logistic regression on TF-IDF has 70.8% (0.2), 38.8% (0.3) and 0.719 (0.003).
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
