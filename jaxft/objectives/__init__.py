"""Objectives: what a step learns by beside the task's own loss, each one file."""

from jaxft.objectives.base import Objective
from jaxft.objectives.dynamic_mask import DynamicMask

__all__ = ["DynamicMask", "Objective"]
