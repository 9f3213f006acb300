"""Prefix tuning of a Llama model on medical text.

    python launch.py --experiment=prefix_llama2

As lora_llama2, with 20 keys and values in every layer trained in the place of a LoRA. They start as those of the task's own words.

Hardware: as lora_llama2.
Not measured yet.
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
