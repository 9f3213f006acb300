"""Pseudo-answers for the Llama model of lora_llama2: a quarter of its reviews have an answer, the model answers the others itself.

    python launch.py --experiment=semi_supervised_llama2

Of 540 training reviews 135 keep their answer. In each step the model answers prompts of the others, and learns those of its answers whose
tokens it finds likely enough (self-training, as in He et al. 2019, arXiv:1909.13788). Runs anywhere, with nothing downloaded.

Variants: the 135 answers alone; and beside them the language model's loss on the others' prompts.

    python launch.py --experiment=semi_supervised_llama2:supervised
    python launch.py --experiment=semi_supervised_llama2:self_supervised

Hardware: two CPU cores.
Its result isn't measured yet.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.objectives import PseudoAnswers, SelfSupervised

VARIANTS = ("supervised", "self_supervised")
_OBJECTIVES = {"": PseudoAnswers(threshold=0.9, answer_tokens=24), "supervised": None, "self_supervised": SelfSupervised(weight=0.1)}


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment with most answers hidden, and the variant's objective."""
    if variant not in _OBJECTIVES:
        raise unknown("semi_supervised_llama2 variant", variant, VARIANTS)
    found, objective = lora_llama2.get_config(), _OBJECTIVES[variant]
    return dataclasses.replace(
        found,
        name=f"semi_supervised_llama2{variant and f':{variant}'}",
        data=dataclasses.replace(found.data, labelled_fraction=0.25),
        objective=objective,
        train=dataclasses.replace(found.train, unlabelled_batch_size=0 if objective is None else 1),
    )
