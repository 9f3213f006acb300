"""(IA)^3 as PEFT writes and reads it."""

import pathlib
import re
from collections.abc import Collection
from typing import Any

import jax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_config, peft_leaves, peft_lora_config
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import Entry, is_conv1d, linear_layers, nodes_of
from jaxft.hub.peft_format import PREFIX, Params, Written
from jaxft.hub.peft_leaves import Place
from jaxft.methods.ia3 import IA3, Scaled, ScaledInput

METHOD = IA3
PEFT_TYPE = "IA3"
DEFAULTS = peft_config.COMMON | {
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": None,
    "init_ia3_weights": True,
    "peft_type": PEFT_TYPE,
}
_KEY = PREFIX + "{module}.ia3_l"  # (out, 1) on outputs, (1, in) on inputs


def write(model: nn.Module, params: Params, method: IA3) -> Written:
    """Returns the configuration and the vectors; raises `UserError` where `params` hold none."""
    linear = linear_layers(model, params)
    scaled = nodes_of(linear, Scaled, method.is_target)
    if not scaled:
        raise UserError("These parameters hold no IA3: params = method.init(rng, model, params) adds one.")
    every = [entry.module for entry in linear]
    feedforward = [entry.module for entry in scaled if isinstance(entry.leaf.value, ScaledInput)]
    outputs = [entry.module for entry in scaled if entry.module not in feedforward]
    # peft wants each feedforward module's pattern among the targets'
    inputs, others = peft_config.patterns(feedforward, every, "."), peft_config.patterns(outputs, every, ".")
    targets = {"feedforward_modules": inputs, "target_modules": sorted({*inputs, *others})}
    config = DEFAULTS | targets | {"fan_in_fan_out": is_conv1d(scaled)}
    return Written(config, {**peft_leaves.tensors(map(_place, scaled)), **peft_leaves.base_weights(scaled, targets["target_modules"])})


def read(folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()) -> tuple[Params, IA3]:
    """Returns `params` with a folder's vectors, and the method that gives the same structure."""
    where = str(folder / ADAPTER_CONFIG)
    peft_config.check(config, DEFAULTS, ("fan_in_fan_out", "feedforward_modules", "init_ia3_weights"), where)
    linear = linear_layers(model, params)
    chosen = set(peft_lora_config.targets(config, [entry.module for entry in linear], where, saved=saved))
    peft_leaves.check_free(linear, Scaled, chosen, METHOD.__name__)
    every = [entry.path.rpartition("/")[0] for entry in linear]
    names = {entry.module: name for entry, name in zip(linear, every, strict=True) if entry.module in chosen}
    inputs = [name for module, name in names.items() if _is_feedforward(config, module)]
    method = IA3(tuple(peft_config.patterns(names.values(), every, "/")), tuple(peft_config.patterns(inputs, names.values(), "/")))
    params = method.init(jax.random.key(0), model, params)
    scaled = nodes_of(linear_layers(model, params), Scaled, method.is_target)
    return peft_leaves.read(folder, params, map(_place, scaled), peft_leaves.held(folder, model, params, saved)), method


def _is_feedforward(config: dict[str, Any], module: str) -> bool:
    """As peft decides it: it looks at the end of the name, not at its parts."""
    wanted = config.get("feedforward_modules") or []
    return re.fullmatch(wanted, module) is not None if isinstance(wanted, str) else any(module.endswith(name) for name in wanted)


def _place(entry: Entry) -> Place:
    leaf = peft_leaves.field_of(entry, "scale")
    count = leaf.shape[0]
    shape = (1, count) if isinstance(entry.leaf.value, ScaledInput) else (count, 1)
    return Place(_KEY.format(module=entry.module), leaf, entry.index, shape)
