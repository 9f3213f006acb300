"""The experiments: one file a recipe, found by its name.

An experiment's file has a docstring, whose first line `launch.py --list` shows; `VARIANTS`, a literal tuple of the names it takes;
and `get_config(variant)`, which returns an `Experiment`. Beside it there may be `sweep(variant)`, which returns a `jaxft.sweep.Sweep`, or
its runs' overrides alone. Docstring and variants are read without running the file, so that listing
and a mistyped name cost nothing.
"""

import ast
import dataclasses
import importlib
import pathlib
from typing import Any

from jaxft.config import Experiment
from jaxft.errors import UserError, unknown

_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says of its experiment."""

    name: str
    summary: str  # first line of the docstring
    variants: tuple[str, ...]
    sweeps: bool  # whether it has a sweep()


def names() -> list[str]:
    """Returns the names of all experiments."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


def entry(name: str) -> Entry:
    """Returns what the file of an experiment says; raises `UserError` where there is none of this name."""
    if name not in names():
        raise unknown("experiment", name, names())
    tree = ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    variants = ast.literal_eval(constants["VARIANTS"]) if "VARIANTS" in constants else ()
    sweeps = any(isinstance(node, ast.FunctionDef) and node.name == "sweep" for node in tree.body)
    return Entry(name, (ast.get_docstring(tree) or "").partition("\n")[0], variants, sweeps)


def load(name: str, variant: str = "") -> Experiment:
    """Returns the experiment `name`, or a variant of it; raises `UserError` where there is none."""
    found = entry(name)
    if variant and not found.variants:
        raise UserError(f"The experiment '{name}' has no variants: give --experiment={name}.")
    if variant and variant not in found.variants:
        raise unknown(f"{name} variant", variant, found.variants)
    return importlib.import_module(f"experiments.{name}").get_config(variant)


def load_sweep(name: str, variant: str = "") -> Any:
    """Returns what `sweep(variant)` of an experiment that `load` takes returns; raises `UserError` where it has none."""
    if not entry(name).sweeps:
        known = ", ".join(found.name for found in map(entry, names()) if found.sweeps)
        raise UserError(f"The experiment '{name}' has no sweep(): nothing says which runs to make. Known with one: {known}.")
    return importlib.import_module(f"experiments.{name}").sweep(variant)
