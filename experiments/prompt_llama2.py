"""Prompt tuning of a Llama model on medical text.

    python launch.py --experiment=prompt_llama2

As lora_llama2, with the embeddings of 20 virtual tokens trained in the place of a LoRA. They start as those of the task's own words.

Hardware: as lora_llama2.
Not measured yet.
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
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
