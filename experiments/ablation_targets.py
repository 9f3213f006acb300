"""Which layers? LoRA on four choices of kernels of the BERT of full_bert_sentiment, each over three learning rates and three seeds.

    python launch.py --experiment=ablation_targets --mode=sweep

MiniLM-L6 on the bundled reviews, two epochs a run, 36 runs: queries and values, as LoRA's paper has it (arXiv:2106.09685); attention's four
kernels; the two of the feed-forward part; all six.

Hardware: two CPU cores, 1.4 GB of memory; hours. A sweep that is stopped goes on where it was.
Its result isn't measured yet.
"""

import dataclasses

from experiments import ablation_methods
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA
from jaxft.sweep import Sweep, grid, product, seeds

VARIANTS = ()

_TARGETS = (("query", "value"), ("attention",), ("intermediate", "[0-9]+/output"), ("layers",))


def get_config(variant: str = "") -> Experiment:
    """Returns ablation_methods' experiment, with a LoRA."""
    if variant:
        raise unknown("ablation_targets variant", variant, VARIANTS)
    return dataclasses.replace(ablation_methods.get_config(), name="ablation_targets", method=LoRA(rank=8, alpha=16.0))


def sweep(variant: str = "") -> Sweep:
    """Returns every choice of targets at every rate, with three seeds."""
    runs = product(grid({"method.targets": _TARGETS}), grid({"optimizer.learning_rate": (2e-4, 6e-4, 2e-3)}), seeds(3))
    return Sweep(runs, vary=("method.targets",))
