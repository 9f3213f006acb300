"""What adapter_config.json has for every kind of adapter: which keys jaxft honours, what it refuses."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.hub.peft_lora_config import VERSION, summarize

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": VERSION,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}
# What changes nothing in what an adapter that is written already computes.
_WITHOUT_EFFECT = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})
_TARGETS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})


def check(config: Mapping[str, Any], defaults: Mapping[str, Any], honoured: Iterable[str], where: str) -> None:
    """Raises `UserError` for a configuration with an option that jaxft doesn't have, naming the key.

    Args:
      config: of adapter_config.json.
      defaults: peft's value of every key of this kind.
      honoured: which of them jaxft has, beside those that choose modules; their values are checked by who reads them.
      where: the file.

    A key that jaxft doesn't know passes where its value is off (null, false, empty): newer versions of peft write such.
    """
    passed = {"peft_type", "task_type", *honoured, *_WITHOUT_EFFECT, *(_TARGETS & set(defaults))}
    for key, value in config.items():
        if key in passed or (key in defaults and value == defaults[key]) or not value:
            continue
        if key in defaults:
            raise UserError(f"{where}: {key} is {value!r}, which jaxft doesn't have; it reads adapters whose {key} is {defaults[key]!r}.")
        raise UserError(f"{where} has a key that jaxft doesn't know, '{key}'.{nearest(key, defaults)}")
    if not config.get("target_modules"):
        raise UserError(f"{where} has no target_modules.")


def patterns(names: Iterable[str], every: Iterable[str], separator: str) -> list[str]:
    """Returns patterns that choose `names` among `every`, sorted.

    >>> patterns(["a.q", "b.q", "a.k"], ["a.q", "b.q", "a.k", "b.k"], ".")
    ['a.k', 'q']
    """
    return sorted(summarize(dict.fromkeys(names, True), list(every), separator))
