"""Tensors of an adapter's file that are leaves of ours, one for one."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub.checkpoint import FLOATS, header
from jaxft.hub.names import WEIGHT, Entry, listed, tensors_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params
from jaxft.hub.task import second_names
from jaxft.methods.kernels import HEAD, WORDS
from jaxft.models import segments
from jaxft.models.node import dense, find, innermost, is_node
from jaxft.models.segments import Leaf

_BASE = PREFIX + "{module}.base_layer.weight"
_WRITTEN_TOO = (WORDS, HEAD, "lm_head/bias", "lm_head/decoder/kernel", "lm_head/decoder/bias")
_EMBEDDINGS = ("embed_tokens", "lm_head")  # targets by which peft tells that embeddings, or the output head, are adapted


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of an adapter's file, and the leaf that holds it, float32."""

    name: str  # theirs: base_model.model.model.layers.3.self_attn.k_proj.ia3_l
    leaf: Leaf
    index: int | None  # along the leaf's layer axis; None where it has none
    shape: tuple[int, ...]  # of their tensor, of as many numbers as ours

    def tensor(self) -> np.ndarray:
        """Returns their tensor, from the device."""
        value = self.leaf.value if self.index is None else self.leaf.value[self.index]
        return np.asarray(jax.device_get(value), np.float32).reshape(self.shape)


def field_of(entry: Entry, field: str) -> Leaf:
    """Returns the leaf of a field of an entry's node."""
    return Leaf((*entry.leaf.path, field), entry.leaf.layers, getattr(entry.leaf.value, field))


def check_free(found: Iterable[Entry], kind: type[Any], chosen: Collection[str], title: str) -> None:
    """Raises `UserError` where one of the modules that an adapter is for has one of its kind already."""
    for entry in found:
        if entry.module in chosen and find(entry.leaf.value, kind) is not None:
            raise UserError(f"These parameters hold {title} at {entry.path} already. Load the adapter onto the base model's.")


def tensors(places: Iterable[Place]) -> Mapping[str, Callable[[], np.ndarray]]:
    """Returns what gives each tensor."""
    return {place.name: place.tensor for place in places}


