"""QLoRA fine-tuning of the Llama models of lora_llama2, on their data: the base is held in 4 bits.

    python launch.py --experiment=qlora_llama2

The linear layers' kernels are NormalFloats of 4 bits with double quantization, 4.127 bits a weight, quantized as they are read and frozen;
a LoRA beside each of them trains (Dettmers et al. 2023, arXiv:2305.14314). Here it starts at the product nearest to what quantizing took
away (LoftQ, one turn: Li et al. 2023, arXiv:2310.08659), which leaves the base as it is. Products are computed in the compute type, float32
on CPU.

Hardware: two CPU cores, 2.4 GB of memory; 172 tokens/s, a step in 1.02 of lora_llama2's time (benchmarks/results/qlora.md). 2,442,240
parameters train.
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): 39.6%, 85.4%, 33.3% (0.501); with
--config.method.start=default 33.3%, 87.5%, 29.2% (0.548). lora_llama2 has 37.5%, 83.3%, 31.2% (0.514), the untuned model in 4 bits 0%
(4.181).

Variants: Llama 2 itself, in bfloat16, on medical flash cards. Their licence has to be accepted on the hub first. Memory is computed:
weights, LoRA with its gradient and moments, the layers' inputs (remat=full) and the work of one layer. All devices share the weights;
their number divides the rows of a micro-batch.

    python launch.py --experiment=qlora_llama2:7b
Hardware: one accelerator of 16 GB (weights 3.9 GB, 14 GB in all), or of 12 GB with --config.train.batch_size=4
--config.train.accumulation=4 (10 GB in all). Not measured here.

    python launch.py --experiment=qlora_llama2:13b
Hardware: one accelerator of 24 GB (weights 7.2 GB, 22 GB in all). Not measured here.

    python launch.py --experiment=qlora_llama2:70b
Hardware: one accelerator of 80 GB (weights 36.4 GB, 55 GB in all). Not measured here.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment
from jaxft.errors import unknown

VARIANTS = ("7b", "13b", "70b")


def get_config(variant: str = "") -> Experiment:
    """Returns lora_llama2's experiment, or its variant, with the base in double-quantized NF4; the small model's LoRA starts by LoftQ."""
    if variant and variant not in VARIANTS:
        raise unknown("qlora_llama2 variant", variant, VARIANTS)
    found = lora_llama2.get_config(variant)
    train = found.train
    if variant == "70b":  # one device holds it, with half the rows at a time
        train = dataclasses.replace(train, batch_size=4, accumulation=4, tensor_parallel=1)
    return dataclasses.replace(
        found,
        name=found.name.replace("lora_llama2", "qlora_llama2"),
        model=dataclasses.replace(found.model, quantization="nf4", double_quantization=True, block_size=64),
        method=found.method if variant else dataclasses.replace(found.method, start="loftq"),
        train=train,
    )
