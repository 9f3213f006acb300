"""LoRA as PEFT writes and reads it."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_lora_config
from jaxft.hub.checkpoint import ADAPTER_CONFIG, header
from jaxft.hub.names import Entry, linear_layers, listed
from jaxft.hub.peft_format import WEIGHTS, Params, Written
from jaxft.methods.lora import KERNEL, LoRA, LoRAKernel
from jaxft.models import segments
from jaxft.models.node import dense, is_node

METHOD = LoRA
PEFT_TYPE = "LORA"
_KEY = "base_model.model.{module}.lora_{side}.weight"  # A is (rank, in), B is (out, rank)
_BASE = "base_model.model.{module}.base_layer.weight"
_SIDES = {"A": "lora_a", "B": "lora_b"}


def write(model: nn.Module, params: Params, method: LoRA) -> Written:
    """Returns the configuration and the tensors of a LoRA; raises `UserError` where `params` hold none, or another one."""
    linear = linear_layers(model, params)
    adapted = [entry for entry in linear if isinstance(entry.leaf.value, LoRAKernel)]
    if not adapted:
        raise UserError("These parameters hold no LoRA: params = method.init(rng, model, params) adds one.")
    for entry in adapted:
        _check_made_by(method, entry)
    tensors = {_KEY.format(module=entry.module, side=side): _reader(entry, field) for entry in adapted for side, field in _SIDES.items()}
    return Written(_config(method, linear, adapted), tensors)


def read(folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params) -> tuple[Params, LoRA]:
    """Returns `params` with a folder's LoRA around its targets, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_lora_config.check(config, where)
    linear = linear_layers(model, params)
    if any(isinstance(entry.leaf.value, LoRAKernel) for entry in linear):
        raise UserError("These parameters hold a LoRA already. Load the adapter onto the base model's.")
    chosen = set(peft_lora_config.targets(config, [entry.module for entry in linear], where))
    method = _method(config, linear, chosen)
    params = method.init(jax.random.key(0), model, params)
    adapted = [entry for entry in linear_layers(model, params) if isinstance(entry.leaf.value, LoRAKernel)]
    _check_weights(folder, adapted, linear)
    return _fill(folder / WEIGHTS, params, adapted), method


def _name(entry: Entry) -> str:
    """layers/3/attention/q_proj"""
    return entry.path.removesuffix(f"/{KERNEL}")


def _rank(entry: Entry) -> int:
    return entry.leaf.value.lora_a.shape[-1]


def _part(entry: Entry, field: str) -> jax.Array:
    value = getattr(entry.leaf.value, field)
    return value if entry.index is None else value[entry.index]


def _reader(entry: Entry, field: str) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(jax.device_get(_part(entry, field)), np.float32).T


def _check_made_by(method: LoRA, entry: Entry) -> None:
    scale = np.float32(method.scale_of(entry.path))
    if _rank(entry) != method.rank_of(entry.path) or not np.isclose(_part(entry, "scale"), scale, rtol=1e-6):
        raise UserError(
            f"{entry.path} has rank {_rank(entry)} and scale {float(_part(entry, 'scale')):g}; this method gives it rank "
            f"{method.rank_of(entry.path)} and scale {scale:g}. Pass the method that made the parameters."
        )


