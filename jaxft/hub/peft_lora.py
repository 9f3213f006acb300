"""LoRA as PEFT writes and reads it."""

import functools
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_leaves, peft_lora_config, peft_saved, peft_tensors
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import Entry, is_conv1d, nodes_of, tensors_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params, Written
from jaxft.hub.peft_tensors import Slot, module_of
from jaxft.methods import lora_start
from jaxft.methods.kernels import EMBEDDING, KERNEL
from jaxft.methods.lora import LoRA, LoRAKernel
from jaxft.methods.partition import first_match

METHOD = LoRA
PEFT_TYPE = "LORA"
_KEYS = {  # of linear layers, of embeddings
    "lora_a": ("{module}.lora_A.weight", "{module}.lora_embedding_A"),  # (rank, in)
    "lora_b": ("{module}.lora_B.weight", "{module}.lora_embedding_B"),  # (out, rank)
    "lora_bias": ("{module}.lora_B.bias", ""),  # (out,)
    "magnitude": ("{module}.lora_magnitude_vector", "{module}.lora_magnitude_vector"),  # (out,)
}


def write(model: nn.Module, params: Params, method: LoRA) -> Written:
    """Returns the configuration and the tensors of a LoRA; raises `UserError` where `params` hold none, or another one.

    One that started from a part of the base is written for the original base, as peft converts it: beside lora_a and lora_b stand those
    it started from, their product taken off, at twice the rank.
    """
    every = tensors_of(model, params)
    adapted = nodes_of(every, LoRAKernel, method.is_target)
    if not adapted:
        raise UserError("These parameters hold no LoRA: params = method.init(rng, model, params) adds one.")
    for entry in adapted:
        _check_made_by(method, entry)
    if lora_start.loftq_iterations(method.start) > 1:
        raise UserError(
            f"method.start: '{method.start}' quantized the base again, and the adapter belongs to that one alone. Write the model: "
            "jaxft.save_pretrained(folder, model, method.merge(model, params)), or start with 'loftq', which leaves the base as it is."
        )
    config, tensors = _config(method, every, adapted), {slot.key: _reader(slot) for slot in _slots(method, every)}
    if adapted[0].leaf.value.start_a is None:  # else the base isn't the original one
        tensors |= peft_leaves.base_weights(adapted, config["target_modules"])
    return Written(config, tensors)


def read(
    folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
) -> tuple[Params, LoRA]:
    """Returns `params` with a folder's LoRA around its targets, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_lora_config.check(config, where)
    if lists := [module for module, rank in (config.get("rank_pattern") or {}).items() if isinstance(rank, list)]:
        raise UserError(f"{where}: rank_pattern of {lists[0]} is a list, as AdaLoRA has it; a LoRA's is a rank.")
    every = tensors_of(model, params)
    kernels = kernels_of(every)
    linear = [entry.module for entry in kernels if entry.path.endswith(KERNEL)]
    chosen = set(peft_lora_config.targets(config, [entry.module for entry in kernels], where, "linear layers and embeddings", linear))
    peft_leaves.check_free(every, LoRAKernel, chosen, METHOD.__name__)
    method = peft_tensors.with_present_biases(_method(config, every, chosen, where), every)
    add = functools.partial(method.added, jax.random.key(0), model)
    shapes = tensors_of(model, jax.eval_shape(add, params))  # nothing is made for a file that doesn't fit
    peft_tensors.check(folder, _slots(method, shapes), model, params, saved)
    params = add(params)
    return peft_tensors.fill(folder / WEIGHTS, params, _slots(method, tensors_of(model, params))), method


def kernels_of(every: list[Entry]) -> list[Entry]:
    """Returns the entries that can have a LoRA: linear layers, and embeddings."""
    return [entry for entry in every if entry.path.endswith((f"/{KERNEL}", f"/{EMBEDDING}"))]


def place(entry: Entry) -> str:
    """Returns our name of the module that holds a tensor: layers/3/attention/q_proj."""
    return entry.path.rpartition("/")[0]


def _slots(method: LoRA, every: list[Entry]) -> list[Slot]:
    """What an adapter's file holds: the low-rank leaves, what trains whole, and biases."""
    adapted = nodes_of(every, LoRAKernel, method.is_target)
    found = [
        peft_tensors.matrix(PREFIX + keys[entry.path.endswith(EMBEDDING)].format(module=entry.module), entry, field)
        for entry in adapted
        for field, keys in _KEYS.items()
        if getattr(entry.leaf.value, field) is not None
    ]
    modules = {entry.module for entry in adapted}
    saved = _saved(method, every)
    for entry in every:
        if method.is_target(entry.path):
            continue
        if module_of(entry) in saved:
            found.append(peft_tensors.whole(PREFIX + entry.name, entry))
    others = [entry for entry in every if not method.is_target(entry.path) and module_of(entry) not in saved]
    return found + peft_tensors.biases(others, method.trains_whole, modules)


