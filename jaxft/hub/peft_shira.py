"""Sparse masks as PEFT's SHiRA writes and reads them."""

import dataclasses
import math
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_config, peft_leaves, peft_lora_config
from jaxft.hub.checkpoint import ADAPTER_CONFIG, FLOATS
from jaxft.hub.names import Entry, is_conv1d, linear_layers, nodes_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params, Written
from jaxft.methods.sparse_mask import SparseKernel, SparseMask
from jaxft.models import segments
from jaxft.models.node import is_node

METHOD = SparseMask
PEFT_TYPE = "SHIRA"
DEFAULTS = peft_config.COMMON | {
    "fan_in_fan_out": False,
    "init_weights": True,
    "mask_type": "random",
    "peft_type": PEFT_TYPE,
    "r": 32,
    "random_seed": None,
}
_INDICES = PREFIX + "{module}.shira_indices"  # (2, count) int32: of outputs, of inputs
_WEIGHT = PREFIX + "{module}.shira_weight"  # (count,)


def write(model: nn.Module, params: Params, method: SparseMask) -> Written:
    """Returns the configuration and the tensors; raises `UserError` where `params` hold no sparse difference.

    SHiRA has r * (in + out) numbers a kernel: where ours are fewer, zeros at places of no difference fill them up.
    """
    linear = linear_layers(model, params)
    adapted = nodes_of(linear, SparseKernel, method.is_target)
    if not adapted:
        raise UserError("These parameters hold no SparseMask: params = method.init(rng, model, params) adds one.")
    if is_conv1d(adapted):
        raise UserError(
            f"PEFT has no SHiRA for {adapted[0].module}: there it is a Conv1D, not a linear layer. Write the whole model: "
            "jaxft.save_pretrained(folder, model, method.merge(model, params))."
        )
    rank = max(math.ceil(_count(entry) / sum(entry.leaf.shape)) for entry in adapted)
    tensors = {}
    for entry in adapted:
        rows, columns = entry.leaf.shape
        if rank * (rows + columns) > rows * columns:
            raise UserError(
                f"SHiRA can't hold {_count(entry):,} of the {rows * columns:,} weights of {entry.path}: its files have a multiple of "
                f"{rows + columns:,} for every kernel, here {rank * (rows + columns):,}. Write the whole model: "
                "jaxft.save_pretrained(folder, model, method.merge(model, params))."
            )
        tensors[_INDICES.format(module=entry.module)] = lambda entry=entry: _padded(entry, rank)[0]
        tensors[_WEIGHT.format(module=entry.module)] = lambda entry=entry: _padded(entry, rank)[1]
    targets = peft_config.patterns([entry.module for entry in adapted], [entry.module for entry in linear], ".")
    return Written(DEFAULTS | {"r": rank, "target_modules": targets}, tensors | peft_leaves.base_weights(adapted, targets))


def read(
    folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
) -> tuple[Params, SparseMask]:
    """Returns `params` with a folder's sparse differences, and the method that gives the same structure, at places of its own."""
    where = str(folder / ADAPTER_CONFIG)
    peft_config.check(config, DEFAULTS, ("init_weights", "mask_type", "r", "random_seed"), where)
    linear = linear_layers(model, params)
    chosen = set(peft_lora_config.targets(config, [entry.module for entry in linear], where, saved=saved))
    peft_leaves.check_free(linear, SparseKernel, chosen, METHOD.__name__)
    every = [entry.path.rpartition("/")[0] for entry in linear]
    names = [name for entry, name in zip(linear, every, strict=True) if entry.module in chosen]
    method = SparseMask(rank=config.get("r", DEFAULTS["r"]), targets=tuple(peft_config.patterns(names, every, "/")))
    method.check_fits(params, f"{where}: r")
    params = method.init(jax.random.key(0), model, params)
    adapted = nodes_of(linear_layers(model, params), SparseKernel, method.is_target)
    shapes: dict[str, tuple[int, ...]] = {_INDICES.format(module=entry.module): (2, _count(entry)) for entry in adapted}
    shapes |= {_WEIGHT.format(module=entry.module): (_count(entry),) for entry in adapted}
    peft_leaves.check(folder / WEIGHTS, shapes, peft_leaves.held(folder, model, params, saved, types=(*FLOATS, "I32")))
    return _fill(folder / WEIGHTS, params, adapted), method


def _count(entry: Entry) -> int:
    return entry.leaf.value.values.shape[-1]


def _padded(entry: Entry, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A kernel's indices and weights as their file has them: ours, and zeros at the first places that are free."""
    value, (rows, columns) = entry.leaf.value, entry.leaf.shape
    parts = (value.rows, value.columns, value.values)
    if entry.index is not None:
        parts = tuple(part[entry.index] for part in parts)
    ours_rows, ours_columns, values = (np.asarray(jax.device_get(part)) for part in parts)
    missing = rank * (rows + columns) - len(values)
    used = np.zeros((columns, rows), bool)
    used[ours_columns, ours_rows] = True
    free = np.argwhere(~used)[:missing].T
    indices = np.concatenate([np.stack([ours_columns, ours_rows]), free], axis=1).astype(np.int32)
    return indices, np.concatenate([values, np.zeros(missing, np.float32)]).astype(np.float32)


def _fill(path: pathlib.Path, params: Params, adapted: list[Entry]) -> Params:
    """Returns `params` with the places and values of the file."""
    nodes: dict[tuple[str, ...], list[Entry]] = {}
    for entry in adapted:
        nodes.setdefault(entry.leaf.path, []).append(entry)
    filled = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for place, parts in nodes.items():
            found = [_of_one(file, entry, path) for entry in parts]
            rows, columns, values = (
                jnp.asarray(np.stack(field) if parts[0].index is not None else field[0]) for field in zip(*found, strict=True)
            )
            filled[place] = dataclasses.replace(parts[0].leaf.value, rows=rows, columns=columns, values=values)
    return segments.map_leaves(lambda leaf: filled.get(leaf.path, leaf.value), params, is_leaf=is_node)


def _of_one(file: Any, entry: Entry, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of one kernel; raises `UserError` for places that aren't in it, or stand there twice."""
    name = _INDICES.format(module=entry.module)
    columns, rows = file.get_tensor(name)
    inside = (rows >= 0) & (rows < entry.leaf.shape[0]) & (columns >= 0) & (columns < entry.leaf.shape[1])
    if not inside.all() or len(set(zip(rows.tolist(), columns.tolist(), strict=True))) != len(rows):
        raise UserError(f"{path}: {name} has places outside of the kernel, or one of them twice.")
    return rows, columns, file.get_tensor(_WEIGHT.format(module=entry.module)).astype(np.float32)
