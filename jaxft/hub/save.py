"""A model as a Hugging Face folder that transformers loads."""

import copy
import dataclasses
import functools
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import numpy as np
import transformers
from flax import linen as nn

from jaxft.errors import UserError, UserNote, unknown
from jaxft.hub import bitsandbytes_config, bitsandbytes_folder
from jaxft.hub import folder as folders
from jaxft.hub.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, QUANTIZATION
from jaxft.hub.names import WEIGHT, Entry, tensors_of
from jaxft.methods.kernels import is_kernel
from jaxft.models import segments
from jaxft.models.heads import CAUSAL_LM, SEQUENCE_CLASSIFICATION, SUFFIXES, is_causal, is_language_model
from jaxft.models.node import is_node, is_quantized
from jaxft.models.registry import family_of

Params = dict[str, Any]
CARD = "README.md"
HF, BITSANDBYTES = "hf", "bitsandbytes"
FORMATS = (HF, BITSANDBYTES)
_SHARDS = "model{suffix}.safetensors"
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARD = """---
library_name: transformers
---
A model written by jaxft. `transformers.{auto}.from_pretrained(FOLDER)` loads it.
"""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the folder: its size, and what gives it."""

    bytes: int
    read: Callable[[], np.ndarray]


def save_pretrained(
    folder: str | pathlib.Path,
    model: nn.Module,
    params: Params,
    tokenizer: Any = None,
    card: str = "",
    max_shard_size: str = "5GB",
    format: str = HF,
) -> None:
    """Writes a folder that transformers' class of the model's task loads, `AutoModelForCausalLM.from_pretrained` and its like.

    Every tensor is written in the type it is held in, and read back and compared before the folder takes its place.

    Args:
      folder: where; what is there is replaced if jaxft wrote it.
      model: as `load_pretrained` gives it.
      params: arrays and quantized kernels; a method is merged first.
      tokenizer: of transformers; its files and chat template are written too.
      card: README.md, Markdown; empty is a short one.
      max_shard_size: of one safetensors file.
      format: hf writes quantized kernels dense, one after the other; bitsandbytes writes their codes, which transformers loads with it; of
        kernels that it can't compute with on a CPU that has AVX-512, rows that aren't whole blocks, a warning says so.

    Raises:
      UserError: `params` hold a method, or nothing that bitsandbytes has; a folder that isn't ours, or can't be written.
    """
    if format not in FORMATS:
        raise unknown("format of a model", format, FORMATS)
    held = sorted({type(leaf.value).__name__ for leaf in segments.leaves(params, is_leaf=is_node) if _is_method(leaf.value)})
    if held:
        raise UserError(
            f"These parameters hold {' and '.join(held)}, which a Hugging Face model folder can't. Fold it in first: "
            "params = method.merge(model, params). Or write the adapter alone: jaxft.save_adapter(folder, model, params, method)."
        )
    tokenizer = _with_padding(tokenizer, model)
    found = tensors_of(model, params)
    quantization = _quantization(model, found) if format == BITSANDBYTES else {}
    if quantization and (note := bitsandbytes_folder.note(found)):
        warnings.warn(note, UserNote, stacklevel=2)
    tensors: dict[str, _Tensor] = {}
    parts = functools.lru_cache(maxsize=1)(lambda number: bitsandbytes_folder.tensors_of(found[number]))  # read once for all of them
    for number, entry in enumerate(found):
        if format == BITSANDBYTES and is_quantized(entry.leaf.value):
            tensors |= {name: _Tensor(array.nbytes, _part(parts, number, name)) for name, array in parts(number).items()}
        else:
            tensors[entry.name] = _dense(entry)
    with folders.written(pathlib.Path(folder).expanduser(), "model") as temporary:
        _write_weights(temporary, tensors, max_shard_size)
        widest = max((np.dtype(entry.leaf.value.dtype) for entry in found), key=lambda dtype: dtype.itemsize)
        padding = tokenizer.pad_token_id if tokenizer is not None and is_causal(model) else None
        _write_config(temporary, model.config, widest, quantization, padding)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / CARD).write_text(card or _CARD.format(auto=auto_class(model.config.task)), encoding="utf-8")


def _with_padding(tokenizer: Any, model: nn.Module) -> Any:
    """The tokenizer of a classifier with a token to fill rows with, as training has it: transformers finds by it where each text ends."""
    if tokenizer is None or not is_causal(model) or model.task != SEQUENCE_CLASSIFICATION:
        return tokenizer
    if tokenizer.pad_token is not None or tokenizer.eos_token is None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    return own


def auto_class(task: str) -> str:
    """Returns transformers' class that loads any model of a task.

    >>> auto_class("causal_lm")
    'AutoModelForCausalLM'
    """
    return f"AutoModel{SUFFIXES[task]}"


def _is_method(value: Any) -> bool:
    return is_node(value) and not is_quantized(value)


def _quantization(model: nn.Module, found: list[Entry]) -> dict[str, Any]:
    """The quantization_config of a model; raises `UserError` where bitsandbytes has no such."""
    formats = [entry.leaf.value.format for entry in found if is_quantized(entry.leaf.value)]
    if not formats:
        raise UserError(
            "None of these parameters is quantized. Quantize them first: params = jaxft.quantized(params, Format()). "
            "Or write the model whole: format='hf'."
        )
    seconds = family_of(model.config.architecture).module.ALSO_NAMED.values()
    tied = {name.removesuffix(WEIGHT) for name in seconds if name.endswith(WEIGHT)} if is_language_model(model) else set()
    converted = {entry.module for entry in found if is_quantized(entry.leaf.value)}
    linear = {entry.module for entry in found if is_kernel(entry.leaf)}
    return bitsandbytes_config.written(
        formats, np.dtype(model.dtype).name, (linear | tied) - converted
    )  # a tied model's head is no tensor, and still a layer


def _write_weights(temporary: pathlib.Path, tensors: dict[str, _Tensor], max_shard_size: str) -> None:
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda tensor: tensor.bytes, filename_pattern=_SHARDS, max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        folders.write_tensors(temporary / file, {name: tensors[name].read for name in names})
    if plan.is_sharded:
        folders.write_json(temporary / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _dense(entry: Entry) -> _Tensor:
    """A tensor in their layout, from the device."""
    dtype = np.dtype(entry.leaf.value.dtype)

    def read() -> np.ndarray:
        value = entry.leaf.part(entry.index or 0)
        array = value.dense().astype(dtype) if is_quantized(value) else value
        return entry.swap(np.asarray(jax.device_get(array)))

    return _Tensor(int(np.prod(entry.shape)) * dtype.itemsize, read)


def _part(parts: Callable[[int], dict[str, np.ndarray]], number: int, name: str) -> Callable[[], np.ndarray]:
    return lambda: parts(number)[name]


def _write_config(temporary: pathlib.Path, config: Any, dtype: np.dtype, quantization: dict[str, Any], padding: int | None) -> None:
    """Writes config.json; `padding` is the token by which transformers finds the last one of a text to classify."""
    hf = json.loads(config.hf)
    if config.task == SEQUENCE_CLASSIFICATION and hf.get("pad_token_id") is None:
        hf["pad_token_id"] = padding
    generation = hf.pop("generation_config", None)
    if generation is None:
        generation = {name: hf[name] for name in _GENERATION_KEYS if hf.get(name) is not None} | {"_from_model_config": True}
    labels = {name: hf[name] for name in ("id2label", "label2id", "problem_type") if config.labels and hf.get(name)}
    hf |= {"architectures": [config.architecture], "dtype": dtype.name, "transformers_version": transformers.__version__}
    written = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf).to_diff_dict()
    folders.write_json(temporary / CONFIG, _rotary_keys(written) | labels | ({QUANTIZATION: quantization} if quantization else {}))
    if config.task == CAUSAL_LM:
        folders.write_json(temporary / GENERATION_CONFIG, generation | {"transformers_version": transformers.__version__})


def _rotary_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with the rotary embedding's keys of before transformers 5, which all of its versions read.

    An older one doesn't know rope_parameters: it would take its default base of 10,000 without a word.
    """
    if (rotary := config.get("rope_parameters")) is None:
        return config
    scaling = {name: value for name, value in rotary.items() if name != "rope_theta"}
    rest = {name: value for name, value in config.items() if name != "rope_parameters"}
    return rest | {"rope_theta": rotary["rope_theta"], "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