def _saved(method: LoRA, every: list[Entry]) -> set[str]:
    """The modules that train whole."""
    return {
        module_of(entry)
        for entry in every
        if not method.is_target(entry.path) and first_match(method.modules_to_save, entry.path) is not None
    }


def _reader(slot: Slot) -> Callable[[], np.ndarray]:
    """What gives a tensor of the file; of a LoRA that took a part of the base, what it started from too, taken off."""
    starts = {"lora_a": "start_a", "lora_b": "start_b"}
    if slot.field not in starts or slot.entry.leaf.value.start_a is None:
        return slot.read
    start = peft_tensors.matrix(slot.key, slot.entry, starts[slot.field])
    if slot.field == "lora_a":
        return lambda: np.concatenate([slot.read(), start.read()], axis=0)
    return lambda: np.concatenate([slot.read(), -start.read()], axis=1)


def _part(entry: Entry, field: str) -> jax.Array:
    value = getattr(entry.leaf.value, field)
    return value if entry.index is None else value[entry.index]


def _check_made_by(method: LoRA, entry: Entry) -> None:
    scale, rank = np.float32(method.scale_of(entry.path)), entry.leaf.value.lora_a.shape[-1]
    if rank != method.rank_of(entry.path) or not np.isclose(_part(entry, "scale"), scale, rtol=1e-6):
        raise UserError(
            f"{entry.path} has rank {rank} and scale {float(_part(entry, 'scale')):g}; this method gives it rank "
            f"{method.rank_of(entry.path)} and scale {scale:g}. Pass the method that made the parameters."
        )
    for option, field in (("dora", "magnitude"), ("lora_bias", "lora_bias")):
        if getattr(method, option) != (getattr(entry.leaf.value, field) is not None):
            raise UserError(f"{entry.path} and this method differ in {option}. Pass the method that made the parameters.")


def _config(method: LoRA, every: list[Entry], adapted: list[Entry]) -> dict[str, Any]:
    saved, modules = _saved(method, every), [entry.module for entry in adapted]
    peft_saved.check_head(every, saved)
    peft_saved.check_apart(module for module in modules if module in saved)
    twice = 1 if adapted[0].leaf.value.start_a is None else 2
    grown = twice**0.5 if method.rslora else twice  # of alpha, so that the scale stays
    ranks = {entry.module: twice * method.rank_of(entry.path) for entry in adapted}
    alphas = {entry.module: grown * method.alpha_of(entry.path) for entry in adapted}
    rank, alpha = twice * method.rank, grown * method.alpha
    return peft_lora_config.DEFAULTS | {
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_bias": method.lora_bias,
        "lora_dropout": method.dropout,
        "fan_in_fan_out": is_conv1d(adapted),
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "init_lora_weights": method.start if method.start == "gaussian" else True,
        "bias": method.bias,
        "modules_to_save": peft_saved.names(saved, map(module_of, every)),
        "rank_pattern": peft_lora_config.summarize({name: found for name, found in ranks.items() if found != rank}, modules, "."),
        "alpha_pattern": peft_lora_config.summarize({name: _number(a) for name, a in alphas.items() if a != alpha}, modules, "."),
        "target_modules": sorted(
            peft_lora_config.summarize(dict.fromkeys(modules, True), [entry.module for entry in kernels_of(every)], ".")
        ),
    }


def _number(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _method(config: dict[str, Any], every: list[Entry], chosen: set[str], where: str) -> LoRA:
    """The LoRA of a configuration, its patterns over our names."""
    kernels = kernels_of(every)
    rank, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    adapted = [entry for entry in kernels if entry.module in chosen]
    names = [place(entry) for entry in adapted]
    ranks = {place(e): peft_lora_config.pattern_value(config.get("rank_pattern") or {}, e.module, rank) for e in adapted}
    alphas = {place(e): float(peft_lora_config.pattern_value(config.get("alpha_pattern") or {}, e.module, alpha)) for e in adapted}
    saved = peft_lora_config.saved_modules(config, dict.fromkeys(module_of(entry) for entry in every), where)
    whole = dict.fromkeys([place(entry) for entry in every if module_of(entry) in saved], True)
    start = config.get("init_lora_weights", True)
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=tuple(peft_lora_config.summarize(dict.fromkeys(names, True), [place(entry) for entry in kernels], "/")),
        rslora=bool(config.get("use_rslora")),
        rank_pattern=tuple(peft_lora_config.summarize({name: r for name, r in ranks.items() if r != rank}, names, "/").items()),
        alpha_pattern=tuple(peft_lora_config.summarize({name: a for name, a in alphas.items() if a != alpha}, names, "/").items()),
        dora=bool(config.get("use_dora")),
        start=start if start in peft_lora_config.OUR_STARTS else "default",
        lora_bias=bool(config.get("lora_bias")),
        bias=config.get("bias") or "none",
        modules_to_save=tuple(peft_lora_config.summarize(whole, [place(entry) for entry in every], "/")),
    )
