"""Hugging Face architecture -> family. A family is one module: ARCHITECTURES, HF_NAMES, PLACEMENT, a config class and a model class."""

import dataclasses
from types import ModuleType
from typing import Any

from flax import linen as nn

from jaxft.errors import UserError, nearest
from jaxft.models import gpt2, llama


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: its module, and its two classes."""

    module: ModuleType
    config: Any
    model: type[nn.Module]


FAMILIES = (Family(llama, llama.LlamaConfig, llama.Llama), Family(gpt2, gpt2.GPT2Config, gpt2.GPT2))


def architectures() -> list[str]:
    """Returns every architecture that jaxft has, as config.json names it."""
    return sorted(name for family in FAMILIES for name in family.module.ARCHITECTURES)


def family_of(architecture: str) -> Family:
    """Returns the family of an architecture; raises `UserError` for one that jaxft doesn't have."""
    for family in FAMILIES:
        if architecture in family.module.ARCHITECTURES:
            return family
    known = architectures()
    raise UserError(f"jaxft has no architecture '{architecture}'.{nearest(architecture, known)} It has: {', '.join(known)}.")
