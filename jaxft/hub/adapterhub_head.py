"""A task's head beside a bottleneck adapter, as AdapterHub's library writes and reads it: head_config.json and model_head.safetensors."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.hub import peft_leaves, peft_tensors
from jaxft.hub.adapterhub import VERSION
from jaxft.hub.checkpoint import header, read_json
from jaxft.hub.names import Entry, tensors_of
from jaxft.methods.base import Params
from jaxft.methods.partial import Partial
from jaxft.methods.partition import first_match
from jaxft.models.heads import outputs_of
from jaxft.models.registry import described

CONFIG = "head_config.json"
WEIGHTS = "model_head.safetensors"


def write(model: Any, params: Params, whole: Partial) -> tuple[dict[str, Any], dict[str, Callable[[], np.ndarray]]]:
    """Returns the configuration of a head, and what makes each tensor.

    A pooler is written with the head; the library doesn't write one, and takes it. Raises `UserError` where `whole` trains anything else.
    """
    chosen = _chosen(model, params, whole)
    if others := [entry.path for entry in chosen if first_match(model.head, entry.path) is None]:
        raise UserError(f"{others[0]} trains whole, and AdapterHub's files hold a task's head alone beside an adapter. Leave it out.")
    labels = model.config.labels
    config = {
        "config": None,
        "hidden_size": model.config.hidden_size,
        "label2id": {label: number for number, label in enumerate(labels)} or None,
        "model_class": model.config.architecture,
        "model_name": "",
        "model_type": model.config.family,
        "name": None,
        "num_labels": outputs_of(model.task, labels),
        "version": VERSION,
    }
    return config, {entry.name: peft_tensors.whole(entry.name, entry).read for entry in chosen}


def fits(model: Any, params: Params, whole: Partial) -> bool:
    """Returns whether what trains whole is of the task's head alone, by shapes."""
    return all(first_match(model.head, entry.path) is not None for entry in _chosen(model, params, whole))


def _chosen(model: Any, params: Params, whole: Partial) -> list[Entry]:
    return [entry for entry in tensors_of(model, params) if first_match(whole.targets, entry.path) is not None]


def read(folder: pathlib.Path, model: Any, params: Params) -> tuple[Params, Partial] | None:
    """Returns `params` with a folder's head, and what trains it; None where there is no head, or the model's is a language model's.

    Raises `UserError` for a head of another task, of other labels, or with other tensors.
    """
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists() or not model.head:
        return None
    _check(read_json(folder / CONFIG), model, str(folder / CONFIG))
    stored = header(folder / WEIGHTS)
    head = [entry for entry in tensors_of(model, params) if first_match(model.head, entry.path) is not None]
    found = [entry for entry in head if entry.name in stored or not _is_of_base(entry, model)]
    peft_leaves.check(folder / WEIGHTS, {entry.name: entry.shape for entry in found}, stored)
    whole = Partial(targets=tuple(part for part in model.head if any(first_match([part], entry.path) is not None for entry in found)))
    params = whole.init(jax.random.key(0), model, params)
    names = {entry.name for entry in found}
    slots = [peft_tensors.whole(entry.name, entry) for entry in tensors_of(model, params) if entry.name in names]
    return peft_tensors.fill(folder / WEIGHTS, params, slots), whole


def _is_of_base(entry: Entry, model: Any) -> bool:
    """Whether the library takes a part of the head for the base's: BERT's pooler."""
    return entry.name.startswith(f"{described(model.config.architecture).base}.")


def _check(config: Mapping[str, Any], model: Any, where: str) -> None:
    if config.get("config"):
        raise UserError(f"{where} is a head of AdapterHub's own kind; jaxft reads those of transformers' classes. Remove it to load none.")
    if config.get("model_class") != model.config.architecture:
        raise UserError(f"{where} is of a {config.get('model_class')}, this model is a {model.config.architecture}. Load it for that task.")
    names = {int(number): label for label, number in (config.get("label2id") or {}).items()}
    labels = tuple(names[number] for number in sorted(names))
    if model.config.labels and labels != model.config.labels:
        raise UserError(f"{where} has the labels {', '.join(labels)}; this model's are {', '.join(model.config.labels)}.")
