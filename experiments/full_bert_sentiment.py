"""Full fine-tuning of a BERT that reads drug reviews: was the experience positive, neutral or negative?

python launch.py --experiment=full_bert_sentiment
"""

from jaxft.config import DataConfig, EvalConfig, Experiment, ModelConfig, OptimizerConfig, TrainConfig
from jaxft.errors import unknown
from jaxft.methods import Full
from jaxft.tasks import SequenceClassification

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment: MiniLM on the bundled reviews."""
    if variant:
        raise unknown("full_bert_sentiment variant", variant, VARIANTS)
    return Experiment(
        name="full_bert_sentiment",
        model=ModelConfig(source="bundled:minilm-l6"),
        data=DataConfig(
            train="bundled:drug-reviews:train",
            test="bundled:drug-reviews:test",
            split=(0.9, 0.1, 0.0),
            label="rating",
            max_length=256,
        ),
        method=Full(),
        task=SequenceClassification(),
        train=TrainConfig(epochs=5.0, batch_size=4, eval_every=30),
        optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01),
        eval=EvalConfig(),
    )
