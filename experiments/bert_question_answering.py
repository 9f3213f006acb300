"""Full fine-tuning of a BERT that finds in a drug review the drug or the condition that a question asks for, or that it isn't there.

    python launch.py --experiment=bert_question_answering

MiniLM-L6, a BERT of six layers, with a new head; 465 questions are trained on, 52 are the validation set, 334 the test; a third of them
have no answer. Runs anywhere, with nothing downloaded.

Hardware: two CPU cores, 2.4 GB of memory. 22,566,146 parameters train.
Its result over several seeds isn't measured yet. One run (seed 0, the best of its evaluations on validation was that after two epochs) had
77.5% exact match and 78.6% F1 on the test: 72.4% and 74.0% of the 221 questions with an answer, 87.6% of the 113 without one. The
majority answer, none, has 33.8%; the untuned model 0.6% and 2.0%.
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
