"""Full fine-tuning of a Llama model on medical text.

    python launch.py --experiment=full_llama2

The recipe of lora_llama2, with every one of SmolLM2's 135 million parameters in training, each layer at nine tenths of the rate of the
one above it. What is exported is the whole model.

Hardware: two CPU cores, 5.3 GB of memory; 208 tokens/s, a step in 1.41 of lora_llama2's time (benchmarks/results/methods.md). 134,515,008
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 43.8%, 79.2%, 35.4% (0.477);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import Full


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment; it has no variants."""
    if variant:
        raise unknown("full_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(),
        name="full_llama2",
        method=Full(layer_decay=0.9),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
