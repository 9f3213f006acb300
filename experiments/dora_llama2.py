"""DoRA fine-tuning of the Llama model of lora_llama2, on its data.

    python launch.py --experiment=dora_llama2

Beside the low-rank difference, the length of each kernel's column is trained by itself (Liu et al. 2024, arXiv:2402.09353).

Hardware: two CPU cores, 2.7 GB of memory; 214 tokens/s, a step in 1.36 of lora_llama2's time (benchmarks/results/methods.md). 2,597,760
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 37.5%, 81.2%, 29.2% (0.509);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment, with DoRA."""
    if variant:
        raise unknown("dora_llama2 variant", variant, VARIANTS)
    return dataclasses.replace(lora_llama2.get_config(), name="dora_llama2", method=LoRA(rank=8, alpha=16.0, dora=True))
