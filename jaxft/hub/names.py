"""A family's table of names as functions: which tensor of a Hugging Face file is which part of which leaf."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import linen as nn

from jaxft.models import segments
from jaxft.models.node import BASE, find, is_node, is_site
from jaxft.models.registry import described, family_of
from jaxft.models.segments import Leaf

_SHOWN = 6  # names in a message
WEIGHT = ".weight"  # what a module's name lacks of its weight's name

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"": lambda array: array, "transpose": np.transpose}  # their own inverses


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a Hugging Face file, and its place."""

    name: str  # theirs: model.layers.3.self_attn.q_proj.weight
    path: str  # ours: layers/3/attention/q_proj/kernel
    leaf: Leaf
    index: int | None  # along the leaf's layer axis; None outside of the layers
    transform: str  # theirs to ours and back

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in their file."""
        return self.leaf.shape[::-1] if self.transform == "transpose" else self.leaf.shape

    @property
    def module(self) -> str:
        """The name of their module that holds the tensor: model.layers.3.self_attn.q_proj."""
        return self.name.removesuffix(WEIGHT)

    def swap(self, array: np.ndarray) -> np.ndarray:
        """Returns the tensor as ours where it is theirs, and as theirs where it is ours; a view."""
        return TRANSFORMS[self.transform](array)


def tensors_of(model: nn.Module, params: Any) -> list[Entry]:
    """Returns an entry for each tensor that `params` are in Hugging Face's files, in storage order; a kernel's node is one tensor.

    Nodes at sites are a method's own, and have no place there.

    Args:
      model: whose architecture names them.
      params: arrays, or anything with shapes in their place (`jax.eval_shape`).
    """
    table = {ours: (theirs, transform) for theirs, ours, transform in family_of(model.config.architecture).module.HF_NAMES}
    base = described(model.config.architecture).base
    found = []
    for leaf in segments.leaves(params, is_leaf=is_node):
        if is_site(leaf.value):
            continue
        for index, path in enumerate(leaf.names):
            layer = None if leaf.layers is None else leaf.layers[index]
            theirs, transform = table[_general(path, layer)]
            found.append(Entry(with_base(theirs, base, layer), path, leaf, None if layer is None else index, transform))
    return found


def with_base(name: str, base: str, layer: int | None = None) -> str:
    """Returns a name of a family's table as a file has it, where the base's own name in it is `base`, "" for none.

    >>> with_base("{base}.encoder.layer.{layer}.output.dense.bias", "", 3)
    'encoder.layer.3.output.dense.bias'
    """
    return name.format(base=base, layer=layer).removeprefix(".")


def linear_layers(model: nn.Module, params: Any) -> list[Entry]:
    """Returns the entries of the model's linear layers."""
    return [entry for entry in tensors_of(model, params) if entry.path.endswith("/kernel")]


def is_conv1d(found: Iterable[Entry]) -> bool:
    """Returns whether their files hold any of these kernels (in, out), as GPT-2's Conv1D does; linear layers have (out, in)."""
    return any(entry.path.endswith("/kernel") and not entry.transform for entry in found)


def nodes_of(found: Iterable[Entry], kind: type[Any], chosen: Callable[[str], bool]) -> list[Entry]:
    """Returns the entries of `chosen` names that have a node of a class, other methods' nodes around it or not.

    The leaf of each is that node.
    """
    inner = []
    for entry in found:
        value, path = entry.leaf.value, entry.leaf.path
        if not chosen(entry.path) or find(value, kind) is None:
            continue
        while not isinstance(value, kind):
            value, path = value.base, (*path, BASE)
        inner.append(dataclasses.replace(entry, leaf=dataclasses.replace(entry.leaf, path=path, value=value)))
    return inner


def _general(path: str, layer: int | None) -> str:
    """layers/17/mlp/... -> layers/{layer}/mlp/..."""
    return path if layer is None else path.replace(f"{segments.LAYERS}/{layer}/", f"{segments.LAYERS}/{{layer}}/", 1)


def listed(names: Iterable[str]) -> str:
    """Returns names for a message, the first few.

    >>> listed(["a", "b"])
    'a, b'
    """
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
