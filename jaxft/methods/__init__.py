"""Fine-tuning methods: each one file, two pure functions."""

from jaxft.methods.adalora import AdaLoRA
from jaxft.methods.base import Compose, Method
from jaxft.methods.bitfit import BitFit
from jaxft.methods.bottleneck import Bottleneck
from jaxft.methods.full import Full
from jaxft.methods.ia3 import IA3
from jaxft.methods.lora import LoRA
from jaxft.methods.norm_tuning import NormTuning
from jaxft.methods.p_tuning import PTuning
from jaxft.methods.partial import Partial
from jaxft.methods.prefix import Prefix
from jaxft.methods.prompt import Prompt
from jaxft.methods.sparse_mask import SparseMask
from jaxft.methods.vera import VeRA

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "Compose",
    "Full",
    "LoRA",
    "Method",
    "NormTuning",
    "PTuning",
    "Partial",
    "Prefix",
    "Prompt",
    "SparseMask",
    "VeRA",
]
