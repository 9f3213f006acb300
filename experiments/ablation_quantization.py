"""How many bits? LoRA of lora_llama2 on a base held in six ways, each over three learning rates and three seeds.

    python launch.py --experiment=ablation_quantization --mode=sweep

SmolLM2-135M-Instruct on the bundled reviews, 20 steps a run, 54 runs: float32, int8, NF4 with and without double quantization, FP4, and NF4
in blocks of 256.

Hardware: two CPU cores, 2.8 GB of memory; hours. A sweep that is stopped goes on where it was.
Its result isn't measured yet.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.sweep import Sweep, grid, product, seeds

VARIANTS = ()

_FORMATS = (
    {"model.quantization": "none"},
    {"model.quantization": "int8"},
    {"model.quantization": "nf4"},
    {"model.quantization": "nf4", "model.double_quantization": False},
    {"model.quantization": "fp4"},
    {"model.quantization": "nf4", "model.block_size": 256},
)


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment with fewer steps, measured by its loss alone."""
    if variant:
        raise unknown("ablation_quantization variant", variant, VARIANTS)
    found = lora_llama2.get_config()
    return dataclasses.replace(
        found,
        name="ablation_quantization",
        train=dataclasses.replace(found.train, steps=20, eval_every=10),
        eval=dataclasses.replace(found.eval, generate=False, gap=False, general="bundled:general-text"),
    )


def sweep(variant: str = "") -> Sweep:
    """Returns every format at every rate, with three seeds."""
    runs = product(_FORMATS, grid({"optimizer.learning_rate": (3e-4, 1e-3, 3e-3)}), seeds(3))
    return Sweep(runs, vary=("model.quantization", "model.double_quantization", "model.block_size"))
