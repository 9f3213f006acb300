"""The task that a model is loaded for: its labels, what the files have of its head, and what is drawn anew."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError, unknown
from jaxft.hub.names import WEIGHT, Entry, with_base
from jaxft.methods.kernels import KERNEL, key_of
from jaxft.methods.partition import first_match
from jaxft.models import heads
from jaxft.models.registry import architecture_for, described, family_of, tasks_of

_DEFAULT = "LABEL_{}"  # transformers' name of a label without one
_OLD_NORM = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # as TensorFlow's files had them


@dataclasses.dataclass(frozen=True)
class Task:
    """What a caller wants of a model."""

    name: str = heads.CAUSAL_LM
    labels: tuple[str, ...] = ()  # names by class id; empty: those of the files
    problem_type: str = ""  # of sequence classification; empty: that of the files
    seed: int = 0  # of what is drawn anew
    new_head: bool = False  # whether the head of masked_lm may be drawn

    def __post_init__(self) -> None:
        if self.name not in heads.TASKS:
            raise unknown("task", self.name, (*heads.TASKS, *heads.ALIASES))
        if self.labels and self.name not in heads.CLASSIFYING:
            raise UserError(f"labels are for {' and '.join(heads.CLASSIFYING)}; {self.name} has none. Leave them out.")
        if twice := [label for place, label in enumerate(self.labels) if label in self.labels[:place]]:
            raise UserError(f"labels names '{twice[0]}' twice. Each class has a name of its own.")
        if self.problem_type and self.name != heads.SEQUENCE_CLASSIFICATION:
            raise UserError(f"problem_type is for {heads.SEQUENCE_CLASSIFICATION}; {self.name} has none. Leave it out.")
        if self.new_head and self.name != heads.MASKED_LM:
            raise UserError(f"new_head is for {heads.MASKED_LM}; what {self.name} lacks of its head is drawn, or the files must have it.")
        if self.problem_type and self.problem_type not in heads.PROBLEM_TYPES:
            raise unknown("problem_type", self.problem_type, heads.PROBLEM_TYPES)


@dataclasses.dataclass(frozen=True)
class Aim:
    """A task for the files of one model."""

    config: Mapping[str, Any]  # config.json as the model with the task's head has it
    held: str  # the architecture that the files have
    kept: bool  # whether the files' own head is the one that is wanted
    new_head: bool = False  # whether a language model's head is drawn, which the files haven't


def aim(task: Task, config: Mapping[str, Any], held: str, name: str) -> Aim:
    """Returns the configuration of a model for a task, and whether its files have the head.

    Args:
      task: what is wanted.
      config: the files' config.json, complete.
      held: the architecture that it names.
      name: what messages call the model.

    Raises:
      UserError: the family hasn't the task; a language model's head that isn't there; no labels.
    """
    kind = described(held)
    if task.name not in tasks_of(kind.model_type):
        raise UserError(
            f"'{name}' is a {held}, and {kind.model_type} models have no head for {task.name}. Choose one of their tasks "
            f"(config.task, or task= of load_pretrained): {', '.join(tasks_of(kind.model_type))}."
        )
    architecture, same = architecture_for(kind.model_type, task.name), kind.task == task.name
    if task.name not in heads.CLASSIFYING:
        if same and task.name != heads.QUESTION_ANSWERING:
            return Aim({**config, "architectures": [architecture]}, held, True)
        count = heads.outputs_of(heads.QUESTION_ANSWERING, ())
        plain = {**config, "architectures": [architecture], "problem_type": None, **_label_fields(_default_labels(count))}
        return Aim(plain, held, same and len(config.get("id2label") or {}) == count, task.new_head and not same)
    own = heads.labels_of(config, task.name) if same else ()
    labels, kept = _labels(task, own, name, held)
    problem = task.problem_type or (config.get("problem_type") if same else None)
    return Aim({**config, "architectures": [architecture], "problem_type": problem, **_label_fields(labels)}, held, kept)


def _labels(task: Task, own: tuple[str, ...], name: str, held: str) -> tuple[tuple[str, ...], bool]:
    """The labels, and whether they are those of the files' head, whose order stays."""
    if own and (not task.labels or sorted(task.labels) == sorted(own)):
        return own, True
    if task.labels or task.problem_type == heads.REGRESSION:
        return task.labels or _default_labels(1), False
    raise UserError(
        f"'{name}' is a {held}: it has no head for {task.name}, and a new one needs the names of its classes. "
        'Pass them: labels=("negative", "positive").'
    )


