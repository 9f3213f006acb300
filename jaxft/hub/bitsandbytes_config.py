"""config.json's quantization_config, as transformers writes it for bitsandbytes: what it says, and what jaxft takes of it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.quant.blockwise import Format

CODES = ("nf4", "fp4")  # of 4 bits, that bitsandbytes has
BLOCK_SIZE = 64  # where the configuration is all that is known: transformers makes no other
_DEFAULTS: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
_HEAD = "lm_head"  # what transformers leaves dense where the configuration names nothing


def check(config: Any, name: str, where: str) -> None:
    """Raises `UserError` for a quantization that jaxft doesn't read, naming what it is.

    Args:
      config: the value of quantization_config.
      name: the model, for messages.
      where: its config.json.
    """
    instead = "Pass the model in full precision, 4-bit weights of bitsandbytes, or a GGUF file."
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: quantization_config is {config!r}, which is no object. {instead}")
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config or "load_in_8bit" in config else "of an unnamed kind")
    if method != "bitsandbytes":
        raise UserError(f"'{name}' is quantized ({method}), which jaxft doesn't read. {instead}")
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        raise UserError(f"'{name}' holds 8-bit weights of bitsandbytes (LLM.int8), which jaxft doesn't read. {instead}")
    if not config.get("load_in_4bit", config.get("_load_in_4bit")):
        raise UserError(f"{where}: quantization_config says neither load_in_4bit nor load_in_8bit. {instead}")
    if unknown := sorted(set(config) - set(_DEFAULTS)):
        raise UserError(f"{where}: quantization_config has a key that jaxft doesn't know, '{unknown[0]}'.{nearest(unknown[0], _DEFAULTS)}")
    if (code := config.get("bnb_4bit_quant_type", "fp4")) not in CODES:
        raise UserError(f"{where}: bnb_4bit_quant_type is {code!r}; bitsandbytes has {' and '.join(CODES)}.")
    if (storage := config.get("bnb_4bit_quant_storage") or "uint8") not in ("uint8", "torch.uint8"):
        raise UserError(
            f"{where}: bnb_4bit_quant_storage is {storage!r}; jaxft reads uint8. Save the model again with that, or pass the original."
        )
    skipped = config.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(module, str) for module in skipped)):
        raise UserError(f"{where}: llm_int8_skip_modules is {skipped!r}, not a list of names.")


def check_code(code: str) -> None:
    """Raises `UserError` for a code book that bitsandbytes' 4-bit folders don't hold; a model that isn't quantized has "none"."""
    if code not in (*CODES, "none"):
        raise UserError(f"bitsandbytes' 4-bit folders hold {' and '.join(CODES)}; this model is in {code}. Write it whole: format hf.")


def format_of(config: Mapping[str, Any], block_size: int = BLOCK_SIZE) -> Format:
    """Returns the format that a quantization_config names; it says nothing of the size of blocks."""
    return Format(config.get("bnb_4bit_quant_type", "fp4"), block_size, bool(config.get("bnb_4bit_use_double_quant")))


def is_converted(config: Mapping[str, Any], module: str) -> bool:
    """Returns whether transformers quantizes the linear layer `module` (model.layers.0.mlp.up_proj).

    A name to skip is an expression that matches from the start up to the end of a part, or the end of the module's name.
    """
    skipped = config.get("llm_int8_skip_modules")
    for name in [_HEAD] if skipped is None else skipped:
        if module.endswith(name):
            return False
        try:
            if re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", module):
                return False
        except re.error:
            continue
    return True


def written(formats: Iterable[Format], dtype: str, dense: Iterable[str]) -> dict[str, Any]:
    """Returns the quantization_config of a folder.

    Args:
      formats: of its quantized weights; `UserError` is raised where bitsandbytes has no such, or not all at once.
      dtype: that the model computes in.
      dense: names of the linear layers that aren't quantized.
    """
    kinds = sorted({(format.code, format.double_quantization) for format in formats})
    for code, _ in kinds:
        check_code(code)
    if len(kinds) != 1:
        raise UserError("A bitsandbytes folder is of one code book, with double quantization or without; this model's kernels differ.")
    (code, double), *_ = kinds
    return _DEFAULTS | {
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_type": code,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_skip_modules": sorted(dense),
    }
