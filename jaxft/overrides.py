"""An experiment as flags and as JSON: `--config.PATH=VALUE` for any field, and the dictionary that `config.json` holds.

A field's type is its annotation. Flags are text, JSON has lists and no tuples: both become the annotated type here, or an error that
names the field.
"""

import ast
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_dict, config_flags

from jaxft.config import Experiment
from jaxft.errors import UserError, unknown

_SHOWN = 80  # letters of a text in a message
CLASS = "class"  # the key of a class's name: a word that no Python field can have
NONE = "none"  # no objective
_GROUPS = ("method", "task", "objective")  # fields whose value is one of several classes
_OPTIONAL = ("objective",)  # those that may have none
_FLAG = re.compile(r"--?(?P<no>no)?config(\.(?P<path>[^=]*))?(=(?P<text>.*))?", re.DOTALL)
_NOUNS = {str: ("text", "texts"), int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), bool: ("true or false", "")}
_T = TypeVar("_T")


def parse_flags(experiment: Experiment, arguments: Sequence[str]) -> Experiment:
    """Returns `experiment` with the fields that the flags `--config.PATH=VALUE` among `arguments` give.

    A tuple is written as its parts with commas between them, pairs with colons: `--config.method.targets=q_proj,v_proj`,
    `--config.method.rank_pattern=q_proj:16,v_proj:4`; Python's form, `("q_proj", "v_proj")`, is understood too. A switch may stand
    alone (`--config.data.packing`, `--noconfig.data.packing`). Given twice, the last one holds. `--config.method=LoRA(rank=4)+BitFit()`
    puts another method, or a sum of methods, in the experiment's place, before the fields are read; so `--config.objective=NAME()`, or
    none.

    Raises:
        UserError: no such field, a value of another type, something that is no flag of the configuration, or epochs beside the
            experiment's own number of steps.

    >>> from jaxft.config import DataConfig, ModelConfig
    >>> from jaxft.methods import LoRA
    >>> from jaxft.tasks import SFT
    >>> experiment = Experiment("example", ModelConfig(), DataConfig(), LoRA(), SFT())
    >>> parse_flags(experiment, ["--config.method.targets=q_proj,v_proj"]).method.targets
    ('q_proj', 'v_proj')
    """
    experiment, arguments = _with_named(experiment, arguments)
    known = fields_of(experiment)
    for argument in arguments:
        if match := _FLAG.fullmatch(argument):
            _check_flag(match, known)
    texts = _texts(known, arguments)
    found = to_dict(experiment)
    for path, text in texts.items():
        *groups, name = path.split(".")
        holder = found
        for group in groups:
            holder = holder[group]
        holder[name] = text if isinstance(text, bool) else _from_text(known[path][0], text, f"config.{path}")  # a switch is read already
    made = from_dict(found)
    if "train.epochs" in texts and "train.steps" not in texts and made.train.steps:
        raise UserError(
            f"config.train.epochs has no effect: {made.name} has train.steps={made.train.steps}. Add --config.train.steps=0, or leave this "
            "out."
        )
    return made


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """Returns `experiment` with a value at each path: of a field, or a method, task or objective as a whole, before the fields of it.

    Args:
      experiment: what they are put into.
      values: by path, without "config.": as Python has them, or as JSON does (`as_json`).

    Raises:
        UserError: no such field, or a value of another type.

    >>> from jaxft.config import DataConfig, ModelConfig
    >>> from jaxft.methods import IA3, LoRA
    >>> from jaxft.tasks import SFT
    >>> experiment = Experiment("example", ModelConfig(), DataConfig(), IA3(), SFT())
    >>> found = with_values(experiment, {"method.rank": 4, "method": LoRA(), "train.seed": 1})
    >>> found.method.rank, found.train.seed
    (4, 1)
    """
    found = to_dict(experiment) | {name: as_json(values[name]) for name in _GROUPS if name in values}
    known = list(fields_of(from_dict(found)))
    for path in (path for path in values if path not in _GROUPS):
        if path not in known:
            raise _no_field(path, known)
        *groups, name = path.split(".")
        functools.reduce(operator.getitem, groups, found)[name] = _plain(values[path])
    return from_dict(found)


def as_json(value: Any) -> Any:
    """Returns a field's value as JSON holds it; a method, task or objective with its class's name.

    >>> from jaxft.methods import Full
    >>> as_json((1, 2)), as_json(Full())
    ([1, 2], {'class': 'Full', 'exclude': [], 'layer_decay': 1.0})
    """
    return _named(value) if dataclasses.is_dataclass(value) else _plain(value)


