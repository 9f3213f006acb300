"""LoRA adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

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
from jaxft.hub import folder as folders
from jaxft.hub import peft_config
from jaxft.hub.checkpoint import ADAPTER_CONFIG, header, read_json
from jaxft.hub.names import Entry, entries, listed
from jaxft.hub.save import CARD
from jaxft.hub.sources import PICKLE_SUFFIXES, pickle_refusal
from jaxft.methods.lora import KERNEL, LoRA, LoRAKernel
from jaxft.models import segments
from jaxft.models.node import dense, is_node
from jaxft.models.registry import family_of

Params = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"
_KEY = "base_model.model.{module}.lora_{side}.weight"  # A is (rank, in), B is (out, rank)
_BASE = "base_model.model.{module}.base_layer.weight"
_SIDES = {"A": "lora_a", "B": "lora_b"}
_CARD = """---
library_name: peft
---
A LoRA adapter written by jaxft. `peft.PeftModel.from_pretrained(base_model, FOLDER)` loads it.
"""


def save_adapter(folder: str | pathlib.Path, model: nn.Module, params: Params, method: LoRA, base_model: str = "", card: str = "") -> None:
    """Writes a LoRA as a folder that `peft.PeftModel.from_pretrained` loads; each tensor is read back and compared.

    Args:
      folder: where; what is there is replaced if jaxft wrote it.
      model: as `load_pretrained` gives it.
      params: as `method.init` makes them, trained or not.
      method: the LoRA that made them.
      base_model: what the adapter belongs to, a hub id or a folder, for peft to find it.
      card: README.md, Markdown; empty is a short one.

    Raises:
      UserError: `params` hold no LoRA, or not this one; a folder that isn't ours, or can't be written.
    """
    if not isinstance(method, LoRA):
        raise UserError(f"save_adapter writes LoRA adapters; {type(method).__name__} has no form in PEFT that jaxft writes.")
    linear = _linear(model, params)
    adapted = [entry for entry in linear if isinstance(entry.leaf.value, LoRAKernel)]
    if not adapted:
        raise UserError("These parameters hold no LoRA: params = method.init(rng, model, params) adds one.")
    for entry in adapted:
        _check_made_by(method, entry)
    tensors = {_KEY.format(module=entry.module, side=side): _reader(entry, field) for entry in adapted for side, field in _SIDES.items()}
    with folders.written(pathlib.Path(folder).expanduser(), "adapter") as temporary:
        folders.write_tensors(temporary / WEIGHTS, tensors)
        folders.write_json(temporary / ADAPTER_CONFIG, _config(method, linear, adapted, base_model))
        (temporary / CARD).write_text(card or _CARD, encoding="utf-8")


def load_adapter(folder: str | pathlib.Path, model: nn.Module, params: Params) -> tuple[Params, LoRA]:
    """Returns `params` with a PEFT LoRA around its targets, and the method that gives the same structure.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the adapter's base model.
      params: its parameters, without a LoRA.

    Raises:
      UserError: no adapter there; an option that jaxft doesn't have; weights missing, left over, or of another base's shape.
    """
    folder = pathlib.Path(folder).expanduser()
    config = _read_config(folder)
    where = str(folder / ADAPTER_CONFIG)
    linear = _linear(model, params)
    if any(isinstance(entry.leaf.value, LoRAKernel) for entry in linear):
        raise UserError("These parameters hold a LoRA already. Load the adapter onto the base model's.")
    chosen = set(peft_config.targets(config, [entry.module for entry in linear], where))
    method = _method(config, linear, chosen)
    params = method.init(jax.random.key(0), model, params)
    adapted = [entry for entry in _linear(model, params) if isinstance(entry.leaf.value, LoRAKernel)]
    _check_weights(folder, adapted, linear)
    return _fill(folder / WEIGHTS, params, adapted), method


def _linear(model: nn.Module, params: Params) -> list[Entry]:
    """The model's linear layers."""
    return [entry for entry in entries(family_of(model.config.architecture).module, params) if entry.path.endswith(f"/{KERNEL}")]


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


def _config(method: LoRA, linear: list[Entry], adapted: list[Entry], base_model: str) -> dict[str, Any]:
    modules = [entry.module for entry in adapted]
    every = [entry.module for entry in linear]
    ranks = {entry.module: method.rank_of(entry.path) for entry in adapted}
    alphas = {entry.module: method.alpha_of(entry.path) for entry in adapted}
    return peft_config.DEFAULTS | {
        "r": method.rank,
        "lora_alpha": _whole(method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "rank_pattern": peft_config.summarize({name: rank for name, rank in ranks.items() if rank != method.rank}, modules, "."),
        "alpha_pattern": peft_config.summarize({name: _whole(a) for name, a in alphas.items() if a != method.alpha}, modules, "."),
        "target_modules": sorted(peft_config.summarize(dict.fromkeys(modules, True), every, ".")),
        "base_model_name_or_path": base_model or None,
    }


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}: it is no PEFT adapter.")
    config = read_json(folder / ADAPTER_CONFIG)
    peft_config.check(config, str(folder / ADAPTER_CONFIG))
    if not (folder / WEIGHTS).exists():
        if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
            raise pickle_refusal(str(folder))
        raise UserError(f"{folder} has no {WEIGHTS}.")
    return config


def _method(config: dict[str, Any], linear: list[Entry], chosen: set[str]) -> LoRA:
    """The LoRA of a configuration, its patterns over our names."""
    rank, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    adapted = [entry for entry in linear if entry.module in chosen]
    names = [_name(entry) for entry in adapted]
    ranks = {_name(e): peft_config.pattern_value(config.get("rank_pattern") or {}, e.module, rank) for e in adapted}
    alphas = {_name(e): float(peft_config.pattern_value(config.get("alpha_pattern") or {}, e.module, alpha)) for e in adapted}
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=tuple(peft_config.summarize(dict.fromkeys(names, True), [_name(entry) for entry in linear], "/")),
        rslora=bool(config.get("use_rslora")),
        rank_pattern=tuple(peft_config.summarize({name: r for name, r in ranks.items() if r != rank}, names, "/").items()),
        alpha_pattern=tuple(peft_config.summarize({name: a for name, a in alphas.items() if a != alpha}, names, "/").items()),
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
