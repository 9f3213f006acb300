"""Norm tuning as PEFT writes and reads it: LN_TUNING."""

import pathlib
from collections.abc import Collection
from typing import Any

import jax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_config, peft_leaves, peft_lora_config
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import Entry, tensors_of
from jaxft.hub.peft_format import PREFIX, Params, Written
from jaxft.hub.peft_leaves import Place
from jaxft.methods.norm_tuning import NormTuning, is_norm

METHOD = NormTuning
PEFT_TYPE = "LN_TUNING"
DEFAULTS = peft_config.COMMON | {"exclude_modules": None, "peft_type": PEFT_TYPE}
_KEY = PREFIX + "{module}.ln_tuning_layers.{field}"


def write(model: nn.Module, params: Params, method: NormTuning) -> Written:
    """Returns the configuration and the tensors of tuned norms."""
    norms = _norms(model, params)
    tuned = [entry for entry in norms if method.trains(entry.path)]
    if not tuned:
        raise UserError("This method chooses none of these parameters' norms. Pass the method that made them.")
    modules = list(dict.fromkeys(map(_module, tuned)))
    targets = peft_config.patterns(modules, dict.fromkeys(map(_module, norms)), ".")
    return Written(DEFAULTS | {"target_modules": targets}, peft_leaves.tensors(map(_place, tuned)))


def read(
    folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
) -> tuple[Params, NormTuning]:
    """Returns `params` with a folder's norms, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_config.check(config, DEFAULTS, (), where)
    norms = _norms(model, params)
    modules = list(dict.fromkeys(map(_module, norms)))
    chosen = set(peft_lora_config.targets(config, modules, where, "norms", saved=saved))
    every = dict.fromkeys(map(_name, norms))
    method = NormTuning(tuple(peft_config.patterns([_name(entry) for entry in norms if _module(entry) in chosen], every, "/")))
    params = method.init(jax.random.key(0), model, params)
    places = [_place(entry) for entry in _norms(model, params) if _module(entry) in chosen]
    return peft_leaves.read(folder, params, places, peft_leaves.held(folder, model, params, saved)), method


def _norms(model: nn.Module, params: Params) -> list[Entry]:
    return [entry for entry in tensors_of(model, params) if is_norm(entry.path)]


def _module(entry: Entry) -> str:
    return entry.name.rpartition(".")[0]


def _name(entry: Entry) -> str:
    """layers/3/input_norm"""
    return entry.path.rpartition("/")[0]


def _place(entry: Entry) -> Place:
    field = entry.name.rpartition(".")[2]
    return Place(_KEY.format(module=_module(entry), field=field), entry.leaf, entry.index, entry.shape)
