"""What a method's file in hub/ gives to save_adapter and load_adapter."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from flax import linen as nn

from jaxft.methods.base import Method

Params = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Written:
    """An adapter as PEFT has it."""

    config: Mapping[str, Any]  # of adapter_config.json, all its keys
    tensors: Mapping[str, Callable[[], np.ndarray]]  # of adapter_model.safetensors, each made when it is written


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
