"""Tasks: each one file, its loss and its metrics."""

from jaxft.tasks.sft import SFT

__all__ = ["SFT"]
