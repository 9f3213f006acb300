"""Bottleneck adapters on a Llama model: Houlsby's, Pfeiffer's, parallel.

    python launch.py --experiment=bottleneck_llama2

As lora_llama2, with Houlsby's adapter after attention and after the MLP in the place of LoRA; the adapter is exported for AdapterHub.

Hardware: two CPU cores, 2.6 GB of memory; 309 tokens/s, a step in 0.94 of lora_llama2's time (benchmarks/results/methods.md). 2,525,040
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 41.7%, 83.3%, 33.3% (0.512);
lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model 0% (4.230).

Variants: the adapters that later papers take.

    python launch.py --experiment=bottleneck_llama2:houlsby
The same as without a variant. Not measured yet.

    python launch.py --experiment=bottleneck_llama2:pfeiffer
After the MLP alone, half as many parameters. Not measured yet.

    python launch.py --experiment=bottleneck_llama2:parallel
Beside the MLP, scaled, half the model's width. Not measured yet.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import Bottleneck

VARIANTS = ("houlsby", "pfeiffer", "parallel")


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment: lora_llama2 with a bottleneck adapter."""
    methods = {"": Bottleneck(), "houlsby": Bottleneck(), "pfeiffer": Bottleneck.seq_bn(), "parallel": Bottleneck.par_bn()}
    if variant not in methods:
        raise unknown("bottleneck_llama2 variant", variant, VARIANTS)
    name = f"bottleneck_llama2:{variant}" if variant else "bottleneck_llama2"
    return dataclasses.replace(lora_llama2.get_config(""), name=name, method=methods[variant])