def given_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the paths of the flags `--config.PATH=VALUE` among `arguments`.

    >>> given_paths(["--config.train.steps=3", "--noconfig.data.packing"])
    ['train.steps', 'data.packing']
    """
    return [match["path"] or "" for match in map(_FLAG.fullmatch, arguments) if match]


def merged(arguments: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns the words of a command with the flags `others` at the end, in the place of those that they override.

    A flag `--config.method=...` is in the place of those of a method's fields too.

    >>> merged(["launch.py", "--config.train.steps=3", "--config.train.seed", "1"], ["--config.train.steps=5"])
    ['launch.py', '--config.train.seed', '1', '--config.train.steps=5']
    """
    new, kept, keeps = given_paths(others), list[str](), True
    for word in arguments:
        if word.startswith("--") or given_paths([word]):  # another word is the value of the flag before it
            keeps = not any(path == other or path.startswith(f"{other}.") for path in given_paths([word]) for other in new)
        if keeps:
            kept.append(word)
    return [*kept, *others]


def fields_of(experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    """Returns the annotation and the value of every field but the name, by its path ("data.limit"), those of method and task included."""
    return {path: (annotation, value) for path, annotation, value in _walk(experiment, "") if path != "name"}


def to_dict(value: Any) -> dict[str, Any]:
    """Returns a dataclass, or an experiment, as JSON holds it: tuples as lists, a method or task with its class's name.

    >>> from jaxft.tasks import SFT
    >>> to_dict(SFT())
    {'label_smoothing': 0.0, 'z_loss': 0.0, 'head_chunk': 1024}
    """
    found = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Experiment):
        for name in _GROUPS:
            found[name] = None if name in _OPTIONAL and getattr(value, name) is None else _named(getattr(value, name))
    return found


def flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of everything in what `to_dict` returned.

    >>> dict(flat({"train": {"steps": 3}, "name": "tried"}))
    {'train.steps': 3, 'name': 'tried'}
    """
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _named(value: Any) -> dict[str, Any]:
    """A method, task or objective as JSON holds it, with its class's name; so each part of a sum of methods."""
    found = to_dict(value)
    for name, inner in ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value)):
        if isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0]):
            found[name] = [_named(part) for part in inner]
    return {CLASS: type(value).__name__, **found}


def from_dict(found: Mapping[str, Any]) -> Experiment:
    """Returns the experiment that `to_dict` wrote, with every type checked; a field that is missing takes its default.

    Raises:
        UserError: a field or class that doesn't exist, a value of another type, or one that its class refuses.
    """
    found = dict(found)
    classes = _classes()
    given = {name: found.pop(name, None) for name in classes}
    parts = {
        name: None if name in _OPTIONAL and given[name] is None else _instance(given[name], known, f"config.{name}")
        for name, known in classes.items()
    }
    return _build(Experiment, {**found, **parts}, "config")


def checked(experiment: Experiment) -> Experiment:
    """Returns `experiment` with each value in its field's type (1 becomes 1.0 where a float stands); raises `UserError` for others."""
    return from_dict(to_dict(experiment))


def describe(annotation: Any) -> str:
    """Returns what a value of this type is, in words.

    >>> describe(tuple[str, ...]), describe(tuple[float, float, float])
    ('texts, separated by commas', '3 numbers, separated by commas')
    """
    if annotation in _NOUNS:
        return _NOUNS[annotation][0]
    inner = typing.get_args(annotation)
    if inner[-1] is Ellipsis:
        if inner[0] in _NOUNS:
            return f"{_NOUNS[inner[0]][1]}, separated by commas"
        first, second = (_NOUNS[part][0] for part in typing.get_args(inner[0]))
        return f"pairs of {first} and {second}, as NAME:VALUE, separated by commas"
    return f"{len(inner)} {_NOUNS[inner[0]][1]}, separated by commas"


# ---------------------------------------------------------------- flags


def _with_named(experiment: Experiment, arguments: Sequence[str]) -> tuple[Experiment, list[str]]:
    """The experiment with the method that --config.method=... names, and the objective of --config.objective=..., and the other flags."""
    rest = []
    for argument in arguments:
        match = _FLAG.fullmatch(argument)
        if match and match["path"] in _FROM_TEXT and match["text"] is not None and not match["no"]:
            experiment = dataclasses.replace(experiment, **{match["path"]: _FROM_TEXT[match["path"]](match["text"])})
        else:
            rest.append(argument)
    return experiment, rest


