"""LoRA fine-tuning with the rank-stabilized scale of the Llama model of lora_llama2, on its data.

    python launch.py --experiment=rslora_llama2

The difference is scaled by alpha / sqrt(rank), so that larger ranks learn as fast (Kalajdzievski 2023, arXiv:2312.03732).

Hardware: two CPU cores, 2.7 GB of memory; 253 tokens/s, a step in 1.08 of lora_llama2's time (benchmarks/results/methods.md). 9,768,960
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 47.9%, 81.2%, 37.5% (0.447);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment, with rsLoRA of rank 32."""
    if variant:
        raise unknown("rslora_llama2 variant", variant, VARIANTS)
    return dataclasses.replace(lora_llama2.get_config(), name="rslora_llama2", method=LoRA(rank=32, alpha=16.0, rslora=True))