def _default_labels(count: int) -> tuple[str, ...]:
    return tuple(_DEFAULT.format(number) for number in range(count))


def _label_fields(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def check_language_head(model: Any, found: Collection[Entry], held: str, name: str) -> None:
    """Raises `UserError` where a language model's head is wanted of files that have none: a new one would know nothing."""
    of_head = [entry for entry in found if entry.path.startswith("lm_head/")]
    if not heads.is_language_model(model) or described(held).task == model.task or not of_head:
        return
    remedy = " Or take new_head=True (config.task.new_head), and train it." if model.task == heads.MASKED_LM else ""
    has = described(held).task or "no head"
    raise UserError(
        f"'{name}' is a {held}: its files have {has}, and none for {model.task}, which isn't drawn anew since it would know no word. "
        f"Load a checkpoint of {model.config.architecture}, or another task: "
        f"{', '.join(task for task in tasks_of(described(held).model_type) if task != model.task)}.{remedy}"
    )


def in_file(model: Any, found: Sequence[Entry], held: str, have: Collection[str]) -> list[Entry]:
    """Returns the entries under the names that a file has for them; those that it lacks keep their own.

    A file may leave out the name of the base, have it as its own class does, use the oldest names of a norm's parameters, or a tensor's
    second name.

    Args:
      model: what is loaded.
      found: its tensors.
      held: the architecture that the file is of.
      have: the names in the file.
    """
    base = described(model.config.architecture).base
    bases = tuple(dict.fromkeys((described(held).base, base, "")))
    also = second_names(model)
    also |= {second: first for first, second in also.items() if not second.endswith(WEIGHT)}  # a bias; a table is no head's weight untied

    def stored(name: str) -> str:
        if name in have:
            return name
        inner = name.removeprefix(f"{base}.")
        general = f"{{base}}.{inner}" if inner != name else name
        names = [with_base(general, own) for own in bases]
        names += [re.sub(r"LayerNorm\.(weight|bias)$", lambda part: _OLD_NORM[part.group()], one) for one in names]
        return next((one for one in (*names, also.get(name, name)) if one in have), name)

    return [dataclasses.replace(entry, name=stored(entry.name)) for entry in found]


def second_names(model: Any) -> dict[str, str]:
    """Returns the second name that files may have for a tensor, by its first."""
    base = described(model.config.architecture).base
    return {with_base(first, base): second for first, second in family_of(model.config.architecture).module.ALSO_NAMED.items()}


def drawn_anew(model: Any, found: Sequence[Entry], aimed: Aim, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns what of a task's head is drawn, by our names, float32 in our layout: kernels normal, biases 0, norms 1, as transformers does.

    That is what the files lack or have for another number of labels, and the last layer where their labels aren't the same.

    Args:
      model: what is loaded.
      found: its tensors under the file's names.
      aimed: says whether the file's head is wanted.
      shapes: of the file's tensors.
      seed: of the numbers.
    """
    if aimed.kept:
        return {}
    head = [entry for entry in found if first_match(model.head, entry.path) is not None]
    new = [entry for entry in head if heads.is_output(entry.path) or shapes.get(entry.name) != entry.shape]
    return {entry.path: _draw(entry, model.config.initializer_range, seed) for entry in new}


def _draw(entry: Entry, size: float, seed: int) -> np.ndarray:
    if not entry.path.endswith(f"/{KERNEL}"):
        return np.full(entry.leaf.shape, entry.path.endswith("/scale"), np.float32)
    return np.asarray(size * jax.random.normal(key_of(jax.random.key(seed), entry.path), entry.leaf.shape))
