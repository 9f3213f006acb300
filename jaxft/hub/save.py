"""A model as a Hugging Face folder that transformers loads."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import numpy as np
import transformers
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import folder as folders
from jaxft.hub.checkpoint import CONFIG, GENERATION_CONFIG, INDEX
from jaxft.hub.names import Entry, entries
from jaxft.models import segments
from jaxft.models.node import is_node
from jaxft.models.registry import family_of

Params = dict[str, Any]
CARD = "README.md"
_SHARDS = "model{suffix}.safetensors"
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARD = """---
library_name: transformers
---
A model written by jaxft. `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)` loads it.
"""


def save_pretrained(
    folder: str | pathlib.Path, model: nn.Module, params: Params, tokenizer: Any = None, card: str = "", max_shard_size: str = "5GB"
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Every tensor is written in the type it is held in, and read back and compared before the folder takes its place.

    Args:
      folder: where; what is there is replaced if jaxft wrote it.
      model: as `load_pretrained` gives it.
      params: plain arrays; a method is merged first.
      tokenizer: of transformers; its files and chat template are written too.
      card: README.md, Markdown; empty is a short one.
      max_shard_size: of one safetensors file.

    Raises:
      UserError: `params` hold a method, or a folder that isn't ours, or can't be written.
    """
    held = sorted({type(leaf.value).__name__ for leaf in segments.leaves(params, is_leaf=is_node) if is_node(leaf.value)})
    if held:
        raise UserError(
            f"These parameters hold {' and '.join(held)}, which a Hugging Face model folder can't. Fold it in first: "
            "params = method.merge(model, params). Or write the adapter alone: jaxft.save_adapter(folder, model, params, method)."
        )
    tensors = {entry.name: entry for entry in entries(family_of(model.config.architecture).module, params)}
    with folders.written(pathlib.Path(folder).expanduser(), "model") as temporary:
        _write_weights(temporary, tensors, max_shard_size)
        widest = max((np.dtype(entry.leaf.value.dtype) for entry in tensors.values()), key=lambda dtype: dtype.itemsize)
        _write_config(temporary, model.config, widest)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / CARD).write_text(card or _CARD, encoding="utf-8")


def _write_weights(temporary: pathlib.Path, tensors: dict[str, Entry], max_shard_size: str) -> None:
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=_bytes, filename_pattern=_SHARDS, max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        folders.write_tensors(temporary / file, {name: _reader(tensors[name]) for name in names})
    if plan.is_sharded:
        folders.write_json(temporary / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _bytes(entry: Entry) -> int:
    return int(np.prod(entry.shape)) * np.dtype(entry.leaf.value.dtype).itemsize


def _reader(entry: Entry) -> Callable[[], np.ndarray]:
    """What gives a tensor in their layout, from the device."""

    def read() -> np.ndarray:
        value = entry.leaf.value if entry.index is None else entry.leaf.value[entry.index]
        return entry.swap(np.asarray(jax.device_get(value)))

    return read


def _write_config(temporary: pathlib.Path, config: Any, dtype: np.dtype) -> None:
    hf = json.loads(config.hf)
    generation = hf.pop("generation_config", None)
    if generation is None:
        generation = {name: hf[name] for name in _GENERATION_KEYS if hf.get(name) is not None} | {"_from_model_config": True}
    hf |= {"architectures": [config.architecture], "dtype": dtype.name, "transformers_version": transformers.__version__}
    folders.write_json(temporary / CONFIG, transformers.AutoConfig.for_model(hf.pop("model_type"), **hf).to_diff_dict())
    folders.write_json(temporary / GENERATION_CONFIG, generation | {"transformers_version": transformers.__version__})