def check(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `UserError` unless what a file's weights `have` is exactly what `shapes` say."""
    problems = []
    if missing := sorted(set(shapes) - set(have)):
        problems.append(f"it lacks {listed(missing)}")
    if left := sorted(set(have) - set(shapes)):
        problems.append(f"it has tensors that its configuration has no place for: {listed(left)}")
    if wrong := [f"{name} {have[name]} for {shape}" for name, shape in shapes.items() if have.get(name, shape) != shape]:
        problems.append(f"shapes are those of another base model, or of another size: {listed(wrong)}")
    if problems:
        raise UserError(f"{path} doesn't fit: {'; '.join(problems)}.")


def held(
    folder: pathlib.Path,
    model: nn.Module,
    params: Params,
    saved: Collection[str] = (),
    own: Collection[str] = (),
    types: Collection[str] = FLOATS,
    prefix: str = PREFIX,
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a folder's weights that are the adapter's own, without those of `saved` modules.

    peft writes the base's table of words and output head too where they are targets, or where save_embedding_layers asks for them:
    `UserError` is raised where they aren't those of `params`, unless they are among the adapter's `own` tensors. Of modules that others
    replaced it writes what trains by bias "all", and embeddings; what has two names it writes by both. All that computes nothing.
    """
    path = folder / WEIGHTS
    every = header(path, types)
    have = {name.removeprefix(prefix): shape for name, shape in every.items() if name.startswith(prefix)}
    rest = {name: shape for name, shape in every.items() if not name.startswith(prefix)}
    own = {name.removeprefix(prefix) for name in own}
    for name in list(have):
        alone = _without_replaced(name)
        if _module(alone) in saved or (alone != name and alone in own):
            del have[name]
    entries = {entry.name: entry for entry in tensors_of(model, params)}
    bases = {name: entry for name, entry in entries.items() if entry.path in _WRITTEN_TOO}
    for first, second in second_names(model).items():
        if not model.config.tie_word_embeddings:
            if first not in entries:  # the bias of an encoder's head, which has another in the model
                have.pop(first, None)
        elif {first, second} <= set(have) and _are_equal(path, prefix + first, prefix + second):
            del have[second]
        elif first in bases:
            bases[second] = bases[first]
    for theirs, entry in bases.items():
        for name in {theirs, f"{theirs.removesuffix(WEIGHT)}.base_layer{WEIGHT}"} - own:
            if have.pop(name, None) is not None:
                _check_base(path, prefix + name, entry)
    return {prefix + name: shape for name, shape in have.items()} | rest


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _without_replaced(name: str) -> str:
    """Returns the name of what stands for a tensor that is named as one of a module that another replaced, or as one of that other.

    >>> _without_replaced("classifier.modules_to_save.default.dense.bias"), _without_replaced("classifier.bias")
    ('classifier.dense.bias', 'classifier.bias')
    """
    return re.sub(r"\.(original_module|modules_to_save)(\.default)?\.", ".", name)


def _are_equal(path: pathlib.Path, first: str, second: str) -> bool:
    with safetensors.safe_open(path, framework="numpy") as file:
        return np.array_equal(file.get_tensor(first), file.get_tensor(second))


def check_head(folder: pathlib.Path, model: Any) -> None:
    """Raises `UserError` where a folder adapts the output head of a model whose head is the table of words."""
    for second in second_names(model).values() if model.config.tie_word_embeddings else ():
        head = PREFIX + second.removesuffix(WEIGHT)
        of_base = {f"{head}{inner}.{kind}" for inner in ("", ".base_layer") for kind in ("weight", "bias")}
        if adapted := [name for name in header(folder / WEIGHTS, (*FLOATS, "I32")) if name.startswith(f"{head}.") and name not in of_base]:
            raise UserError(
                f"{folder / WEIGHTS}: {adapted[0]} is of the output head, which is the table of words in this model "
                "(tie_word_embeddings): jaxft adapts that where words are looked up alone. Train the adapter without the head as a target, "
                "and without ensure_weight_tying."
            )


def base_weights(adapted: Iterable[Entry], targets: Collection[str]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns the base's own weights of the table of words and the output head among `adapted`, which peft writes beside the adapter.

    It does where one of the configuration's `targets` is the name that either has in most families.
    """
    if not set(targets) & set(_EMBEDDINGS):
        return {}

    def read(entry: Entry) -> np.ndarray:
        return entry.swap(np.asarray(jax.device_get(innermost(entry.leaf.value))))

    return {
        _BASE.format(module=entry.module): functools.partial(read, entry)
        for entry in adapted
        if entry.path in (WORDS, HEAD) and not is_node(innermost(entry.leaf.value))
    }


def _check_base(path: pathlib.Path, name: str, entry: Entry) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        stored = file.get_tensor(name)
    base = innermost(entry.leaf.value)
    coarser = min(stored.dtype, np.dtype(base.dtype), key=lambda dtype: dtype.itemsize)  # either side may hold its base in a half type
    ours = entry.swap(np.asarray(jax.device_get(dense(base))))
    if stored.shape != ours.shape or not np.array_equal(stored.astype(coarser), ours.astype(coarser)):
        raise UserError(f"{path}: {name} isn't this model's {entry.name}: the adapter is of another base model, or trained its head whole.")


def read(folder: pathlib.Path, params: Params, places: Iterable[Place], have: Mapping[str, tuple[int, ...]]) -> Params:
    """Returns `params` with the leaves of `places` from a folder's weights; `have` is what the weights hold, and has to be just that."""
    places = list(places)
    check(folder / WEIGHTS, {place.name: place.shape for place in places}, have)
    filled: dict[tuple[str, ...], Any] = {}
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        for place in places:
            shape = place.leaf.value.shape
            host = filled.setdefault(place.leaf.path, np.empty(shape, np.float32))
            part = shape if place.index is None else shape[1:]
            host[... if place.index is None else place.index] = file.get_tensor(place.name).reshape(part)
    return segments.map_leaves(lambda leaf: jnp.asarray(filled[leaf.path]) if leaf.path in filled else leaf.value, params)
