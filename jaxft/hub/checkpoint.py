"""A Hugging Face folder of safetensors, one file or sharded, read a tensor at a time."""

import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import safetensors
import transformers

from jaxft.errors import UserError, given_path
from jaxft.hub import bitsandbytes_config
from jaxft.hub.sources import GGUF_SUFFIX, PICKLE_SUFFIXES, Source, pickle_refusal
from jaxft.models.registry import described, family_of, known_classes

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
QUANTIZATION = "quantization_config"  # the key of config.json
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that weights have where they aren't quantized


class Checkpoint(Protocol):
    """A pre-trained model as it lies on disk, under Hugging Face's names and in its layout."""

    config: Mapping[str, Any]  # config.json, complete; generation_config.json under "generation_config"; none of quantization
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, in the file's floating type."""


class SafetensorsFolder:
    """A folder of config.json and safetensors."""

    def __init__(self, source: Source, types: Collection[str] = FLOATS) -> None:
        """Reads the configuration and every file's header; raises `UserError` for what is missing, broken, or of other `types`."""
        self.config = read_config(source)
        ignored = family_of(self.config["architectures"][0]).module.HF_IGNORED
        self._files: dict[str, pathlib.Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, names in _weight_files(source).items():
            shapes = header(path, types, ignored)
            for name in names or shapes:
                if name not in shapes and not _any_matches(ignored, name):
                    raise UserError(f"{path.parent / INDEX} says that {path.name} holds '{name}'; it doesn't. Download the model again.")
            self._files |= dict.fromkeys(shapes, path)
            self.shapes |= shapes

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor. The file is opened for it alone, so that no pages of it stay mapped."""
        with safetensors.safe_open(self._files[name], framework="numpy") as file:
            return file.get_tensor(name)


def header(path: pathlib.Path, types: Collection[str] = FLOATS, ignored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in a safetensors file but those whose names the patterns `ignored` match.

    Raises `UserError` for a broken file or weights of other `types`.
    """
    shapes = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if _any_matches(ignored, name):
                    continue
                part = file.get_slice(name)
                if part.get_dtype() not in types:
                    raise UserError(f"{path}: '{name}' is stored as {part.get_dtype()}; jaxft reads {', '.join(types)}.")
                shapes[name] = tuple(part.get_shape())
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}, which the model's index names. Download the model again.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}). Download or export it again.") from error
    return shapes


def _any_matches(patterns: Collection[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises `UserError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """Returns the one architecture that a config.json names; raises `UserError` where it names none or one that jaxft hasn't."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        known = known_classes(config.get("model_type"))
        raise UserError(
            f"{where} names {names or 'no architecture'} under 'architectures'; one is expected. Write the class whose weights the files "
            f'hold, as "architectures": ["{known[0]}"]{", or one of " + ", ".join(known[1:]) if known[1:] else ""}.'
        )
    family_of(names[0])
    return names[0]


def complete_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a config.json with the defaults that transformers' class for it adds; raises `UserError` where it doesn't take it."""
    if not config.get("model_type"):
        kind = described(config["architectures"][0]).model_type
        raise UserError(f'{where} has no model_type, by which transformers reads it. Write into it "model_type": "{kind}".')
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        complete = transformers.AutoConfig.for_model(config["model_type"], **fields)
    except Exception as error:  # whatever transformers' checks raise, the file is at fault
        raise UserError(f"{where} isn't a configuration that transformers reads: {type(error).__name__}: {error}") from error
    for name in _SIZES:
        if (size := getattr(complete, name, 1)) is not None and not (isinstance(size, int) and size >= 1):
            raise UserError(f"{where}: {name} is a whole number from 1 on, not {size!r}.")
    found: dict[str, Any] = complete.to_dict()
    return found


def read_config(source: Source) -> dict[str, Any]:
    """Returns a folder's config.json, complete, with its generation_config.json; raises `UserError` for what jaxft doesn't read."""
    path = source.folder / CONFIG
    if not path.exists():
        raise _no_config(source)
    raw = read_json(path)
    architecture_of(raw, str(path))
    quantization = raw.pop(QUANTIZATION, None)
    config = complete_config(raw, str(path))
    if quantization:
        bitsandbytes_config.check(quantization, source.name, str(path))
        config[QUANTIZATION] = quantization
    if (generation := source.folder / GENERATION_CONFIG).exists():
        config["generation_config"] = read_json(generation)
    return config


def _no_config(source: Source) -> UserError:
    if (source.folder / ADAPTER_CONFIG).exists():
        base = read_json(source.folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "not named in it"
        return UserError(
            f"'{source.name}' is an adapter, not a model. Load its base model ({base}), "
            "then the adapter: jaxft.load_adapter(folder, model, params)."
        )
    if not given_path(source.name).is_dir():
        return UserError(
            f"'{source.name}' has no {CONFIG} on the hub: it is no model of transformers. If its files are GGUF, download one "
            f"(hf download {source.name} FILE{GGUF_SUFFIX} --local-dir FOLDER) and pass its path."
        )
    ggufs = sorted(path.name for path in source.folder.glob(f"*{GGUF_SUFFIX}"))
    hint = f" Pass one of its GGUF files: {', '.join(ggufs)}." if ggufs else ""
    return UserError(f"'{source.name}' has no {CONFIG}: it is no Hugging Face model folder.{hint}")


def _weight_files(source: Source) -> dict[pathlib.Path, list[str]]:
    """Returns each file, with the tensors that the index says it holds."""
    folder = source.folder
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{folder / INDEX} has no 'weight_map'. Download the model again.")
        files: dict[pathlib.Path, list[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file or file in ("", ".."):
                raise UserError(f"{folder / INDEX} puts '{name}' into {file!r}, a file outside of its folder, or none. Download it again.")
            files.setdefault(folder / file, []).append(name)
        return files
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: []}
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise pickle_refusal(f"'{source.name}'", folder / CONFIG)
    raise UserError(
        f"'{source.name}' has no {WEIGHTS}. jaxft reads safetensors and GGUF; a hub model that offers neither but pickle files can be "
        "converted with transformers, from_pretrained(...).save_pretrained(FOLDER)."
    )
