"""Tuning of a Llama model's norms on medical text.

    python launch.py --experiment=norm_tuning_llama2

The recipe of lora_llama2, with nothing but the scales of SmolLM2's norms in training.

Hardware: two CPU cores, 2.4 GB of memory; 312 tokens/s, a step in 0.93 of lora_llama2's time (benchmarks/results/methods.md). 35,136
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 31.2%, 81.2%, 22.9% (0.621);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import NormTuning


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment; it has no variants."""
    if variant:
        raise unknown("norm_tuning_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(),
        name="norm_tuning_llama2",
        method=NormTuning(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
