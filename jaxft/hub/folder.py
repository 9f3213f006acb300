"""Folders that jaxft writes: beside their place, read back, then renamed into it; never over somebody else's files."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxft.errors import UserError
from jaxft.hub.checkpoint import read_json

MARKER = "jaxft.json"  # says that a folder is ours, and so may be replaced, and which files of it are
_KINDS = {"adapter": "an adapter", "model": "a model"}
_FORMAT = 1
_OLD = ".old"  # in the name of what is moved aside
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "os error 28",
    "os error 122",
    "os error 27",
    "no space left",
    "file too large",
)  # of safetensors, tensorstore


def check_replaceable(folder: pathlib.Path, kind: str = "") -> None:
    """Raises `UserError` where `folder` exists and is neither empty nor wholly ours, or is of another `kind`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is there and is no folder. Choose another one.")
    if not folder.exists() or not (found := sorted(path.name for path in folder.iterdir())):
        return
    if MARKER not in found:
        raise UserError(f"{folder} isn't empty, and jaxft didn't write it ({MARKER} is missing). Choose another folder, or empty it.")
    marker = read_json(folder / MARKER)
    held = marker.get("kind", kind)
    if kind and held != kind:
        raise UserError(f"{folder} holds {_KINDS.get(held, held)}, which {_KINDS[kind]} doesn't replace. Choose another folder.")
    if foreign := [name for name in found if name not in marker.get("files", found)]:
        raise UserError(f"{folder} holds files that jaxft didn't write: {', '.join(foreign)}. Move them, or choose another folder.")


@contextlib.contextmanager
def written(folder: pathlib.Path, kind: str) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, and renames it to `folder` when the block ends well; when it doesn't, nothing is left of it.

    What a process that was killed in such a block left is mended by the next one: what it wrote goes, what it moved aside comes back.

    Args:
      folder: where the files shall be; what is there is replaced if jaxft wrote it.
      kind: what the folder is, for its marker.

    Raises:
      UserError: the folder isn't ours, or can't be written, as on a full disk.
    """
    check_replaceable(folder, kind)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _mend(folder)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are their owner's alone
        with _locked(temporary):
            marker = {"format": _FORMAT, "kind": kind}
            write_json(temporary / MARKER, marker | {"files": []})
            yield temporary
            write_json(temporary / MARKER, marker | {"files": sorted(path.name for path in temporary.iterdir())})
            _put(temporary, folder, kind)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unwritten(folder, error) from error
    except Exception as error:
        if is_of_the_disk(error):
            raise _unwritten(folder, error) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def is_of_the_disk(error: Exception) -> bool:
    """Returns whether an error is one of reading or writing files; tokenizers raises those of its own as plain exceptions.

    >>> is_of_the_disk(OSError(28, "No space left")), is_of_the_disk(Exception("No space left on device (os error 28)"))
    (True, True)
    >>> is_of_the_disk(ValueError("another"))
    False
    """
    return isinstance(error, OSError) or (type(error) is Exception and "(os error " in str(error))


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: pathlib.Path, tensors: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Writes a safetensors file as torch's users expect it, and reads it back: each tensor must be there bit for bit.

    Args:
      path: the file.
      tensors: what gives each tensor. It is called once to write and once to compare, so that no copy is kept between.
    """
    safetensors.numpy.save_file({name: np.ascontiguousarray(get()) for name, get in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors' files are their owner's alone
    with safetensors.safe_open(path, framework="numpy") as file:
        if sorted(file.keys()) != sorted(tensors):
            raise OSError(f"{path.name} read back has other tensors than were written")
        for name, get in tensors.items():
            if not same_bits(file.get_tensor(name), get()):
                raise OSError(f"{path.name} read back has other numbers than were written, in {name}")


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays are the same to the bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return bool(np.array_equal(one, other))


def _put(temporary: pathlib.Path, folder: pathlib.Path, kind: str) -> None:
    """Renames a folder into place. What was there is moved aside first and put back if that fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    check_replaceable(folder, kind)
    aside = folder.with_name(f".{folder.name}{_OLD}{temporary.suffix}")
    with _locked(folder):
        folder.rename(aside)
        try:
            temporary.rename(folder)
        except BaseException:  # a signal too
            if not folder.exists():
                aside.rename(folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Gives whether nobody else holds the folder's lock, and holds it in the block; the system frees it when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:  # somebody's, or a file system without locks
        free = False
    try:
        yield free
    finally:
        os.close(handle)


def _mend(folder: pathlib.Path) -> None:
    """Removes what killed writers of `folder` left beside it, and puts back what one had moved aside."""
    ours = re.compile(rf"\.{re.escape(folder.name)}({re.escape(_OLD)})?\.[a-z0-9_]{{8}}")
    for left in sorted(folder.parent.iterdir()):
        found = ours.fullmatch(left.name)
        if found is None or not (left / MARKER).is_file():
            continue
        with _locked(left) as free:
            if free and found[1] and not folder.exists():
                left.rename(folder)
            elif free:
                shutil.rmtree(left, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_full(error: Exception) -> bool:
    """Returns whether an error is that a disk is full, or a quota is."""
    text = str(error).lower()
    return getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS)


def _unwritten(folder: pathlib.Path, error: Exception) -> UserError:
    if is_full(error):
        return UserError(
            f"{folder} couldn't be written: the disk is full, or a quota is. Make room and export again; nothing was left there."
        )
    return UserError(f"{folder} couldn't be written: {error}. Nothing was left there.")
