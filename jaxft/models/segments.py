"""Layers in storage: neighbours of one structure are stacked, and each stack is one scan.

`params["layers"]` maps "first-last" to a subtree whose leaves have a leading layer axis: {"0-15": ..., "16-31": ...}. That is storage
only: names, patterns, listings and exports speak of `layers/17/attention/q_proj/kernel`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.node import BASE, is_shared

Params = dict[str, Any]
LAYERS = "layers"


def key(layers: range) -> str:
    """Returns the storage key of consecutive layers.

    >>> key(range(4, 8))
    '4-7'
    """
    return f"{layers[0]}-{layers[-1]}"


def span(name: str) -> range:
    """Returns the layers of a storage key.

    >>> span("4-7")
    range(4, 8)
    """
    first, last = name.split("-")
    return range(int(first), int(last) + 1)


def spans(params: Mapping[str, Any]) -> list[range]:
    """Returns the segments of `params`, bottom first."""
    return sorted((span(name) for name in params.get(LAYERS, {})), key=lambda layers: layers[0])


def regroup(params: Params, signature: Callable[[int], Hashable]) -> Params:
    """Splits and joins segments so that neighbouring layers of one structure share one exactly where `signature(layer)` is equal.

    Segments that stay as they are keep their arrays; only what is cut or joined is copied.
    """
    structures: dict[int, Hashable] = {}
    for segment in spans(params):
        stack = params[LAYERS][key(segment)]
        form = (jax.tree.structure(stack), tuple(map(_form, jax.tree.leaves(stack, is_leaf=is_shared))))
        structures |= dict.fromkeys(segment, form)
    groups = [list(group) for _, group in groupby(sorted(structures), key=lambda layer: (structures[layer], signature(layer)))]
    ranges = [range(group[0], group[-1] + 1) for group in groups]
    return params | {LAYERS: {key(layers): layer_slice(params, layers) for layers in ranges}}


def _form(leaf: Any) -> Hashable:
    """What a leaf must have in common with another layer's to be stacked with it."""
    return id(leaf.value) if is_shared(leaf) else (leaf.shape[1:], leaf.dtype)


def refine(params: Params, signature: Callable[[int], Hashable]) -> Params:
    """Splits segments as `regroup` does, and joins none: a method leaves the cuts that another one made."""
    cut = {layer: number for number, segment in enumerate(spans(params)) for layer in segment}
    return regroup(params, lambda layer: (cut[layer], signature(layer)))


def layer_slice(params: Params, layers: range) -> Any:
    """Returns the stacked subtree of consecutive layers, which may lie in several segments of one structure."""
    parts = []
    for segment in spans(params):
        first, last = max(layers[0], segment[0]), min(layers[-1], segment[-1])
        if first > last:
            continue
        stack = params[LAYERS][key(segment)]
        whole = first == segment[0] and last == segment[-1]
        parts.append(stack if whole else _each(lambda leaf, a=first - segment[0], b=last + 1 - segment[0]: leaf[a:b], stack))
    return parts[0] if len(parts) == 1 else _each(lambda *leaves: jnp.concatenate(leaves), *parts)


def one_layer(params: Params, layer: int) -> Any:
    """Returns the subtree of one layer, without the layer axis."""
    return _each(lambda leaf: leaf[0], layer_slice(params, range(layer, layer + 1)))


def _each(function: Callable[..., Any], *stacks: Any) -> Any:
    """Maps over the leaves that have a layer axis; what layers have in common stays as it is in the first."""
    return jax.tree.map(lambda *leaves: leaves[0] if is_shared(leaves[0]) else function(*leaves), *stacks, is_leaf=is_shared)


def own(stack: Any) -> Any:
    """Returns a segment's subtree with what a scan goes over, and None for what its layers have in common."""
    return jax.tree.map(lambda leaf: None if is_shared(leaf) else leaf, stack, is_leaf=is_shared)


def with_shared(layer: Any, stack: Any) -> Any:
    """Returns one layer's subtree of `own`, completed by what the layers of `stack` have in common."""
    return jax.tree.map(lambda leaf, part: leaf if is_shared(leaf) else part, stack, layer, is_leaf=is_shared)


def each_layer(function: Callable[[Any], Any], node: Any, stacked: bool) -> Any:
    """Returns `function` of a kernel's node, of one layer after the other where it is stacked: no two layers' dense kernels at once."""
    if not stacked:
        return function(node)
    return jax.lax.map(lambda layer: function(with_shared(layer, node)), own(node))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A stored leaf and what users call it."""

    path: tuple[str, ...]  # in storage: ("layers", "0-29", "attention", "q_proj", "kernel", "base")
    layers: range | None  # the layers it stacks, None outside of the layers
    value: Any

    @property
    def names(self) -> list[str]:
        """The name of each layer's part, bottom first; one name outside of the layers."""
        tail = [part for part in self.path if part != BASE]
        if self.layers is None:
            return ["/".join(tail)]
        return ["/".join([LAYERS, str(layer), *tail[2:]]) for layer in self.layers]

    @property
    def title(self) -> str:
        """One name for all its layers: `layers/0-29/attention/q_proj/kernel`."""
        return "/".join(part for part in self.path if part != BASE)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's part."""
        return tuple(self.value.shape[1:] if self.layers is not None else self.value.shape)

    def part(self, index: int) -> Any:
        """Returns the value of the layer that `names` has at `index`, without the layer axis; outside of the layers, the value."""
        if self.layers is None:
            return self.value
        return with_shared(jax.tree.map(lambda stack: stack[index], own(self.value)), self.value)


def path_of(keys: Any) -> tuple[str, ...]:
    """Returns a jax key path as plain strings."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None)))) for entry in keys)


def leaf_of(path: tuple[str, ...], value: Any) -> Leaf:
    """Returns the `Leaf` of a storage path."""
    stacked = path[0] == LAYERS and len(path) > 1
    return Leaf(path, span(path[1]) if stacked else None, value)


def leaves(params: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[Leaf]:
    """Yields every leaf of `params` in storage order; with `is_leaf`, whole nodes too."""
    for keys, value in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]:
        yield leaf_of(path_of(keys), value)


def map_leaves(function: Callable[[Leaf], Any], params: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Returns `params` with `function(leaf)` in each leaf's place."""
    return jax.tree_util.tree_map_with_path(lambda keys, value: function(leaf_of(path_of(keys), value)), params, is_leaf=is_leaf)
