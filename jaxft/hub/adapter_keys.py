"""What kind of value each key of somebody's adapter_config.json has: one table a library, checked before anything is read of it."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from jaxft.errors import UserError

_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Kind:
    """What values a key may have."""

    words: str  # for a message
    holds: Callable[[Any], bool]
    expressions: Callable[[Any], Iterable[str]] = lambda value: ()  # which parts of a value are regular expressions

    def __or__(self, other: "Kind") -> "Kind":
        """Returns the kind of values that are of either."""
        return Kind(
            f"{self.words}, or {other.words}",
            lambda value: self.holds(value) or other.holds(value),
            lambda value: (self if self.holds(value) else other).expressions(value),
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _whole_from(least: int) -> Kind:
    return Kind(f"a whole number, {least} or more", lambda value: _is_whole(value) and value >= least)


def _list_of(inner: Kind, words: str) -> Kind:
    return Kind(f"a list of {words}", lambda value: isinstance(value, list) and all(map(inner.holds, value)))


def _object_of(inner: Kind, words: str, expressions: bool = True) -> Kind:
    """An object; its keys are regular expressions where nothing else is said."""
    return Kind(
        f"an object of {words}",
        lambda value: isinstance(value, dict) and all(map(inner.holds, value.values())),
        lambda value: value if expressions else (),
    )


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


TEXT = Kind("text", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NATURAL, POSITIVE = _whole_from(0), _whole_from(1)
NUMBER = Kind("a number", _is_number)
NOT_0 = Kind("a number that isn't 0", lambda value: _is_number(value) and value != 0)
ABOVE_0 = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
FROM_0 = Kind("a number, 0 or more", lambda value: _is_number(value) and value >= 0)
INSIDE = Kind("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)
RATE = Kind("a rate from 0 up to, not including, 1", lambda value: _is_number(value) and 0 <= value < 1)
NULL = Kind("null", lambda value: value is None)
EXPRESSION = Kind("an expression", TEXT.holds, lambda value: (value,))
NAMES = _list_of(TEXT, "names")
MODULES = EXPRESSION | NAMES | NULL

PEFT: dict[str, Kind] = {
    "alpha_pattern": _object_of(ABOVE_0, "numbers above 0") | NULL,
    "beta1": INSIDE,
    "beta2": INSIDE,
    "bias": _one_of("none", "all", "lora_only", "vera_only") | NULL,
    "d_initial": NUMBER,
    "deltaT": POSITIVE,
    "encoder_hidden_size": POSITIVE | NULL,
    "encoder_num_layers": POSITIVE | NULL,
    "encoder_reparameterization_type": TEXT | NULL,
    "exclude_modules": MODULES,
    "fan_in_fan_out": SWITCH | NULL,
    "feedforward_modules": MODULES,
    "init_lora_weights": SWITCH | TEXT,
    "init_r": POSITIVE,
    "layers_pattern": EXPRESSION | Kind("a list of expressions", NAMES.holds, lambda value: value) | NULL,
    "layers_to_transform": NATURAL | _list_of(NATURAL, "whole numbers") | NULL,
    "lora_alpha": ABOVE_0,
    "lora_bias": SWITCH | NULL,
    "lora_dropout": RATE | NULL,
    "modules_to_save": NAMES | NULL,
    "num_virtual_tokens": POSITIVE,
    "orth_reg_weight": FROM_0,
    "peft_type": TEXT,
    "prefix_projection": SWITCH | NULL,
    "projection_prng_key": Kind(f"a whole number from 0 up to {_SEEDS}", lambda value: _is_whole(value) and 0 <= value < _SEEDS),
    "prompt_tuning_init": TEXT | NULL,
    "r": POSITIVE,
    "rank_pattern": _object_of(POSITIVE | _list_of(SWITCH, "true and false"), "ranks, or of what AdaLoRA kept") | NULL,
    "target_modules": MODULES,
    "target_r": POSITIVE,
    "task_type": TEXT | NULL,
    "tfinal": NATURAL | NULL,
    "tinit": NATURAL | NULL,
    "total_step": NATURAL | NULL,
    "use_dora": SWITCH | NULL,
    "save_projection": SWITCH,
    "use_rslora": SWITCH | NULL,
    "vera_dropout": RATE | NULL,
}
ADAPTERHUB: dict[str, Kind] = {
    "dropout": RATE | NULL,
    "init_weights": TEXT,
    "is_parallel": SWITCH | NULL,
    "leave_out": _list_of(NATURAL, "layers") | NULL,
    "mh_adapter": SWITCH,
    "non_linearity": TEXT,
    "original_ln_after": SWITCH,
    "original_ln_before": SWITCH,
    "output_adapter": SWITCH,
    "reduction_factor": ABOVE_0 | _object_of(ABOVE_0, "numbers above 0, with layers as keys", expressions=False),
    "residual_before_ln": SWITCH | TEXT,
    "scaling": NOT_0 | _one_of("learned", "channel"),
}


def check(config: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, needed: Collection[str] = ()) -> None:
    """Raises `UserError` for a key of `needed` that a configuration lacks, and for a value that isn't of its key's kind.

    >>> check({"r": 8, "target_modules": ["q_proj"]}, PEFT, "adapter_config.json")
    """
    for key in needed:
        if key not in config:
            raise UserError(f"{where} has no '{key}': it is {kinds[key].words}.")
    for key, value in config.items():
        if key not in kinds:
            continue
        if not kinds[key].holds(value):
            raise UserError(f"{where}: {key} is {value!r}; it has to be {kinds[key].words}.")
        for expression in kinds[key].expressions(value):
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{where}: {key}: '{expression}' is no regular expression: {error}.") from error
