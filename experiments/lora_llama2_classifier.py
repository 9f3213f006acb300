"""LoRA fine-tuning of a Llama model with a classifier's head, on the data of full_bert_sentiment.

    python launch.py --experiment=lora_llama2_classifier

SmolLM2-135M-Instruct; the head reads the last token of a review. The variant is Llama 2 itself, whose licence has to be accepted on the
hub first.

Hardware: two CPU cores, 2.8 GB of memory.
Its result on the test reviews isn't measured yet.

    python launch.py --experiment=lora_llama2_classifier:7b
Hardware: one accelerator of 32 GB. Not measured here.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment, ModelConfig, TrainConfig
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ("7b",)


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment with SmolLM2, or Llama 2, and LoRA."""
    if variant and variant not in VARIANTS:
        raise unknown("lora_llama2_classifier variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    small = ModelConfig(source="bundled:smollm2-135m-instruct")
    return dataclasses.replace(
        found,
        name=f"lora_llama2_classifier{variant and ':'}{variant}",
        model=ModelConfig(source="meta-llama/Llama-2-7b-hf", dtype="bfloat16") if variant else small,
        method=LoRA(rank=8, alpha=16.0),
        train=TrainConfig(epochs=2.0, batch_size=4, eval_every=30, remat="full" if variant else "dots"),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=2e-4 if variant else 1e-3, weight_decay=0.0),
    )
