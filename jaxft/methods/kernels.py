"""Nodes around kernels that patterns choose."""

import dataclasses
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.methods.base import Params
from jaxft.methods.partition import check_targets, first_match
from jaxft.models import segments
from jaxft.models.node import BASE, is_node, is_quantized
from jaxft.models.segments import Leaf

KERNEL, BIAS = "kernel", "bias"  # what the families call a linear layer's parameters
EMBEDDING = "embedding"  # and a table's
NO_BIAS, ALL_BIASES = "none", "all"  # which biases train beside kernels; of the targets alone, methods have names of their own
WORDS = "embed/embedding"  # the table of words, which a tied output head is too
HEAD = "lm_head/kernel"  # an output head of its own


def is_kernel(leaf: Leaf) -> bool:
    """Returns whether a leaf, or a whole node, is a linear layer's kernel."""
    return leaf.path[-1] == KERNEL


def kernel_names(params: Params) -> list[str]:
    """Returns the name of every linear layer's kernel."""
    return [name for leaf in segments.leaves(params, is_leaf=is_node) if is_kernel(leaf) for name in leaf.names]


def chosen_kernels(params: Params, targets: Sequence[str], field: str = "method.targets") -> list[str]:
    """Returns the names of the kernels that `targets` choose; raises `UserError` for no pattern, and one that matches none."""
    names = kernel_names(params)
    check_targets(targets, names, field)
    return [name for name in names if first_match(targets, name) is not None]


def trains_bias(kind: str, name: str, is_target: Callable[[str], bool]) -> bool:
    """Returns whether the leaf of this name is a bias that trains beside kernels: of `kind` none, all, or those of the targets."""
    if kind == NO_BIAS or name.rpartition("/")[2] != BIAS:
        return False
    return kind == ALL_BIASES or is_target(name.removesuffix(BIAS) + KERNEL)


def check_biases(kind: str, params: Params, is_target: Callable[[str], bool]) -> None:
    """Raises `UserError` where biases shall train and there are none."""
    names = [name for leaf in segments.leaves(params, is_leaf=is_node) for name in leaf.names]
    if kind != NO_BIAS and not any(trains_bias(kind, name, is_target) for name in names):
        raise UserError(f"method.bias is {kind}, and the model has no such bias. Leave it at {NO_BIAS}.")


def check_ranks(params: Params, rank_of: Callable[[str], int], field: str = "method.rank") -> None:
    """Raises `UserError` for a rank, by a kernel's or table's name and 0 where it is no target, that is above its smaller side."""
    for leaf in segments.leaves(params, is_leaf=is_node):
        for name in leaf.names if leaf.path[-1] in (KERNEL, EMBEDDING) else ():
            if (rank := rank_of(name)) > min(leaf.shape):
                raise UserError(
                    f"{field}: {name} is {leaf.shape[0]} x {leaf.shape[1]}; a rank of {rank} is above that of any such matrix, "
                    f"{min(leaf.shape)}. Lower it."
                )


def wrap(params: Params, kind: Callable[[str], Hashable], around: Callable[[Leaf], Any]) -> Params:
    """Returns `params` with `around(leaf)` in the place of each kernel whose `kind`, a function of its name, isn't None.

    Layers are grouped so that the kernels of a stored leaf are all of one kind.
    """
    per_layer: dict[int, list[Hashable]] = {}
    for leaf in segments.leaves(params, is_leaf=is_node):
        if leaf.layers is not None and is_kernel(leaf):
            for layer, name in zip(leaf.layers, leaf.names, strict=True):
                per_layer.setdefault(layer, []).append((leaf.path[2:], kind(name)))
    params = segments.refine(params, lambda layer: tuple(per_layer.get(layer, ())))

    def replace(leaf: Leaf) -> Any:
        return around(leaf) if is_kernel(leaf) and kind(leaf.names[0]) is not None else leaf.value

    return segments.map_leaves(replace, params, is_leaf=is_node)


def stacked(leaf: Leaf, parts: Sequence[Any]) -> jax.Array:
    """Returns an array for each layer of a stored leaf as one, with a layer axis where the leaf has one."""
    return jnp.asarray(parts[0]) if leaf.layers is None else jnp.stack(parts)


def key_of(rng: jax.Array, name: str) -> jax.Array:
    """Returns a key that depends on the kernel's name alone, not on how layers are grouped."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def mask_of_nodes(params: Params, kind: type[Any], fields: Sequence[str], targets: Sequence[str]) -> Any:
    """Returns True at those fields of the nodes of one class that stand around the target kernels."""

    def mark(leaf: Leaf) -> Any:
        return _marked(leaf.value, kind, fields if first_match(targets, leaf.names[0]) is not None else ())

    return segments.map_leaves(mark, params, is_leaf=is_node)


def _marked(value: Any, kind: type[Any], fields: Sequence[str]) -> Any:
    """A node's mask; what it wraps may be a node too."""
    if not isinstance(value, kind) and not hasattr(value, BASE):
        return jax.tree.map(lambda _: False, value)

    def mark(field: str) -> Any:
        part = getattr(value, field)
        if field == BASE:
            return _marked(part, kind, fields)
        return jax.tree.map(lambda _: isinstance(value, kind) and field in fields, part)

    return dataclasses.replace(value, **{field.name: mark(field.name) for field in dataclasses.fields(value)})


def fold(params: Params, kind: type[Any], chosen: Callable[[str], bool] = lambda name: True) -> Params:
    """Returns `params` with the nodes of one class around `chosen` kernels folded in, in float32, cast once to the base's type.

    So are nodes within them, and what all these make of the layers' biases. Raises `UserError` for a node that adds a bias to a layer that
    has none.
    """
    leaves = list(segments.leaves(params, is_leaf=is_node))
    folded = {leaf.path[:-1]: leaf.value for leaf in leaves if isinstance(leaf.value, kind) and chosen(leaf.names[0])}

    biased = {leaf.path[:-1] for leaf in leaves if leaf.path[-1] == BIAS}
    for leaf in leaves:
        if leaf.path[:-1] in folded.keys() - biased and is_kernel(leaf) and leaf.value.bias(None) is not None:
            raise UserError(
                f"What {type(leaf.value).__name__} adds to the products of {leaf.title} can't be merged: this layer of the base has "
                "no bias. Save the adapter alone: jaxft.save_adapter(folder, model, params, method)."
            )

    def plain(leaf: Leaf) -> Any:
        value, node = leaf.value, folded.get(leaf.path[:-1])
        if node is None:
            return value
        if node is value:
            return _dense(leaf)
        return node.bias(value.astype(jnp.float32)).astype(value.dtype) if leaf.path[-1] == BIAS else value

    return segments.map_leaves(plain, params, is_leaf=is_node)


def _dense(leaf: Leaf) -> jax.Array:
    """The kernel of a leaf's node as an array of the base's type."""

    def dense(value: Any) -> jax.Array:
        return value.dense().astype(value.dtype)

    if any(map(is_quantized, jax.tree.leaves(leaf.value, is_leaf=is_quantized))):
        return segments.each_layer(dense, leaf.value, leaf.layers is not None)
    return dense(leaf.value)