def method_from_text(text: str) -> Any:
    """Returns the method that an expression names.

    >>> method_from_text("LoRA(rank=4, targets=('q_proj',))").rank
    4
    """
    return _from_expression("method", text, "as LoRA(rank=8), or a sum of such, in quotes")


def objective_from_text(text: str) -> Any:
    """Returns the objective that an expression names, or None of `none`.

    >>> objective_from_text("none")
    """
    if text.strip().lower() == NONE:
        return None
    return _from_expression("objective", text, f"in quotes, or {NONE}")


def _from_expression(group: str, text: str, forms: str) -> Any:
    try:
        return _value_of(group, ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: of Python's parser, where a text is too deep
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(f"config.{group}: '{shown}' is no {group}. Write NAME(FIELD=VALUE, ...), {forms}.") from error


def _value_of(group: str, tree: ast.expr) -> Any:
    terms = []
    while group == "method" and isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    if terms:
        return functools.reduce(operator.add, (_value_of(group, term) for term in (tree, *reversed(terms))))
    if isinstance(tree, ast.Name):
        return _instance({CLASS: tree.id}, _classes()[group], f"config.{group}")
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise ValueError(ast.dump(tree))
    given = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise ValueError("a field without a name")
        if keyword.arg in given:
            raise UserError(f"config.{group}.{keyword.arg} is given twice.")
        given[keyword.arg] = ast.literal_eval(keyword.value)
    return _instance({CLASS: tree.func.id, **given}, _classes()[group], f"config.{group}")


_FROM_TEXT: dict[str, Callable[[str], Any]] = {"method": method_from_text, "objective": objective_from_text}


def _texts(known: Mapping[str, tuple[Any, Any]], arguments: Sequence[str]) -> dict[str, Any]:
    """What the flags give each path: text, or True and False of switches."""
    config = config_dict.ConfigDict()
    for path, (annotation, value) in known.items():
        *groups, name = path.split(".")
        holder = config
        for group in groups:
            if group not in holder:
                holder[group] = config_dict.ConfigDict()
            holder = holder[group]
        holder[name] = value if annotation is bool else ""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    argv = ["launch.py", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"There is no flag '--{error.flagname}'.") from error
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}. Write a flag as --config.PATH=VALUE.") from error
    if rest:
        raise UserError(f"'{rest[0]}' is no flag. Write flags as --config.PATH=VALUE, with quotes around a value that has spaces.")
    return config_flags.get_override_values(values["config"])


def _check_flag(match: re.Match[str], known: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises `UserError` for a flag of no field, and for a switch that is neither on nor off."""
    path, text = match["path"], match["text"]
    if not path:
        groups = {name.partition(".")[0] for name in known}
        raise UserError(f"config is a group of fields. Write --config.PATH=VALUE, with a path in {_listed(groups)}.")
    if path not in known:
        raise _no_field(path, list(known))
    switch = known[path][0] is bool
    if match["no"] and not switch:
        raise UserError(f"config.{path} is no switch: expected {describe(known[path][0])}, as --config.{path}=VALUE.")
    if switch and text is not None:
        _from_text(bool, text, f"config.{path}")


def _no_field(path: str, known: Sequence[str]) -> UserError:
    """The error for a path that is a group of fields, or has a wrong name in it."""
    inside = [name for name in known if name.startswith(f"{path}.")]
    if inside:
        return UserError(f"config.{path} is a group of fields. Give one of them: {_listed(inside)}.")
    group, _, name = path.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == group and group]
    groups = {other.partition(".")[0] for other in known}
    moved = [other for other in known if other.rpartition(".")[2] == name]
    near = moved[:1] or difflib.get_close_matches(path, siblings, n=1) or difflib.get_close_matches(group or path, groups, n=1)
    hint = f" Did you mean 'config.{near[0]}'?" if near else ""
    return UserError(f"There is no field 'config.{path}'.{hint} Known: {_listed(siblings or groups)}.")


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(f"config.{path}" for path in sorted(paths))


def _from_text(annotation: Any, text: str, field: str) -> Any:
    """The value that a flag's text stands for."""
    try:
        return _READERS[annotation](text) if annotation in _READERS else _tuple_from_text(annotation, text, field)
    except ValueError as error:
        raise _mismatch(field, annotation, text) from error


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    except KeyError as error:
        raise ValueError(text) from error


_READERS: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: float, bool: _boolean}


