"""BitFit of the BERT of full_bert_sentiment, on its data: biases alone.

    python launch.py --experiment=bitfit_bert_sentiment

The biases train, 0.1% of the parameters, and the head (Ben Zaken et al. 2021, arXiv:2106.10199).

Hardware: two CPU cores, 2.6 GB of memory.
Its result on the test reviews isn't measured yet.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import BitFit

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment, with the biases trained."""
    if variant:
        raise unknown("bitfit_bert_sentiment variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name="bitfit_bert_sentiment",
        method=BitFit(),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=1e-3),
    )
