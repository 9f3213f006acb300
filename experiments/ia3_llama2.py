"""(IA)^3 on a Llama model and medical text.

    python launch.py --experiment=ia3_llama2

The recipe of lora_llama2, with vectors that scale keys, values and the feed-forward layers' inner activations in training.

Hardware: two CPU cores, 2.4 GB of memory; 291 tokens/s, a step in 1.02 of lora_llama2's time (benchmarks/results/methods.md). 57,600
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 29.2%, 77.1%, 20.8% (0.579);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import IA3


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment; it has no variants."""
    if variant:
        raise unknown("ia3_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(),
        name="ia3_llama2",
        method=IA3(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
