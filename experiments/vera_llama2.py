"""VeRA on a Llama model and medical text.

    python launch.py --experiment=vera_llama2

The recipe of lora_llama2, with two random matrices for all of SmolLM2's layers, and small vectors between them in training.

Hardware: two CPU cores, 2.6 GB of memory; 269 tokens/s, a step in 1.08 of lora_llama2's time (benchmarks/results/methods.md). 168,960
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 29.2%, 79.2%, 22.9% (0.563);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230). The rate was chosen by the loss on validation: 0.882 at 1e-2,
0.589 at 3e-2.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import VeRA


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment; it has no variants."""
    if variant:
        raise unknown("vera_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(),
        name="vera_llama2",
        method=VeRA(rank=64),  # a ninth of the width of SmolLM2: at 256, a step would compute 1.9 times what LoRA's does
        optimizer=OptimizerConfig(learning_rate=3e-2),
    )