def _tuple_from_text(annotation: Any, text: str, field: str) -> Any:
    """Python's form where the text is that, otherwise parts between commas."""
    try:
        return _convert(annotation, ast.literal_eval(text), field)
    except (ValueError, SyntaxError, UserError):
        pass
    parts = _parts(text)
    return tuple(_part_from_text(kind, part) for kind, part in zip(_kinds(annotation, len(parts)), parts, strict=True))


def _part_from_text(annotation: Any, text: str) -> Any:
    if annotation in _READERS:
        return _READERS[annotation](text)
    first, second = typing.get_args(annotation)
    name, _, value = text.rpartition(":")
    if not name:
        raise ValueError(text)
    return (_READERS[first](name), _READERS[second](value))


def _parts(text: str) -> list[str]:
    """The parts between commas that stand outside brackets: patterns may hold `(q|v){1,2}`."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


# ---------------------------------------------------------------- dictionaries


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    annotations = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, path = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from _walk(inner, f"{path}.")
        elif path in _OPTIONAL and inner is None:  # given as a whole
            continue
        elif not (isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0])):  # so is a sum of methods
            yield path, annotations[field.name], inner


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value


def _classes() -> dict[str, types.ModuleType]:
    """Where a name of a method, a task or an objective is looked up."""
    from jaxft import methods, objectives, tasks  # they import jax, which takes a second that a mistyped flag needn't wait for

    return dict(zip(_GROUPS, (methods, tasks, objectives), strict=True))


def _instance(found: Any, module: types.ModuleType, field: str) -> Any:
    offered: dict[str, Any] = {name: getattr(module, name) for name in module.__all__}
    known = {name: kind for name, kind in offered.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    if not isinstance(found, Mapping) or CLASS not in found:
        raise UserError(f"{field}: expected the fields of a {field.removeprefix('config.')}, with '{CLASS}' among them, found {found!r}.")
    found = dict(found)
    name = found.pop(CLASS)
    if name not in known:
        raise unknown(field.removeprefix("config."), str(name), known)
    kind: Any = known[name]
    if name == "Compose":
        parts = found.pop("methods", ())
        if found or not isinstance(parts, (list, tuple)):
            wrong = next(iter(found), "methods")
            raise UserError(f"{field}.{wrong}: a sum of methods has its methods alone. Write it as LoRA(rank=8) + BitFit().")
        return kind(methods=tuple(_instance(part, module, field) for part in parts))
    return _build(kind, found, field)


def _build(kind: type[_T], found: Mapping[str, Any], field: str) -> _T:
    """A dataclass from the dictionary of its fields."""
    annotations = typing.get_type_hints(kind)
    known = {known.name: known for known in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in found:
        if name not in known:
            raise unknown("field", f"{field}.{name}", [f"{field}.{other}" for other in known])
    missing = [name for name, inner in known.items() if name not in found and inner.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{field}.{missing[0]} is missing.")
    return kind(**{name: _convert(annotations[name], value, f"{field}.{name}") for name, value in found.items()})


def _convert(annotation: Any, value: Any, field: str) -> Any:
    """`value` in the annotated type: lists become tuples, whole numbers become floats where a float stands."""
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise UserError(f"{field}: expected its fields, found {value!r}.")
        return _build(annotation, value, field)  # type: ignore[arg-type]
    if typing.get_origin(annotation) is tuple:
        return _convert_tuple(annotation, value, field)
    if annotation not in _NOUNS:
        known = ", ".join(kind.__name__ for kind in _NOUNS)
        raise TypeError(f"{field} is annotated as {annotation}; fields are {known}, or tuples of them.")
    if annotation is float and type(value) is int:
        value = float(value)
    if type(value) is not annotation or (annotation is float and not math.isfinite(value)):
        raise _mismatch(field, annotation, value)
    return value


def _convert_tuple(annotation: Any, value: Any, field: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise _mismatch(field, annotation, value)
    try:
        kinds = _kinds(annotation, len(value))
    except ValueError as error:
        raise _mismatch(field, annotation, value) from error
    return tuple(_convert(kind, part, field) for kind, part in zip(kinds, value, strict=True))


def _kinds(annotation: Any, count: int) -> list[Any]:
    """The annotations of a tuple's `count` parts; raises `ValueError` where it has another number of them."""
    inner = typing.get_args(annotation)
    kinds = [inner[0]] * count if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != count:
        raise ValueError(f"{len(kinds)} parts, not {count}")
    return kinds


def _mismatch(field: str, annotation: Any, value: Any) -> UserError:
    shown = f"'{value}'" if isinstance(value, str) else repr(value)
    return UserError(f"{field}: expected {describe(annotation)}, found {shown}.")
