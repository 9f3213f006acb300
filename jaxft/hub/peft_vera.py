"""VeRA as PEFT writes and reads it."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_config, peft_leaves, peft_lora_config, peft_tensors
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import Entry, is_conv1d, linear_layers, nodes_of, tensors_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params, Written
from jaxft.hub.peft_leaves import Place
from jaxft.hub.peft_tensors import Slot
from jaxft.methods.kernels import NO_BIAS
from jaxft.methods.vera import VeRA, VeRAKernel, projections
from jaxft.models import segments
from jaxft.models.node import Shared, is_node
from jaxft.models.segments import Leaf

METHOD = VeRA
PEFT_TYPE = "VERA"
DEFAULTS = peft_config.COMMON | {
    "bias": "none",
    "d_initial": 0.1,
    "fan_in_fan_out": False,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "peft_type": PEFT_TYPE,
    "projection_prng_key": 0,
    "r": 256,
    "save_projection": True,
    "vera_dropout": 0.0,
}
_HONOURED = ("bias", "d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout")
_PROJECTIONS = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}  # (rank, largest in) and (largest out, rank)
_VECTORS = ("lambda_b", "lambda_d")


def write(model: nn.Module, params: Params, method: VeRA) -> Written:
    """Returns the configuration and the tensors, the two projections included; raises `UserError` where `params` hold none."""
    linear = linear_layers(model, params)
    adapted = nodes_of(linear, VeRAKernel, method.is_target)
    if not adapted:
        raise UserError("These parameters hold no VeRA: params = method.init(rng, model, params) adds one.")
    first = adapted[0].leaf.value
    if first.lambda_d.shape[-1] != method.rank:
        raise UserError(
            f"These parameters hold a VeRA of rank {first.lambda_d.shape[-1]}, not {method.rank}. Pass the method that made them."
        )
    config = DEFAULTS | {
        "bias": method.bias,
        "d_initial": method.d_initial,
        "fan_in_fan_out": is_conv1d(adapted),
        "projection_prng_key": method.seed,
        "r": method.rank,
        "save_projection": method.save_projection,
        "target_modules": peft_config.patterns([entry.module for entry in adapted], [entry.module for entry in linear], "."),
        "vera_dropout": method.dropout,
    }
    shared = {name: lambda field=field: np.asarray(getattr(first, field).value).T for name, field in _PROJECTIONS.items()}
    if not method.save_projection:
        _check_drawn(first, method)
        shared = {}
    biases = {slot.key: slot.read for slot in _biases(model, params, method, [entry.module for entry in adapted])}
    base = peft_leaves.base_weights(adapted, config["target_modules"])
    return Written(config, {**peft_leaves.tensors(_places(adapted)), **biases, **shared, **base})


def read(
    folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
) -> tuple[Params, VeRA]:
    """Returns `params` with a folder's VeRA around its targets, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_config.check(config, DEFAULTS, _HONOURED, where)
    linear = linear_layers(model, params)
    chosen = set(peft_lora_config.targets(config, [entry.module for entry in linear], where, saved=saved))
    peft_leaves.check_free(linear, VeRAKernel, chosen, METHOD.__name__)
    every = [entry.path.rpartition("/")[0] for entry in linear]
    names = [name for entry, name in zip(linear, every, strict=True) if entry.module in chosen]
    method = VeRA(
        rank=config.get("r", DEFAULTS["r"]),
        d_initial=float(config.get("d_initial", DEFAULTS["d_initial"])),
        dropout=float(config.get("vera_dropout") or 0.0),
        targets=tuple(peft_config.patterns(names, every, "/")),
        seed=config.get("projection_prng_key", 0),
        bias=config.get("bias") or NO_BIAS,
        save_projection=config.get("save_projection", True),
    )
    method = peft_tensors.with_present_biases(method, tensors_of(model, params))
    params = method.init(jax.random.key(0), model, params)
    adapted = nodes_of(linear_layers(model, params), VeRAKernel, method.is_target)
    biases, path = _biases(model, params, method, chosen), folder / WEIGHTS
    have = peft_leaves.held(folder, model, params, saved, [slot.key for slot in biases])
    params = _with_projections(folder, params, have, adapted)
    peft_leaves.check(path, {slot.key: slot.shape for slot in biases}, {slot.key: have[slot.key] for slot in biases if slot.key in have})
    vectors = {name: shape for name, shape in have.items() if name not in {*_PROJECTIONS, *(slot.key for slot in biases)}}
    params = peft_leaves.read(folder, params, _places(adapted), vectors)
    return peft_tensors.fill(path, params, _biases(model, params, method, chosen)), method


def _biases(model: nn.Module, params: Params, method: VeRA, modules: Collection[str]) -> list[Slot]:
    return peft_tensors.biases(tensors_of(model, params), method.trains_bias, modules)


def _check_drawn(kernel: VeRAKernel, method: VeRA) -> None:
    """Raises `UserError` unless the two projections are those that a reader draws by the method's seed."""
    rows, columns = kernel.vera_a.value.shape[0], kernel.vera_b.value.shape[1]
    held = (np.asarray(kernel.vera_a.value), np.asarray(kernel.vera_b.value))
    if not all(map(np.array_equal, held, projections(method.seed, method.rank, rows, columns))):
        raise UserError(
            f"method.save_projection=False leaves the two projections to be drawn by the seed {method.seed}; these aren't what it gives. "
            "Save them too."
        )


def _with_projections(folder: pathlib.Path, params: Params, have: Mapping[str, tuple[int, ...]], adapted: list[Entry]) -> Params:
    """Returns `params` with the file's own projections, where it has them: who wrote them may have drawn others from that seed."""
    if missing := sorted(set(_PROJECTIONS) - set(have)):
        if len(missing) == len(_PROJECTIONS):
            return params
        raise UserError(f"{folder / WEIGHTS} doesn't fit: it lacks {missing[0]}.")
    made: dict[str, Any] = {}
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        for name, field in _PROJECTIONS.items():
            shape = getattr(adapted[0].leaf.value, field).value.shape
            if have[name] != shape[::-1]:
                raise UserError(f"{folder / WEIGHTS} doesn't fit: {name} is {have[name]}, where the targets take {shape[::-1]}.")
            made[field] = Shared(jnp.asarray(np.ascontiguousarray(file.get_tensor(name).T, np.float32)))

    own = {entry.leaf.path for entry in adapted}

    def swap(leaf: Leaf) -> Any:
        return dataclasses.replace(leaf.value, **made) if leaf.path in own else leaf.value

    return segments.map_leaves(swap, params, is_leaf=is_node)


def _places(adapted: list[Entry]) -> list[Place]:
    return [
        Place(f"{PREFIX}{entry.module}.vera_{field}", leaf := peft_leaves.field_of(entry, field), entry.index, leaf.shape)
        for entry in adapted
        for field in _VECTORS
    ]
