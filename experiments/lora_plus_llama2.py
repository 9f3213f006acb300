"""LoRA+ fine-tuning of the Llama model of lora_llama2, on its data.

    python launch.py --experiment=lora_plus_llama2

lora_b learns at sixteen times lora_a's rate, as the paper advises (Hayou et al. 2024, arXiv:2402.12354).

Hardware: two CPU cores, 2.6 GB of memory; 283 tokens/s, a step in 1.01 of lora_llama2's time (benchmarks/results/methods.md). 2,442,240
parameters train.
Its result on held-out reviews isn't measured yet.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment, with LoRA+."""
    if variant:
        raise unknown("lora_plus_llama2 variant", variant, VARIANTS)
    return dataclasses.replace(lora_llama2.get_config(), name="lora_plus_llama2", method=LoRA(rank=8, alpha=16.0, lora_plus_ratio=16.0))
