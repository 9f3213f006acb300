"""Llama 2 as it is published, for plans where the hub's own files, which are gated, can't be had."""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxft import console
from jaxft.config import ModelConfig
from jaxft.errors import OutOfReachError
from jaxft.hub import sources
from jaxft.hub.checkpoint import CONFIG

_LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# Touvron et al. 2023 (arXiv:2307.09288) and the models' pages, https://huggingface.co/meta-llama/Llama-2-7b-hf and its neighbours.
_SIZES = {"7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824), "70b": (8192, 80, 64, 8, 28672)}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"meta-llama/Llama-2-{name}{kind}-hf": _LLAMA_2 | dict(zip(_NAMES, sizes, strict=True))
    for name, sizes in _SIZES.items()
    for kind in ("", "-chat")
}


@contextlib.contextmanager
def with_shapes(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yields a model whose configuration can be read: itself, or, where the hub's can't be had, a folder with the published one, if known.

    >>> with with_shapes(ModelConfig(source="bundled:minilm-l6")) as model:
    ...     model.source
    'bundled:minilm-l6'
    """
    if model.source not in CONFIGURATIONS or _is_here(model):
        yield model
        return
    console.say(f"The files of {model.source} aren't here; shapes are those of its published configuration.\n")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / CONFIG).write_text(json.dumps(CONFIGURATIONS[model.source]), encoding="utf-8")
        yield dataclasses.replace(model, source=folder)


def _is_here(model: ModelConfig) -> bool:
    """Whether the configuration is in a folder of the source's name, or in the hub's cache now."""
    if pathlib.Path(model.source).is_dir():
        return True
    try:
        found = sources.find(model.source, model.revision, sources.CONFIG_FILES)
    except OutOfReachError:
        return False
    return (found.folder / CONFIG).exists()  # of a hub that can't be reached the cache may have other files alone
