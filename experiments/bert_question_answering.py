"""Full fine-tuning of a BERT that finds in a drug review the drug or the condition that a question asks for, or that it isn't there.

    python launch.py --experiment=bert_question_answering

MiniLM-L6, a BERT of six layers, with a new head; 465 questions are trained on, 52 are the validation set, 334 the test; a third of them
have no answer. Runs anywhere, with nothing downloaded.

Hardware: two CPU cores, 2.4 GB of memory; 8 minutes on one of them. 22,566,146 parameters train.
On the test, mean and deviation of seeds 0, 1, 2: 79.6% (0.8) exact match and 81.7% (0.5) F1; 78.3% (2.5) exact match of the 221 questions
with an answer, 82.3% (6.7) of the 113 without one; on another kind of processor seed 0 had 77.5% in the place of 78.7%. The majority
answer, none, has 33.8%; the untuned model 0.6% and 2.0%.
"""

from jaxft.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, TrainConfig
from jaxft.errors import unknown
from jaxft.methods import Full
from jaxft.tasks import QuestionAnswering

VARIANTS = ()


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment: MiniLM on questions about the bundled reviews."""
    if variant:
        raise unknown("bert_question_answering variant", variant, VARIANTS)
    return Experiment(
        name="bert_question_answering",
        model=ModelConfig(source="bundled:minilm-l6"),
        data=DataConfig(
            train="bundled:drug-questions:train",
            validation="bundled:drug-questions:validation",
            test="bundled:drug-questions:test",
            max_length=256,
        ),
        method=Full(),
        task=QuestionAnswering(stride=64),
        train=TrainConfig(epochs=3.0, batch_size=4, eval_every=60, best_metric="f1", best_mode="max"),
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.01),
    )
