"""Fine-tuning methods: each one file, two pure functions."""

from jaxft.methods.base import Method
from jaxft.methods.lora import LoRA

__all__ = ["LoRA", "Method"]
