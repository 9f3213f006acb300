"""PiSSA fine-tuning of the Llama model of lora_llama2, on its data.

    python launch.py --experiment=pissa_llama2

The low-rank difference starts as each kernel's largest singular values, taken out of the base (Meng et al. 2024, arXiv:2404.02948).

Hardware: two CPU cores, 2.8 GB of memory; 295 tokens/s, a step in 0.97 of lora_llama2's time (benchmarks/results/methods.md). 2,442,240
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 43.8%, 83.3%, 37.5% (0.462);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment, with PiSSA, by the fast randomized SVD."""
    if variant:
        raise unknown("pissa_llama2 variant", variant, VARIANTS)
    return dataclasses.replace(lora_llama2.get_config(), name="pissa_llama2", method=LoRA(rank=8, alpha=8.0, start="pissa_niter_4"))
