"""Tasks: each one file, its examples, its loss and its metrics."""

from jaxft.tasks.sequence_classification import SequenceClassification
from jaxft.tasks.sft import SFT

__all__ = ["SFT", "SequenceClassification"]
