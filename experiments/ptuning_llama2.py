"""P-tuning of a Llama model on medical text.

    python launch.py --experiment=ptuning_llama2

As lora_llama2, with 20 virtual tokens and the encoder that makes their embeddings trained in the place of a LoRA.

Hardware: as lora_llama2.
Not measured yet.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, OptimizerConfig
from jaxft.errors import unknown
from jaxft.methods import PTuning


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment."""
    if variant:
        raise unknown("ptuning_llama2 variant", variant, ())
    return dataclasses.replace(
        lora_llama2.get_config(""),
        name="ptuning_llama2",
        method=PTuning(virtual_tokens=20, encoder="mlp"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
