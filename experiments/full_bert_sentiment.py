"""Full fine-tuning of a BERT that reads drug reviews: was the experience positive, neutral or negative?

    python launch.py --experiment=full_bert_sentiment

MiniLM-L6, a BERT of six layers, with a new head; 540 reviews are trained on, 379 are the test. Runs anywhere, with nothing downloaded.

Hardware: two CPU cores, 2.7 GB of memory; 15 minutes on one of them. 22,714,371 parameters train.
On the test, mean and deviation of seeds 0, 1, 2: 72.6% (1.0) accuracy, 47.6% (1.1) macro F1, a loss of 0.712 (0.003); the majority class
has 65.4%, 26.4% and 0.849, a logistic regression on TF-IDF 70.8% (0.2), 38.8% (0.3) and 0.719 (0.003).
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
        train=TrainConfig(epochs=5.0, batch_size=4, eval_every=30),  # 4 packed rows hold about 9 reviews
        optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01),
        eval=EvalConfig(),
    )
