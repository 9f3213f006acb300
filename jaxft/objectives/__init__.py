"""Objectives: what a step learns by beside the task's own loss, each one file."""

from jaxft.objectives.base import Objective
from jaxft.objectives.dynamic_mask import DynamicMask
from jaxft.objectives.fixmatch import FixMatch
from jaxft.objectives.flexmatch import FlexMatch
from jaxft.objectives.freelb import FreeLB
from jaxft.objectives.mean_teacher import MeanTeacher
from jaxft.objectives.pseudo_answers import PseudoAnswers
from jaxft.objectives.self_supervised import SelfSupervised
from jaxft.objectives.self_training import SelfTraining
from jaxft.objectives.smart import SMART
from jaxft.objectives.uda import UDA
from jaxft.objectives.vat import VAT

__all__ = [
    "SMART",
    "UDA",
    "VAT",
    "DynamicMask",
    "FixMatch",
    "FlexMatch",
    "FreeLB",
    "MeanTeacher",
    "Objective",
    "PseudoAnswers",
    "SelfSupervised",
    "SelfTraining",
]
