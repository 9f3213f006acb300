"""Hugging Face architecture -> family.

A family is one module and two classes. The module has ARCHITECTURES, HF_NAMES, PLACEMENT, HF_IGNORED, ALSO_NAMED and OTHER_HEADS; the
classes are its configuration and its model.
"""

import dataclasses
from types import ModuleType
from typing import Any

from flax import linen as nn

from jaxft.errors import UserError, nearest, unknown
from jaxft.models import bert, distilbert, electra, encoder, gpt2, llama, roberta
from jaxft.models.heads import TASKS, Architecture


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: its module, and its two classes."""

    module: ModuleType
    config: Any
    model: type[nn.Module]


FAMILIES = (
    Family(llama, llama.LlamaConfig, llama.Llama),
    Family(gpt2, gpt2.GPT2Config, gpt2.GPT2),
    Family(bert, bert.BertConfig, encoder.Encoder),
    Family(roberta, roberta.RobertaConfig, encoder.Encoder),
    Family(distilbert, distilbert.DistilBertConfig, encoder.Encoder),
    Family(electra, electra.ElectraConfig, encoder.Encoder),
)


def architectures() -> list[str]:
    """Returns every architecture that jaxft has with a head, as config.json names it."""
    return sorted(name for family in FAMILIES for name, found in family.module.ARCHITECTURES.items() if found.task)


def known_classes(model_type: Any) -> list[str]:
    """Returns the architectures of one of transformers' model types, those without a head too; all with a head where it isn't known."""
    every = [item for family in FAMILIES for item in family.module.ARCHITECTURES.items()]
    return [name for name, found in every if found.model_type == model_type] or architectures()


def family_of(architecture: str) -> Family:
    """Returns the family of an architecture; raises `UserError` for one that jaxft doesn't have."""
    for family in FAMILIES:
        if architecture in family.module.ARCHITECTURES:
            return family
    known = architectures()
    raise UserError(f"jaxft has no architecture '{architecture}'.{nearest(architecture, known)} It has: {', '.join(known)}.")


def described(architecture: str) -> Architecture:
    """Returns what is known of an architecture by its name; raises `UserError` for one that jaxft doesn't have."""
    found: Architecture = family_of(architecture).module.ARCHITECTURES[architecture]
    return found


def tasks_of(model_type: str) -> dict[str, str]:
    """Returns the architecture of each task that a family of transformers has.

    >>> tasks_of("mistral")["sequence_classification"]
    'MistralForSequenceClassification'
    """
    every = [item for family in FAMILIES for item in family.module.ARCHITECTURES.items() if item[1].model_type == model_type]
    first = {found.task: name for name, found in reversed(every)}  # a family's own class of a task comes before others that have its head
    return {task: first[task] for task in TASKS if task in first}


def architecture_for(model_type: str, task: str) -> str:
    """Returns a family's architecture of a task; raises `UserError` for one that the family doesn't have."""
    found = tasks_of(model_type)
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if task not in found:
        raise UserError(f"A {model_type} model has no head for {task}. Its tasks: {', '.join(found)}.")
    return found[task]
