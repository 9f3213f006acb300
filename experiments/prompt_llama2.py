"""Prompt tuning of a Llama model on medical text.

    python launch.py --experiment=prompt_llama2

As lora_llama2, with the embeddings of 20 virtual tokens trained in the place of a LoRA. They start as those of the task's own words.

Hardware: two CPU cores, 2.5 GB of memory; 306 tokens/s, a step in 0.96 of lora_llama2's time (benchmarks/results/methods.md). 11,520
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 31.2%, 79.2%, 25.0% (0.891);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230). The rate was chosen by the loss on validation: 0.956 at 1e-2,
0.867 at 3e-2.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import Prompt

_START = "Name the condition that the patient takes the drug for, and whether the experience was positive, neutral or negative."


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment."""
    if variant:
        raise unknown("prompt_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(""),
        name="prompt_llama2",
        method=Prompt(virtual_tokens=20, start="text", text=_START),
        optimizer=OptimizerConfig(learning_rate=3e-2),
    )
