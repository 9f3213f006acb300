"""jaxft fine-tunes pre-trained language models in JAX."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft import methods
    from jaxft.hub.load import OriginalKernels, load_pretrained
    from jaxft.hub.peft import load_adapter, save_adapter
    from jaxft.hub.quantized import quantized
    from jaxft.hub.save import save_pretrained
    from jaxft.hub.tokenizer import load_tokenizer
    from jaxft.methods.partition import combine, partition
    from jaxft.quant.blockwise import Format

# On CPU, XLA's newest library of float32 products rounds four times as much as the one before it, at the same speed: logits of
# SmolLM2 are off by 1.5e-4 instead of 4e-5. XLA reads this when it starts, after this import.
if "ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type=".strip()

__version__ = "0.1.0"
__all__ = [
    "Format",
    "OriginalKernels",
    "combine",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "methods",
    "partition",
    "quantized",
    "save_adapter",
    "save_pretrained",
]

# Imported when first asked for: the command line answers a mistyped flag without waiting for jax and transformers.
_HOMES = {
    "Format": "jaxft.quant.blockwise",
    "OriginalKernels": "jaxft.hub.load",
    "combine": "jaxft.methods.partition",
    "load_adapter": "jaxft.hub.peft",
    "load_pretrained": "jaxft.hub.load",
    "load_tokenizer": "jaxft.hub.tokenizer",
    "partition": "jaxft.methods.partition",
    "quantized": "jaxft.hub.quantized",
    "save_adapter": "jaxft.hub.peft",
    "save_pretrained": "jaxft.hub.save",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("jaxft.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxft' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
