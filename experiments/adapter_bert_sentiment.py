"""Bottleneck adapters on the BERT of full_bert_sentiment, on its data.

    python launch.py --experiment=adapter_bert_sentiment

Pfeiffer's adapter after the feed-forward part of each layer, and the head, train (arXiv:2005.00247).

Hardware: two CPU cores, 1.6 GB of memory; 15 minutes on one of them. 262,035 of 22,827,417 parameters train.
On the test, mean and deviation of seeds 0, 1, 2: 71.5% (2.8) accuracy, 45.7% (5.0) macro F1, a loss of 0.732 (0.027); the majority class
has 65.4%, 26.4% and 0.849, a logistic regression on TF-IDF 70.8% (0.2), 38.8% (0.3) and 0.719 (0.003).
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import Bottleneck

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment, with Pfeiffer's adapter."""
    if variant:
        raise unknown("adapter_bert_sentiment variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name="adapter_bert_sentiment",
        method=Bottleneck.seq_bn(),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=1e-3),
    )
