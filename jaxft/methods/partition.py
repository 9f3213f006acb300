"""Masks, patterns, partition and combine: the only thing that the trainer knows of a method.

A pattern is a regular expression that matches whole components of a leaf's name, `layers/17/attention/q_proj/kernel`: `q_proj`,
`attention/(q|v)_proj`, `layers/[0-3]/mlp`, `lm_head/kernel`. Names never mention how layers are stacked.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.models.node import Around, is_node, is_quantized
from jaxft.models.segments import Leaf, leaves, map_leaves, refine

Params = Any


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(f"(?:^|/)(?:{pattern})(?:/|$)")
    except re.error as error:
        raise UserError(
            f"'{pattern}' is not a pattern: {error}. A pattern is a regular expression over names like layers/0/mlp."
        ) from error


def matches(pattern: str, name: str) -> bool:
    """Returns whether `pattern` matches whole components of `name`.

    >>> matches("q_proj", "layers/0/attention/q_proj/kernel"), matches("q", "layers/0/attention/q_proj/kernel")
    (True, False)
    """
    return _compiled(pattern).search(name) is not None


def first_match(patterns: Iterable[str], name: str) -> int | None:
    """Returns the number of the first pattern that matches `name`, or None."""
    return next((number for number, pattern in enumerate(patterns) if matches(pattern, name)), None)


def check_targets(patterns: Sequence[str], names: Sequence[str], field: str = "method.targets") -> None:
    """Raises `UserError` where there is no pattern, and for one that matches none of `names`, with those that exist."""
    if not patterns:
        raise UserError(f"{field} is empty: nothing is chosen. Give it a pattern, as one of {', '.join(sorted(_short(names)))}.")
    check_patterns(patterns, names, field)


def check_layers(layers: Sequence[int], depth: int, field: str) -> None:
    """Raises `UserError` for a layer that a model of `depth` layers doesn't have, and for one that is named twice."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise UserError(f"{field}: there is no layer {layer}; the model's are numbered 0 to {depth - 1}.")
    if twice := [layer for place, layer in enumerate(layers) if layer in layers[:place]]:
        raise UserError(f"{field} names layer {twice[0]} twice.")


def _short(names: Iterable[str]) -> set[str]:
    return {re.sub(r"layers/\d+/", "layers/N/", name) for name in names}


def check_patterns(patterns: Sequence[str], names: Sequence[str], field: str) -> None:
    """Raises `UserError` for a pattern that matches none of `names`, with those that exist."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            short = sorted(_short(names))
            near = difflib.get_close_matches(pattern, [part for name in short for part in name.split("/")], n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{field}: the pattern '{pattern}' matches nothing.{hint} It is matched against: {', '.join(short)}.")


def partition(params: Params, mask: Any) -> tuple[Params, Params]:
    """Splits `params` by an optax mask into what trains and what is frozen.

    Both keep the structure of `params`, with None, which has no leaves, in the other's places.

    >>> partition({"a": 1, "b": 2}, {"a": True, "b": False})
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    trainable = jax.tree.map(lambda leaf, trains: leaf if trains else None, params, mask)
    frozen = jax.tree.map(lambda leaf, trains: None if trains else leaf, params, mask)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """Joins what `partition` split.

    >>> combine({'a': 1, 'b': None}, {'a': None, 'b': 2})
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(lambda one, other: other if one is None else one, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def check_not_quantized(params: Params, trains: Callable[[str], bool]) -> None:
    """Raises `UserError` where a kernel would train that is held in a number format of few bits."""
    for leaf in leaves(params, is_leaf=is_quantized):
        chosen = [name for name in leaf.names if is_quantized(leaf.value) and trains(name)]
        if chosen:
            raise UserError(
                f"{chosen[0]} can't train: it is held in {leaf.value.format_name}, and an optimizer's steps are smaller than the gaps "
                "between the values it has there. Train leaves beside it (method LoRA and its relatives, adapters, prefixes), leave "
                "it out by the method's patterns, or load the model whole: config.model.quantization=none."
            )


def of_base(params: Params) -> Any:
    """Returns which leaves are the base model's own, an optax mask: those of a node belong to what put it there, but for what it wraps."""

    def mark(value: Any) -> Any:
        if isinstance(value, Around):
            return dataclasses.replace(jax.tree.map(lambda _: False, value), base=mark(value.base))
        own = value is not None and (is_quantized(value) or not is_node(value))
        return jax.tree.map(lambda _: own, value)

    return jax.tree.map(mark, params, is_leaf=is_node)


