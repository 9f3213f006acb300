"""A run's folder: whether it may be written, whose it is, what a run came to. Files appear whole, by renaming."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

import jaxft
from jaxft import overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.train.checkpoint import check_same, newest_step
from jaxft.train.folds import fold_folder

CONFIG, SUMMARY = "config.json", "summary.json"
INSPECTION, INSPECTION_PAGE = "inspect.json", "inspect.html"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def check_workdir(workdir: pathlib.Path, resolved: Mapping[str, Any], trains: bool = True) -> None:
    """Raises `UserError` unless the folder is free or holds this very run; writes nothing; `trains` as of `check_same`."""
    check_folder(workdir)
    if (workdir / CONFIG).is_file():
        saved = _saved_config(workdir)
        if newest_step(workdir / "checkpoints") is not None or fold_folder(workdir, 0).exists():  # else nothing was trained with it yet
            known = overrides.to_dict(overrides.from_dict(saved))  # with the defaults of fields that came since
            check_same(known, resolved, workdir, trains)


def check_folder(workdir: pathlib.Path) -> None:
    """Raises `UserError` unless the folder is free, or holds a run of jaxft or a look at data, and can be written."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file. Choose another --workdir.")
    ours = (INSPECTION, INSPECTION_PAGE)
    held = [path for path in workdir.iterdir() if not path.name.endswith(".partial") and path.name not in ours] if workdir.exists() else []
    if held and not (workdir / CONFIG).is_file():
        raise UserError(f"{workdir} isn't empty and holds no run of jaxft. Choose another --workdir.")
    above = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK):
        raise UserError(f"{workdir} can't be written: {above} allows no writing. Choose another --workdir.")


def saved_experiment(workdir: pathlib.Path, name: str) -> Experiment | None:
    """Returns the experiment that a working folder holds, or None where it holds none; raises `UserError` for another one's."""
    if not (workdir / CONFIG).is_file():
        return None
    found = overrides.from_dict(_saved_config(workdir))
    if found.name != name:
        raise UserError(f"{workdir} holds a run of {found.name}, not of {name}. Give --experiment={found.name}, or another --workdir.")
    return found


def _saved_config(workdir: pathlib.Path) -> dict[str, Any]:
    found = _read_json(workdir / CONFIG)
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise UserError(f"{workdir / CONFIG} isn't one that jaxft wrote: {workdir} holds no run of jaxft. Choose another --workdir.")
    return found["config"]


def write_config(workdir: pathlib.Path, resolved: Mapping[str, Any]) -> None:
    """Makes the folder, and says in it whose it is; raises `UserError` where the disk refuses."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, {"config": resolved, "versions": versions(), "device": device()})
    except OSError as error:
        raise UserError(f"{workdir} can't be written ({error.strerror}). Choose another --workdir.") from error


def versions() -> dict[str, str]:
    """Returns the versions of jaxft, Python and what decides a run's numbers."""
    return {"jaxft": jaxft.__version__, "python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def device() -> dict[str, Any]:
    """Returns the devices a run uses."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "cpus": os.cpu_count()}


def summary_of(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the summary of a finished run, or {} where the folder holds none."""
    return _read_json(workdir / SUMMARY) if (workdir / SUMMARY).is_file() else {}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes beside the place and renames, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}). Make room, or choose another --workdir.") from error
