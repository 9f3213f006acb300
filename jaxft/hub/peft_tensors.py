"""Which tensor of an adapter's file is which array of ours: written, checked and filled in alike for all of PEFT's LoRAs."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.hub import peft_leaves
from jaxft.hub.names import Entry
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params
from jaxft.methods.kernels import NO_BIAS, trains_bias
from jaxft.models import segments
from jaxft.models.node import innermost, is_node

_ITSELF = "itself"  # in the place of a node's field


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of an adapter's file, and its place."""

    key: str  # theirs: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    entry: Entry  # the kernel, or what is trained whole
    field: str | None  # of the kernel's node; None is the entry's leaf itself
    shape: tuple[int, ...]  # theirs
    turn: Callable[[np.ndarray], np.ndarray]  # ours to theirs
    back: Callable[[np.ndarray], np.ndarray]  # theirs to ours

    @property
    def stored(self) -> Any:
        """The array that holds ours, of all layers where they are stacked."""
        value = self.entry.leaf.value
        return innermost(value) if self.field is None else getattr(value, self.field)

    def read(self) -> np.ndarray:
        """Returns ours as theirs, float32."""
        value = self.stored if self.entry.index is None else self.stored[self.entry.index]
        return self.turn(np.asarray(jax.device_get(value), np.float32))


def matrix(key: str, entry: Entry, field: str) -> Slot:
    """Returns the slot of a node's matrix, which they hold transposed; a vector is the same on both sides."""
    shape = getattr(entry.leaf.value, field).shape[0 if entry.index is None else 1 :]
    return Slot(key, entry, field, shape[::-1], np.transpose, np.transpose)


def whole(key: str, entry: Entry) -> Slot:
    """Returns the slot of a parameter that is trained whole."""
    return Slot(key, entry, None, entry.shape, entry.swap, entry.swap)


def biases(every: Iterable[Entry], trains: Callable[[str], bool], modules: Collection[str]) -> list[Slot]:
    """Returns the slots of the biases that train beside an adapter, by our names; `modules` are those with an adapter."""
    found = [entry for entry in every if trains(entry.path)]
    return [whole(f"{PREFIX}{module_of(entry)}{'.base_layer' if module_of(entry) in modules else ''}.bias", entry) for entry in found]


def with_present_biases(method: Any, every: Iterable[Entry]) -> Any:
    """Returns a method of a file; its `bias` is none where the model has no such bias, which peft asks for without a word."""
    found = any(trains_bias(method.bias, entry.path, method.is_target) for entry in every)
    return method if found else dataclasses.replace(method, bias=NO_BIAS)


def module_of(entry: Entry) -> str:
    """Returns the name of their module that holds a weight or a bias."""
    return entry.name.rpartition(".")[0]


def check(folder: pathlib.Path, slots: Sequence[Slot], model: nn.Module, params: Params, saved: Collection[str] = ()) -> None:
    """Raises `UserError` for tensors of a folder's weights that are missing, left over, or of another shape.

    peft writes weights of the base beside the adapter: they must be those of `params`.
    """
    shapes = {slot.key: slot.shape for slot in slots}
    peft_leaves.check(folder / WEIGHTS, shapes, peft_leaves.held(folder, model, params, saved, shapes))


def fill(path: pathlib.Path, params: Params, slots: Sequence[Slot]) -> Params:
    """Returns `params` with every slot from the file, float32."""
    hosts: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for slot in slots:
            fields = hosts.setdefault(slot.entry.leaf.path, {})
            name = slot.field or _ITSELF
            if name not in fields:
                fields[name] = np.array(jax.device_get(slot.stored), np.float32)
            fields[name][... if slot.entry.index is None else slot.entry.index] = slot.back(file.get_tensor(slot.key))

    def filled(leaf: segments.Leaf) -> Any:
        fields = {name: jnp.asarray(host) for name, host in hosts.get(leaf.path, {}).items()}
        if _ITSELF in fields:
            return fields[_ITSELF]
        return dataclasses.replace(leaf.value, **fields) if fields else leaf.value

    return segments.map_leaves(filled, params, is_leaf=is_node)
