"""LoRA+ fine-tuning of the Llama model of lora_llama2, on its data.

    python launch.py --experiment=lora_plus_llama2

lora_b learns at sixteen times lora_a's rate, as the paper advises (Hayou et al. 2024, arXiv:2402.12354).

Hardware: two CPU cores, 2.6 GB of memory; 283 tokens/s, a step in 1.01 of lora_llama2's time (benchmarks/results/methods.md). 2,442,240
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 47.9%, 85.4%, 39.6% (0.469);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
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
