"""BitFit of the BERT of full_bert_sentiment, on its data: biases alone.

    python launch.py --experiment=bitfit_bert_sentiment

The biases train, 0.1% of the parameters, and the head (Ben Zaken et al. 2021, arXiv:2106.10199).

Hardware: two CPU cores, 1.5 GB of memory; 10 minutes on one of them. 174,723 of 22,714,371 parameters train, 148,995 of them the pooler's
and the classifier's.
On the test, mean and deviation of seeds 0, 1, 2: 65.8% (0.8) accuracy, 32.7% (7.6) macro F1, a loss of 0.822 (0.020): hardly more than the
majority class, which has 65.4%, 26.4% and 0.849. The rate is the best of 1e-3, 3e-3 and 1e-2 by the validation loss of seed 0 (0.796, 0.833
and 0.871).
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
