"""Objectives: what a step learns by beside the task's own loss, each one file."""

from jaxft.objectives.base import Objective

__all__ = ["Objective"]
