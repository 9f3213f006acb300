"""Fine-tuning methods: each one file, two pure functions."""

from jaxft.methods.base import Compose, Method
from jaxft.methods.bitfit import BitFit
from jaxft.methods.full import Full
from jaxft.methods.lora import LoRA
from jaxft.methods.norm_tuning import NormTuning
from jaxft.methods.partial import Partial

__all__ = ["BitFit", "Compose", "Full", "LoRA", "Method", "NormTuning", "Partial"]
