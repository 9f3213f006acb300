"""FixMatch on the BERT of full_bert_sentiment: 60 labelled reviews, and 480 whose labels are hidden.

    python launch.py --experiment=semi_supervised_bert_sentiment

Of the 600 training reviews 60 are the validation set, 60 keep their label, each rating its share of them, and 480 are rows without labels:
the model learns what it says of a review itself, where it is sure of it, from a view of it with tokens masked, taken out and swapped
(Sohn et al. 2020, arXiv:2001.07685). 379 reviews are the test. Runs anywhere, with nothing downloaded. Another way to use the 480 is
named by a flag, as --config.objective="FlexMatch(threshold=0.8)"; benchmarks/label_efficiency.py compares them over seeds and labels.

Variant: the 60 labels alone, which it is to be compared with.

    python launch.py --experiment=semi_supervised_bert_sentiment:supervised

Hardware: two CPU cores, 2.8 GB of memory; 16 minutes of processor time on an AMD EPYC of 2017, of `supervised` 6. 22,714,371 parameters
train.
On the test, mean and deviation of seeds 0, 1, 2, the checkpoint of the least loss on validation: 65.1% (0.6) accuracy, 32.0% (6.9) macro
F1, a loss of 0.904 (0.086); `supervised` 66.8% (1.2), 35.3% (6.9) and 0.885 (0.076), its F1 and loss better for each seed; the majority
class has 65.4% and 26.4%, a logistic regression on TF-IDF 65.6% (0.2) and 26.9% (0.4). FixMatch gains nothing here: the model that 60
labels make is hardly better than the majority, and so are the labels that it gives itself.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment, TrainConfig
from jaxft.errors import unknown
from jaxft.objectives import FixMatch

VARIANTS = ("supervised",)
LABELS, TRAINING_ROWS = 60, 540


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment with most labels hidden, and FixMatch on the rows that have none."""
    if variant not in ("", *VARIANTS):
        raise unknown("semi_supervised_bert_sentiment variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name=f"semi_supervised_bert_sentiment{variant and f':{variant}'}",
        data=dataclasses.replace(found.data, labelled_fraction=LABELS / TRAINING_ROWS),
        objective=None if variant else FixMatch(threshold=0.8, masked=0.15),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=1e-4),
        train=TrainConfig(steps=150, batch_size=2, unlabelled_batch_size=0 if variant else 4, eval_every=50),  # rows hold two reviews or so
    )
