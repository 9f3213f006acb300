"""LoRA fine-tuning of RoBERTa on the data of full_bert_sentiment.

    python launch.py --experiment=roberta_sentiment

roberta-base from the hub, LoRA on its queries and values as in the paper (arXiv:2106.09685, table 2); dropout is RoBERTa's own.

Hardware: two CPU cores, or one accelerator. Not measured here: its weights aren't among the bundled ones.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment, ModelConfig
from jaxft.errors import unknown
from jaxft.methods import LoRA

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment, with RoBERTa and LoRA."""
    if variant:
        raise unknown("roberta_sentiment variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name="roberta_sentiment",
        model=ModelConfig(source="FacebookAI/roberta-base"),
        method=LoRA(rank=8, alpha=16.0, targets=("attention/(query|value)",)),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=5e-4),
    )