def separate(params: Params, trains: Callable[[str], bool]) -> Params:
    """Returns `params` with layers grouped so that each stored leaf of the base trains whole or not at all, by its name.

    Raises `UserError` where what would train is quantized.
    """
    check_not_quantized(params, trains)
    per_layer: dict[int, list[str]] = {}
    for leaf in leaves(partition(params, of_base(params))[0], is_leaf=is_quantized):
        if leaf.layers is not None:
            for layer, name in zip(leaf.layers, leaf.names, strict=True):
                per_layer.setdefault(layer, []).append(name)

    def signature(layer: int) -> tuple[bool, ...]:
        return tuple(trains(name) for name in per_layer[layer])

    return refine(params, signature)


def mask_by_name(params: Params, trains: Callable[[str], bool]) -> Any:
    """Returns an optax mask: whether a leaf is the base's and `trains` says so of its name; all layers of a stored leaf must agree."""

    def decide(leaf: Leaf) -> bool:
        found = {trains(name) for name in leaf.names}
        if len(found) != 1:
            raise ValueError(f"Layers of {leaf.title} train in part: separate them first.")
        return found.pop()

    base, others = partition(params, of_base(params))
    return combine(map_leaves(decide, base), jax.tree.map(lambda _: False, others))


def names_of(params: Params) -> list[str]:
    """Returns the name of every leaf of the base, one for each layer; a quantized kernel has one, whatever it is made of."""
    base = partition(params, of_base(params))[0]
    return [name for leaf in leaves(base, is_leaf=is_quantized) for name in leaf.names]


def cast(params: Params, mask: Any, dtype: Any) -> Params:
    """Returns `params` with the leaves that `mask` chooses in another type."""
    return jax.tree.map(lambda leaf, chosen: leaf.astype(dtype) if chosen else leaf, params, mask)


def trainable_leaves(params: Params, mask: Any) -> list[Leaf]:
    """Returns the leaves of `params` that train; raises `UserError` where there are none."""
    found = list(leaves(partition(params, mask)[0]))
    if not found:
        raise UserError("Nothing trains: the method's mask is False everywhere. Choose targets that exist, or another method.")
    return found


def size(params: Params) -> int:
    """Returns the number of parameters; an array that stands in several places counts once, a quantized kernel as if it were dense.

    >>> size({"a": np.zeros((2, 3)), "b": None})
    6
    """
    found = distinct(params, is_leaf=is_quantized)
    return sum(int(np.prod(leaf.shape)) for leaf in found if jax.tree.leaves(leaf))  # a kernel that was split off is empty


def size_in_bytes(params: Params) -> int:
    """Returns the bytes of the parameters as they are stored; an array that stands in several places counts once."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in distinct(params))


def distinct(params: Params, is_leaf: Callable[[Any], bool] | None = None) -> Iterable[Any]:
    """Returns the arrays of `params`, with `is_leaf` whole nodes too; one that stands in several places is there once."""
    return {id(leaf): leaf for leaf in jax.tree.leaves(params, is_leaf=is_leaf)}.values()


def listing(params: Params, mask: Any) -> list[tuple[str, str, str, int, int]]:
    """Returns what trains: a row a leaf of (name, shape, dtype, parameters, bytes); stacked layers stand in one row."""
    rows = []
    for leaf in trainable_leaves(params, mask):
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        if leaf.layers is not None:
            shape = f"{len(leaf.layers)} x ({shape})"
        rows.append((leaf.title, shape, str(leaf.value.dtype), size(leaf.value), size_in_bytes(leaf.value)))
    return rows
