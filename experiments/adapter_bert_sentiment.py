"""Bottleneck adapters on the BERT of full_bert_sentiment, on its data.

    python launch.py --experiment=adapter_bert_sentiment

Pfeiffer's adapter after the feed-forward part of each layer, and the head, train (arXiv:2005.00247).

Hardware: two CPU cores, 1.6 GB of memory; 15 minutes on one of them. 262,035 of 22,827,417 parameters train.
Its result over several seeds isn't measured yet. One run (seed 0) had 68.3% accuracy, 46.2% macro F1 and a loss of 0.773 on the test;
full_bert_sentiment with that seed 73.4%, 48.6% and 0.709, the majority class 65.4%, 26.4% and 0.849.
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