def _config(method: LoRA, linear: list[Entry], adapted: list[Entry]) -> dict[str, Any]:
    modules = [entry.module for entry in adapted]
    every = [entry.module for entry in linear]
    ranks = {entry.module: method.rank_of(entry.path) for entry in adapted}
    alphas = {entry.module: method.alpha_of(entry.path) for entry in adapted}
    return peft_lora_config.DEFAULTS | {
        "r": method.rank,
        "lora_alpha": _whole(method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "rank_pattern": peft_lora_config.summarize({name: rank for name, rank in ranks.items() if rank != method.rank}, modules, "."),
        "alpha_pattern": peft_lora_config.summarize({name: _whole(a) for name, a in alphas.items() if a != method.alpha}, modules, "."),
        "target_modules": sorted(peft_lora_config.summarize(dict.fromkeys(modules, True), every, ".")),
    }


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _method(config: dict[str, Any], linear: list[Entry], chosen: set[str]) -> LoRA:
    """The LoRA of a configuration, its patterns over our names."""
    rank, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    adapted = [entry for entry in linear if entry.module in chosen]
    names = [_name(entry) for entry in adapted]
    ranks = {_name(e): peft_lora_config.pattern_value(config.get("rank_pattern") or {}, e.module, rank) for e in adapted}
    alphas = {_name(e): float(peft_lora_config.pattern_value(config.get("alpha_pattern") or {}, e.module, alpha)) for e in adapted}
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=tuple(peft_lora_config.summarize(dict.fromkeys(names, True), [_name(entry) for entry in linear], "/")),
        rslora=bool(config.get("use_rslora")),
        rank_pattern=tuple(peft_lora_config.summarize({name: r for name, r in ranks.items() if r != rank}, names, "/").items()),
        alpha_pattern=tuple(peft_lora_config.summarize({name: a for name, a in alphas.items() if a != alpha}, names, "/").items()),
    )


def _check_weights(folder: pathlib.Path, adapted: list[Entry], linear: list[Entry]) -> None:
    have = header(folder / WEIGHTS)
    for entry in linear:  # peft writes the base's output head too where that is a target
        if (name := _BASE.format(module=entry.module)) in have and entry.index is None:
            _check_base(folder / WEIGHTS, name, entry)
            del have[name]
    shapes = {}
    for entry in adapted:
        rows, columns = entry.leaf.shape
        shapes[_KEY.format(module=entry.module, side="A")] = (_rank(entry), rows)
        shapes[_KEY.format(module=entry.module, side="B")] = (columns, _rank(entry))
    problems = []
    if missing := sorted(set(shapes) - set(have)):
        problems.append(f"it lacks {listed(missing)}")
    if left := sorted(set(have) - set(shapes)):
        problems.append(f"it has tensors that its configuration has no place for: {listed(left)}")
    if wrong := [f"{name} {have[name]} for {shape}" for name, shape in shapes.items() if have.get(name, shape) != shape]:
        problems.append(f"shapes are those of another base model, or another rank: {listed(wrong)}")
    if problems:
        raise UserError(f"{folder / WEIGHTS} doesn't fit: {'; '.join(problems)}.")


def _check_base(path: pathlib.Path, name: str, entry: Entry) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        stored = file.get_tensor(name)
    held = entry.swap(np.asarray(jax.device_get(dense(entry.leaf.value))))
    if stored.shape != held.shape or not np.array_equal(stored.astype(entry.leaf.value.dtype), held.astype(entry.leaf.value.dtype)):
        raise UserError(f"{path}: {name} isn't this model's {entry.name}: the adapter is of another base model, or trained its head whole.")


def _fill(path: pathlib.Path, params: Params, adapted: list[Entry]) -> Params:
    """Returns `params` with lora_a and lora_b from the file."""
    nodes: dict[tuple[str, ...], list[Entry]] = {}
    for entry in adapted:
        nodes.setdefault(entry.leaf.path, []).append(entry)
    filled = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for place, parts in nodes.items():
            made = parts[0].leaf.value
            sides = {field: np.empty(getattr(made, field).shape, np.float32) for field in _SIDES.values()}
            for entry, (side, field) in itertools.product(parts, _SIDES.items()):
                tensor = file.get_tensor(_KEY.format(module=entry.module, side=side))
                sides[field][... if entry.index is None else entry.index] = tensor.T
            filled[place] = dataclasses.replace(made, **{field: jnp.asarray(host) for field, host in sides.items()})
    return segments.map_leaves(lambda leaf: filled.get(leaf.path, leaf.value), params, is_leaf=is_node)
