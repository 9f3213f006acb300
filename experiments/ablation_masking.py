"""Does hiding words help a tagger, and does it matter that they are drawn anew? Six policies and four static masks against none.

    python launch.py --experiment=ablation_masking --mode=sweep

lora_bert_tags with 15% of the words hidden in training: tokens, words, spans, words of entities twice as often as others, words by salience
or by loss, drawn anew in each step; tokens, words, spans and words of entities also with a mask that a row keeps (dynamic and static
masking, Liu et al. 2019, arXiv:1907.11692). Five seeds of each, 55 runs; the same rate, steps and rows for all.

Hardware: two CPU cores, 3 GB of memory; hours. A sweep that is stopped goes on where it was.
Its result isn't measured yet.
"""

import dataclasses

from experiments import lora_bert_tags
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.objectives import DynamicMask
from jaxft.sweep import Sweep, grid, product, seeds

VARIANTS = ()

_BY_POLICY = {
    "tokens": DynamicMask(policy="tokens"),
    "words": DynamicMask(policy="words"),
    "spans": DynamicMask(policy="spans"),
    "tags": DynamicMask(policy="tags", rate=0.15, entity_rate=0.3),
    "salience": DynamicMask(policy="salience"),
    "loss": DynamicMask(policy="loss"),
}
_STATIC = [dataclasses.replace(_BY_POLICY[policy], static=True) for policy in ("tokens", "words", "spans", "tags")]


def get_config(variant: str = "") -> Experiment:
    """Returns lora_bert_tags' experiment."""
    if variant:
        raise unknown("ablation_masking variant", variant, VARIANTS)
    return dataclasses.replace(lora_bert_tags.get_config(), name="ablation_masking")


def sweep(variant: str = "") -> Sweep:
    """Returns no masking, every policy anew in each step, and the static masks, with five seeds."""
    return Sweep(product(grid({"objective": [None, *_BY_POLICY.values(), *_STATIC]}), seeds(5)), metric="f1", vary=("objective",))
