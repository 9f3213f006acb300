"""Prefix tuning of a Llama model on medical text.

    python launch.py --experiment=prefix_llama2

As lora_llama2, with 20 keys and values in every layer trained in the place of a LoRA. They start as those of the task's own words.

Hardware: two CPU cores, 2.4 GB of memory; 279 tokens/s, a step in 1.01 of lora_llama2's time (benchmarks/results/methods.md). 230,400
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 31.2%, 75.0%, 25.0% (0.727);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import Prefix

_START = "Name the condition that the patient takes the drug for, and whether the experience was positive, neutral or negative."


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment."""
    if variant:
        raise unknown("prefix_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(""),
        name="prefix_llama2",
        method=Prefix(virtual_tokens=20, start="text", text=_START),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
