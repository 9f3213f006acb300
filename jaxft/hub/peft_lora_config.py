"""PEFT's adapter_config.json for LoRA: which of its keys jaxft honours, and which modules, ranks and alphas it means."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.hub.peft_format import saved_by

VERSION = "0.21.2"  # of peft, whose keys and defaults these are
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# peft sees itself which way a module holds its kernel, whatever fan_in_fan_out says
HONOURED = frozenset({"fan_in_fan_out", "r", "lora_alpha", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern"}) | frozenset(
    {"lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora", "bias", "modules_to_save"}
)
# What changes nothing in what an adapter that is written already computes.
_WITHOUT_EFFECT = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision"}) | (
    frozenset({"eva_config", "ensure_weight_tying", "qalora_group_size"})
)
OUR_STARTS = ("gaussian", "pissa", "olora")  # of init_lora_weights
_STARTS = (True, False, "eva", "orthogonal", *OUR_STARTS)  # the others change the base model too, by random or by data
ALL_LINEAR = "all-linear"
_LONGEST_TAIL = 2  # parts of a name in a pattern: mlp.c_proj


def check(
    config: Mapping[str, Any],
    where: str,
    peft_type: str = "LORA",
    defaults: Mapping[str, Any] = DEFAULTS,
    honoured: frozenset[str] = HONOURED,
) -> None:
    """Raises `UserError` for a configuration of `peft_type` with options that jaxft doesn't have, naming the key.

    A key that jaxft doesn't know passes where its value is off (null, false, empty): newer versions of peft write such.
    """
    if config.get("peft_type") != peft_type:
        raise UserError(f"{where}: peft_type is {config.get('peft_type')!r}, not {peft_type}.")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise UserError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base model by chance or by data. "
            "Save the adapter as plain LoRA (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )
    for key, value in config.items():
        if key in honoured | _WITHOUT_EFFECT | {"peft_type", "task_type", "init_lora_weights"} or value == defaults.get(key) or not value:
            continue
        if key in defaults:
            raise UserError(f"{where}: {key} is {value!r}, which jaxft doesn't have. It reads {key} {defaults[key]!r}.")
        raise UserError(f"{where} has a key that jaxft doesn't know, '{key}'.{nearest(key, defaults)}")
    if not config.get("target_modules"):
        raise UserError(f"{where} has no target_modules.")


def targets(
    config: Mapping[str, Any],
    modules: Iterable[str],
    where: str,
    kind: str = "linear layers",
    linear: Iterable[str] | None = None,
    saved: Collection[str] = (),
) -> list[str]:
    """Returns which of `modules`, a model's modules of one `kind`, a configuration chooses, as peft chooses them.

    What is trained whole is never chosen: `saved` modules, and those of the configuration's modules_to_save. `linear` are those of the
    modules that all-linear means; None is all.

    Raises `UserError` where it chooses none.
    """
    modules, wanted = list(modules), config["target_modules"]
    if linear is not None and isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        modules = [module for module in modules if module in set(linear)]
    whole = set(saved).union(*(covered(name, modules) for name in config.get("modules_to_save") or ()))
    modules = [module for module in modules if module not in whole]
    chosen = [module for module in modules if not _matches(config.get("exclude_modules"), module) and _is_target(config, module)]
    if not chosen:
        raise UserError(f"{where}: target_modules {config['target_modules']!r} choose none of the model's {kind}: {_kinds(modules)}.")
    return chosen


def saved_modules(config: Mapping[str, Any], modules: Iterable[str], where: str) -> set[str]:
    """Returns which of `modules` are trained whole: peft takes each that ends with one of the names, and all within it.

    Of the heads that it saves for a task, only some are a model's. Raises `UserError` for any other name that is no module's.
    """
    modules = list(modules)
    saved: set[str] = set()
    for name in config.get("modules_to_save") or ():
        found = covered(name, modules)
        if not found and name not in saved_by(config.get("task_type")):
            raise UserError(f"{where}: modules_to_save: no module is called '{name}'. There are: {_kinds(modules)}.")
        saved |= found
    return saved


def covered(name: str, modules: Iterable[str]) -> set[str]:
    """Returns the modules that a name of modules_to_save stands for: PEFT takes what ends with it, and all within.

    >>> sorted(covered("classifier", ["classifier.dense", "pre_classifier", "classifier_norm"]))
    ['classifier.dense', 'pre_classifier']
    """
    return {module for module in modules if any(outer.endswith(name) for outer in _and_outer(module))}


def _and_outer(module: str) -> list[str]:
    """The names of a module and of those around it.

    >>> _and_outer("model.norm")
    ['model', 'model.norm']
    """
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _kinds(modules: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", module) for module in modules))


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern for a module, as peft looks up rank_pattern and alpha_pattern.

    >>> pattern_value({"q_proj": 4}, "model.layers.0.self_attn.q_proj", 8)
    4
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def summarize(values: Mapping[str, Any], every: Iterable[str], separator: str) -> dict[str, Any]:
    """Returns patterns that give `values`: the last part of a name, or the last two, where all of `every` that end so have one value.

    Elsewhere they are whole names.

    >>> summarize({"a.q": 4, "b.q": 4, "a.k": 2}, ["a.q", "b.q", "a.k", "b.k"], ".")
    {'q': 4, 'a.k': 2}
    >>> summarize({"0.mlp.c": 4, "1.mlp.c": 4}, ["0.attn.c", "0.mlp.c", "1.attn.c", "1.mlp.c"], ".")
    {'mlp.c': 4}
    """
    return _summarize(values, list(every), separator, 1)


def _summarize(values: Mapping[str, Any], every: list[str], separator: str, parts: int) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for name in every:
        groups.setdefault(separator.join(name.split(separator)[-parts:]), []).append(name)
    patterns = {}
    for tail, names in groups.items():
        found = [values.get(name) for name in names]
        if found[0] is not None and all(value == found[0] for value in found) and not tail[0].isdecimal():  # "1.norm" says too little
            patterns[tail] = found[0]
        elif parts < _LONGEST_TAIL:
            patterns |= _summarize(values, names, separator, parts + 1)
        else:
            patterns |= {name: values[name] for name in names if name in values}
    return patterns


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    wanted = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return module != "lm_head"
    if not _matches(wanted, module):
        return False
    return isinstance(wanted, str) or module in wanted or _in_layers(config, module)


def _matches(wanted: Any, module: str) -> bool:
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[match.re.groups]) in ([layers] if isinstance(layers, int) else layers)
    return False
