"""AdaLoRA as PEFT writes and reads it: pruned triplets are left out of the file, and named in the configuration's rank_pattern."""

import functools
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_leaves, peft_lora_config, peft_tensors
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import Entry, is_conv1d, linear_layers, nodes_of, tensors_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params, Written
from jaxft.hub.peft_lora import place
from jaxft.hub.peft_tensors import Slot
from jaxft.methods.adalora import AdaLoRA, AdaLoRAKernel
from jaxft.methods.kernels import NO_BIAS

METHOD = AdaLoRA
PEFT_TYPE = "ADALORA"
_NAMES = {  # theirs: ours
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "deltaT": "delta_t",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
    "total_step": "total_steps",
}
DEFAULTS = peft_lora_config.DEFAULTS | {
    "peft_type": PEFT_TYPE,
    "rank_pattern": None,
    "init_r": 12,
    "target_r": 8,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": None,
}
_HONOURED = frozenset(_NAMES) | {
    "bias",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "r",
}


def write(model: nn.Module, params: Params, method: AdaLoRA) -> Written:
    """Returns the configuration and the tensors of an AdaLoRA; raises `UserError` where `params` hold none, or another one."""
    linear = linear_layers(model, params)
    adapted = nodes_of(linear, AdaLoRAKernel, method.is_target)
    if not adapted:
        raise UserError("These parameters hold no AdaLoRA: params = method.init(rng, model, params) adds one.")
    for entry in adapted:
        if (rank := entry.leaf.value.lora_e.shape[-1]) != method.init_rank:
            raise UserError(f"{entry.path} has rank {rank}, not {method.init_rank}. Pass the method that made the parameters.")
    kept = {entry.module: _values(entry) != 0 for entry in adapted}
    pruned = any(mask.any() for mask in kept.values()) and not all(mask.all() for mask in kept.values())
    if not pruned:  # values that are all zero aren't trained yet
        kept = {module: np.ones(method.init_rank, bool) for module in kept}
    modules = [entry.module for entry in adapted]
    config = {theirs: getattr(method, ours) for theirs, ours in _NAMES.items()} | {
        "bias": method.bias,
        "fan_in_fan_out": is_conv1d(adapted),
        "lora_alpha": int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
        "total_step": method.total_steps or _shortest(method.tinit, method.tfinal),  # peft takes no adapter without a schedule
        "rank_pattern": {f"{module}.lora_E": mask.tolist() for module, mask in kept.items()} if pruned else None,
        "target_modules": sorted(peft_lora_config.summarize(dict.fromkeys(modules, True), [entry.module for entry in linear], ".")),
    }
    slots = [slot for entry in adapted for slot in _slots(entry, kept[entry.module])]
    slots += peft_tensors.biases(tensors_of(model, params), method.trains_bias, modules)
    tensors = {slot.key: slot.read for slot in slots}
    return Written(DEFAULTS | config, tensors | peft_leaves.base_weights(adapted, config["target_modules"]))


def read(
    folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
) -> tuple[Params, AdaLoRA]:
    """Returns `params` with a folder's AdaLoRA around its targets, pruned triplets zero, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_lora_config.check(config, where, PEFT_TYPE, DEFAULTS, _HONOURED)
    linear = linear_layers(model, params)
    modules = [entry.module for entry in linear]
    chosen = set(peft_lora_config.targets(config, modules, where, saved=saved))
    peft_leaves.check_free(linear, AdaLoRAKernel, chosen, METHOD.__name__)
    names = [place(entry) for entry in linear if entry.module in chosen]
    settings = {ours: type(getattr(AdaLoRA(), ours))(config.get(theirs) or DEFAULTS[theirs] or 0) for theirs, ours in _NAMES.items()}
    settings |= {ours: config[theirs] for theirs, ours in _NAMES.items() if config.get(theirs) == 0}
    if settings["total_steps"] == _shortest(settings["tinit"], settings["tfinal"]):
        settings["total_steps"] = 0  # none was given: those of a run, where it trains on
    if settings["target_rank"] > settings["init_rank"]:
        raise UserError(f"{where}: target_r is {settings['target_rank']}, above init_r, {settings['init_rank']}.")
    targets = peft_lora_config.summarize(dict.fromkeys(names, True), [place(entry) for entry in linear], "/")
    method = AdaLoRA(**settings, targets=tuple(targets), bias=config.get("bias") or NO_BIAS)
    method = peft_tensors.with_present_biases(method, tensors_of(model, params))
    add = functools.partial(method.added, jax.random.key(0), model)

    def slots(params: Params) -> list[Slot]:
        adapted = nodes_of(linear_layers(model, params), AdaLoRAKernel, method.is_target)
        found = [slot for entry in adapted for slot in _slots(entry, _kept(config, entry.module, method.init_rank, where))]
        return found + peft_tensors.biases(tensors_of(model, params), method.trains_bias, chosen)

    peft_tensors.check(folder, slots(jax.eval_shape(add, params)), model, params, saved)  # nothing is made for a file that doesn't fit
    params = add(params)
    return peft_tensors.fill(folder / WEIGHTS, params, slots(params)), method


def _shortest(tinit: int, tfinal: int) -> int:
    """The steps of the shortest schedule, which stands in a file for none."""
    return tinit + tfinal + 1


def _values(entry: Entry) -> np.ndarray:
    value = entry.leaf.value.lora_e
    return np.asarray(jax.device_get(value if entry.index is None else value[entry.index]))


def _kept(config: dict[str, Any], module: str, rank: int, where: str) -> np.ndarray:
    """Which of a module's triplets the file holds, (rank,) bool."""
    mask = np.asarray((config.get("rank_pattern") or {}).get(f"{module}.lora_E", [True] * rank), bool)
    if mask.shape != (rank,):
        raise UserError(f"{where}: rank_pattern of {module} has {mask.size} entries; init_r is {rank}.")
    return mask


def _slots(entry: Entry, kept: np.ndarray) -> list[Slot]:
    """The three tensors of a kernel, without the triplets that aren't kept."""
    rows, columns = entry.leaf.shape
    rank, count = len(kept), int(kept.sum())

    def spread(array: np.ndarray) -> np.ndarray:
        """(kept, long) -> (rank, long), zero in between."""
        whole = np.zeros((rank, array.shape[1]), np.float32)
        whole[kept] = array
        return whole

    def slot(side: str, field: str, shape: tuple[int, int], turn: Any, back: Any) -> Slot:
        return Slot(f"{PREFIX}{entry.module}.lora_{side}", entry, field, shape, turn, back)

    return [
        slot("A", "lora_a", (count, rows), lambda ours: ours.T[kept], lambda theirs: spread(theirs).T),
        slot("B", "lora_b", (columns, count), lambda ours: ours[kept].T, lambda theirs: spread(theirs.T)),
        slot("E", "lora_e", (count, 1), lambda ours: ours[kept][:, None], lambda theirs: spread(theirs)[:, 0]),
    ]
