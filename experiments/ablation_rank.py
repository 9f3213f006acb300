"""Which rank? LoRA of six ranks on the BERT of full_bert_sentiment, each over three learning rates and three seeds.

    python launch.py --experiment=ablation_rank --mode=sweep

MiniLM-L6 on the bundled reviews, two epochs a run, 54 runs; alpha is twice the rank, so that a rate means the same at every rank.

Hardware: two CPU cores, 1.4 GB of memory; hours. A sweep that is stopped goes on where it was.
Its result isn't measured yet.
"""

import dataclasses

from experiments import ablation_methods
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA
from jaxft.sweep import Sweep, grid, product, seeds, zipped

VARIANTS = ()

_RANKS = (1, 2, 4, 8, 16, 64)


def get_config(variant: str = "") -> Experiment:
    """Returns ablation_methods' experiment, with a LoRA."""
    if variant:
        raise unknown("ablation_rank variant", variant, VARIANTS)
    return dataclasses.replace(ablation_methods.get_config(), name="ablation_rank", method=LoRA(rank=8, alpha=16.0))


def sweep(variant: str = "") -> Sweep:
    """Returns every rank at every rate, with three seeds."""
    ranks = zipped({"method.rank": _RANKS, "method.alpha": [2.0 * rank for rank in _RANKS]})
    return Sweep(product(ranks, grid({"optimizer.learning_rate": (2e-4, 6e-4, 2e-3)}), seeds(3)), vary=("method.rank", "method.alpha"))
