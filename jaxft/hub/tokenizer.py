"""Tokenizers of any model source; those of GGUF files are converted once and kept on disk."""

import hashlib
import importlib.util
import os
import pathlib
import shutil
import tempfile
from typing import Any

import transformers

from jaxft.errors import AbsentError, OutOfReachError, UserError, given_path
from jaxft.hub import sources
from jaxft.hub.folder import is_of_the_disk
from jaxft.hub.gguf_file import metadata

_VERSION = 1  # of the cache's content: raise it when this code makes something else of the same file


def load_tokenizer(source: str, revision: str = "main") -> Any:
    """Returns the tokenizer of a model source, with its chat template, as transformers has it.

    A GGUF file's tokenizer takes seconds to convert; it is kept in `$JAXFT_CACHE`, or ~/.cache/jaxft, by the file's metadata.

    Args:
      source: hub id, local folder, `.gguf` file, or `bundled:NAME`.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: the source isn't there, or has no tokenizer.

    >>> load_tokenizer("bundled:smollm2-135m-instruct").encode("Hello")
    [19556]
    """
    found = sources.find(source, revision, sources.CONFIG_FILES + sources.TOKENIZER_FILES)
    if found.gguf:
        return _from_gguf(found.gguf)
    try:
        return _load(found.folder, found.name)
    except AbsentError as error:
        if given_path(found.name).is_dir() or any(path for pattern in sources.TOKENIZER_FILES for path in found.folder.glob(pattern)):
            raise
        raise OutOfReachError(str(error), f"files of {found.name}") from error  # the cache has others of its files alone


def _load(folder: pathlib.Path, name: str, **options: Any) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # whatever transformers raises, the files are at fault
        raise AbsentError(
            f"'{name}' has no tokenizer that transformers reads ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
            "A model folder needs tokenizer.json and tokenizer_config.json; those of its base model do."
        ) from error


def _from_gguf(path: pathlib.Path) -> Any:
    content = hashlib.sha256(metadata(path))
    content.update(f"{_VERSION} {transformers.__version__}".encode())
    cached = pathlib.Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "tokenizers" / content.hexdigest()
    if (cached / "tokenizer.json").exists():
        return _load(cached, str(path))
    if importlib.util.find_spec("torch") is None:  # transformers' reader of GGUF files imports it
        raise UserError(f"transformers reads the tokenizer of a GGUF file ({path}) only where torch is installed: pip install torch")
    converted = _load(path.parent, str(path), gguf_file=path.name)
    _keep(converted, cached)
    return converted


def _keep(converted: Any, cached: pathlib.Path) -> None:
    """Writes the tokenizer beside its place and renames it there, if what is read back is the same tokenizer."""
    temporary = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=cached.parent, prefix=".tokenizer-"))
        converted.save_pretrained(temporary)
        if _content(_load(temporary, str(cached))) == _content(converted):
            temporary.rename(cached)
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        if not (cached / "tokenizer.json").exists():  # another process may have been first
            raise UserError(f"The cache folder {cached.parent} can't be written ({error}). Set JAXFT_CACHE to another.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _content(tokenizer: Any) -> tuple[Any, ...]:
    """All that decides what a tokenizer gives."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return type(tokenizer), tokenizer.backend_tokenizer.to_str(), special, tokenizer.chat_template, tokenizer.padding_side
