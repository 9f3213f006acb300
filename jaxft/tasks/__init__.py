"""Tasks: each one file, its examples, its loss and its metrics."""

from jaxft.tasks.masked_lm import MaskedLM
from jaxft.tasks.multiple_choice import MultipleChoice
from jaxft.tasks.question_answering import QuestionAnswering
from jaxft.tasks.sequence_classification import SequenceClassification
from jaxft.tasks.sft import SFT
from jaxft.tasks.token_classification import TokenClassification

__all__ = ["SFT", "MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification"]
