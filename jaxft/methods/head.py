"""A task's own head, which no pre-trained model has: it trains with any method."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from jaxft.methods.base import Method, Params
from jaxft.methods.lora import LoRA
from jaxft.methods.partial import Partial
from jaxft.methods.partition import first_match
from jaxft.models import segments
from jaxft.models.node import is_node


def with_head(method: Method, model: nn.Module, params: Params) -> Method:
    """Returns the method with what it leaves frozen of the model's head: in LoRA's modules to save, else as a `Partial` added to it.

    Args:
      method: the method.
      model: has `head`, patterns of the task's own parameters.
      params: shapes with the method's leaves.
    """
    mask: Any = method.mask(params)
    head = [leaf for leaf in segments.leaves(mask, is_leaf=is_node) if first_match(model.head, leaf.names[0]) is not None]
    frozen = tuple(leaf.names[0] for leaf in head if not any(jax.tree.leaves(leaf.value)))
    if not frozen:
        return method
    targets = model.head if len(frozen) == len(head) else frozen
    if isinstance(method, LoRA):
        return dataclasses.replace(method, modules_to_save=(*method.modules_to_save, *targets))
    return method + Partial(targets=targets)
