"""Writes docs/configuration.md from the configuration's fields and the comments beside them, and docs/api.md from the docstrings.

python docs/generate.py
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import typing
from typing import Any

import jaxft
import jaxft.methods
import jaxft.objectives
import jaxft.tasks
from jaxft import config, overrides

PAGE = pathlib.Path(__file__).parent / "configuration.md"
API_PAGE = pathlib.Path(__file__).parent / "api.md"
API_HEAD = """# The Python interface

    import jaxft

Everything here is a function of its arguments, or a frozen dataclass. Parameters are nested dicts of arrays; a method's `init` adds
leaves to them, its `mask` says which leaves train, its `merge` folds them into the base. The fields of methods, tasks and objectives are
in [configuration.md](configuration.md). This page is written by `docs/generate.py`.
"""
OF_A_METHOD = ("init", "begin", "mask", "merge", "tokenized", "optimizer", "penalty")
HEAD = """# Configuration

An experiment is a file in `experiments/`; `--config.PATH=VALUE` overrides any field of it, and `config.json` in the run's folder holds
all of them as they were. This page is written by `docs/generate.py`.

A text stands as it is, with quotes of the shell around one that has spaces. A tuple is its parts with commas between them, pairs with
colons: `--config.method.targets=q_proj,v_proj`, `--config.method.rank_pattern=q_proj:16,v_proj:4`. A switch is `true` or `false`, or
stands alone: `--config.data.packing`, `--noconfig.data.packing`. Given twice, the last one holds.

`--config.method="LoRA(rank=4)"` puts another method in the experiment's place, `--config.method="LoRA(rank=4) + BitFit()"` a sum of
methods: all of them train, and what two of them would train is refused. `--config.objective="NAME(FIELD=VALUE)"` does so with the
objective, `--config.objective=none` leaves it out.
"""
GROUPS = {
    "model": config.ModelConfig,
    "data": config.DataConfig,
    "train": config.TrainConfig,
    "optimizer": config.OptimizerConfig,
    "eval": config.EvalConfig,
}


def page() -> str:
    """Returns the page."""
    parts = [HEAD]
    for name, kind in GROUPS.items():
        parts.append(_section(f"config.{name}", kind))
    for name, module in (("method", jaxft.methods), ("task", jaxft.tasks), ("objective", jaxft.objectives)):
        for title in module.__all__:
            if title != "Compose" and dataclasses.is_dataclass(kind := getattr(module, title)):  # a sum has no fields that flags give
                parts.append(_section(f"config.{name}, {title}", kind))
    return "\n".join(parts)


def api_page() -> str:
    """Returns the page of the Python interface."""
    parts = [API_HEAD, "## jaxft\n"]
    parts += [_documented(f"jaxft.{name}", getattr(jaxft, name)) for name in jaxft.__all__ if name != "methods"]
    parts.append("## A method\n")
    parts += [_documented(f"Method.{name}", getattr(jaxft.methods.Method, name)) for name in OF_A_METHOD]
    for module in (jaxft.methods, jaxft.tasks, jaxft.objectives):
        parts.append(f"## {module.__name__}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        found = [(name, getattr(module, name)) for name in module.__all__ if name not in ("Method", "Task", "Objective")]
        parts += [_documented(f"{module.__name__}.{name}", kind) for name, kind in found if inspect.isclass(kind)]
    return "\n".join(parts)


def _documented(name: str, found: Any) -> str:
    """The signature of a function, and the docstring."""
    shown = name if inspect.isclass(found) else f"{name}{inspect.signature(found)}"
    shown = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", shown) if not inspect.isclass(found) else shown  # jax.Array is Array here
    return f"### `{shown}`\n\n```text\n{inspect.cleandoc(found.__doc__ or '')}\n```\n"


def _section(title: str, kind: type[Any]) -> str:
    annotations, comments = typing.get_type_hints(kind), _comments(kind)
    prefix = title.partition(",")[0]
    rows = []
    for field in dataclasses.fields(kind):
        meaning = comments.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{prefix}.{field.name}` | {overrides.describe(annotations[field.name])} | {_shown(field.default)} | {meaning} |")
    purpose = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
    head = f"## {title}\n\n{purpose}\n\n| field | value | default | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _comments(kind: type[Any]) -> dict[str, str]:
    """The comment at the end of each field's line, those of the classes that it takes fields from included."""
    found: dict[str, str] = {}
    for part in (one for one in reversed(kind.__mro__) if dataclasses.is_dataclass(one)):
        source = inspect.cleandoc(inspect.getsource(part))
        lines = source.splitlines()
        fields = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
        ends = {node.target.id: lines[node.end_lineno - 1][node.end_col_offset :] for node in fields}  # type: ignore[union-attr, operator]
        found |= {name: re.sub(r"^\s*#\s*", "", end) for name, end in ends.items()}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`" if value != "" else "(empty)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    API_PAGE.write_text(api_page(), encoding="utf-8")
