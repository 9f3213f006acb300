"""P-tuning of a Llama model on medical text.

    python launch.py --experiment=ptuning_llama2

As lora_llama2, with 20 virtual tokens and the encoder that makes their embeddings trained in the place of a LoRA.

Hardware: two CPU cores, 2.5 GB of memory; 299 tokens/s, a step in 0.97 of lora_llama2's time (benchmarks/results/methods.md). 1,008,576
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 6.2%, 75.0%, 4.2% (1.092); lora_llama2
has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230). The rate was chosen by the loss on validation: 1.078 at 1e-3, 1.198 at 3e-3.
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
