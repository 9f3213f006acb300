"""What a method's file in hub/ gives to save_adapter and load_adapter."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.methods.base import Method
from jaxft.models import heads

Params = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model."  # what names of the base's tensors begin with
PREFIX = f"{BASE}model."  # the same where an adapter changes modules of the base
_TASKS: dict[str, tuple[str | None, tuple[str, ...]]] = {  # of ours: PEFT's task_type, and the modules that it saves whole for it
    heads.CAUSAL_LM: ("CAUSAL_LM", ()),
    heads.MASKED_LM: (None, ()),
    heads.SEQUENCE_CLASSIFICATION: ("SEQ_CLS", ("classifier", "score")),
    heads.TOKEN_CLASSIFICATION: ("TOKEN_CLS", ("classifier", "score")),
    heads.QUESTION_ANSWERING: ("QUESTION_ANS", ("qa_outputs",)),
}


def task_type(task: str, saved: Collection[str]) -> str | None:
    """Returns PEFT's task_type for a model's task, None where it has none, or where the adapter isn't all that it means.

    PEFT trains and saves a task's head with any adapter; one without the head is of no task.

    >>> task_type("sequence_classification", ["classifier"])
    'SEQ_CLS'

    Args:
      task: of the model.
      saved: the modules that the adapter saves whole.
    """
    found, modules = _TASKS[task]
    return found if not modules or any(module in saved for module in modules) else None


def saved_by(task_type: str | None) -> tuple[str, ...]:
    """Returns the modules that PEFT saves whole for a task_type, whether or not the model has them all."""
    return next((modules for found, modules in _TASKS.values() if found == task_type and found is not None), ())


def check_task(config: Mapping[str, Any], task: str, where: str) -> None:
    """Raises `UserError` where an adapter is of another task than the model's."""
    if config.get("task_type") not in (None, _TASKS[task][0]):
        raise UserError(
            f"{where}: task_type is {config['task_type']!r}; this model is loaded for {task}. Load the adapter's base model for its task."
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """An adapter as PEFT has it."""

    config: Mapping[str, Any]  # of adapter_config.json, all its keys
    tensors: Mapping[str, Callable[[], np.ndarray]]  # of adapter_model.safetensors, each made when it is written
    prefix: str = PREFIX  # of the base's own tensors


class Format(Protocol):
    """What writes and reads one kind of PEFT's adapters: a module, or an object where several kinds share one module."""

    METHOD: type[Method]
    PEFT_TYPE: str

    def write(self, model: nn.Module, params: Params, method: Any) -> Written:
        """Returns what the method's leaves in `params` are in PEFT's files; raises `UserError` where they aren't the method's."""

    def read(
        self, folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
    ) -> tuple[Params, Any]:
        """Returns `params` with the folder's adapter, and its method; the tensors of `saved` modules are left to others.

        Raises `UserError` for an option that jaxft doesn't have, and for weights that are missing, left over, or of another shape.
        """
