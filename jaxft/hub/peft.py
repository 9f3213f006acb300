"""Adapters as PEFT and AdapterHub write and read them: adapter_config.json and its safetensors."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError, nearest
from jaxft.hub import (
    adapter_keys,
    adapterhub,
    adapterhub_head,
    peft_adalora,
    peft_ia3,
    peft_leaves,
    peft_lora,
    peft_norm_tuning,
    peft_saved,
    peft_shira,
    peft_vera,
    peft_virtual,
)
from jaxft.hub import folder as folders
from jaxft.hub.checkpoint import ADAPTER_CONFIG, read_json
from jaxft.hub.peft_format import BASE, PREFIX, WEIGHTS, Format, Params, check_task, task_type
from jaxft.hub.save import CARD
from jaxft.hub.sources import PICKLE_SUFFIXES
from jaxft.methods.base import Method
from jaxft.methods.partition import partition
from jaxft.models.segments import leaves

FORMATS: tuple[Any, ...] = (  # what follows peft_format.Format
    peft_lora,
    peft_adalora,
    peft_norm_tuning,
    peft_ia3,
    peft_shira,
    peft_vera,
    *peft_virtual.FORMATS,
)
_ALONE = (peft_lora,)  # where nothing trains whole beside the method: LoRA's modules_to_save is its own
_CARD = """---
library_name: peft
---
An adapter written by jaxft. `peft.PeftModel.from_pretrained(base_model, FOLDER)` loads it.
"""


_HUB_CARD = """---
library_name: adapter-transformers
---
An adapter written by jaxft. With `adapters`: `adapters.init(model)`, then `model.load_adapter(FOLDER, set_active=True,
use_safetensors=True)`.
"""


def adapter_format(method: Method) -> str | None:
    """Returns the name of the format that the method's leaves have alone, peft or adapterhub, or None where they have none.

    >>> from jaxft.methods import Bottleneck, Full, IA3, LoRA, Partial
    >>> adapter_format(LoRA()), adapter_format(Bottleneck()), adapter_format(Full()), adapter_format(IA3() + Partial(targets=("score",)))
    ('peft', 'adapterhub', None, 'peft')
    """
    own, whole = peft_saved.split(method)
    if type(own) is adapterhub.METHOD:
        return "adapterhub"
    found = format_of(own)
    return None if found is None or (whole is not None and found in _ALONE) else "peft"


def format_of(method: Method) -> Format | None:
    """Returns what writes the method's leaves as PEFT does, or None where PEFT has no such thing."""
    return next((found for found in FORMATS if type(method) is found.METHOD), None)


def has_form(model: nn.Module, params: Params, method: Method) -> bool:
    """Returns whether PEFT's files, or AdapterHub's, can hold the method as it is in `params`."""
    own, whole = peft_saved.split(method)
    if isinstance(own, adapterhub.METHOD):
        return whole is None or adapterhub_head.fits(model, params, whole)
    found = format_of(own)
    if found is None:
        return False
    try:
        written = found.write(model, params, own)  # makes no tensor yet
        if whole is not None:
            peft_saved.added(written, model, params, whole)
    except UserError:
        return False
    return True


def save_adapter(
    folder: str | pathlib.Path,
    model: Any,
    params: Params,
    method: Method,
    base_model: str = "",
    card: str = "",
    name: str = adapterhub.NAME,
) -> None:
    """Writes a method's leaves as a folder that `peft.PeftModel.from_pretrained` loads; each tensor is read back and compared.

    A bottleneck adapter becomes a folder that AdapterHub's `model.load_adapter` loads, with the task's head where a `Partial` that trains
    it is added to the method. What trained is written as float32.

    Args:
      folder: where; what is there is replaced if jaxft wrote it.
      model: as `load_pretrained` gives it.
      params: as `method.init` makes them, trained or not.
      method: the method that made them; but for LoRA, with a `Partial(targets=...)` added to it, whose modules PEFT saves whole
        (modules_to_save).
      base_model: what the adapter belongs to, a hub id or a folder, for peft to find it.
      card: README.md, Markdown; empty is a short one.
      name: of the adapter, in AdapterHub's form alone; PEFT's has none.

    Raises:
      UserError: `params` don't hold this method; PEFT has no such method; a folder that isn't ours, or can't be written.
    """
    own, whole = peft_saved.split(method)
    if isinstance(own, adapterhub.METHOD):
        files = [_File(ADAPTER_CONFIG, adapterhub.WEIGHTS, *adapterhub.write(model, params, own, name))]
        if whole is not None:
            files.append(_File(adapterhub_head.CONFIG, adapterhub_head.WEIGHTS, *adapterhub_head.write(model, params, whole)))
        _write(pathlib.Path(folder), files, card or _HUB_CARD)
        return
    found = format_of(own)
    if found is None or (whole is not None and found in _ALONE):
        raise UserError(
            f"PEFT has no form for {method.title}. Write the whole model: "
            "jaxft.save_pretrained(folder, model, method.merge(model, params))."
        )
    written = found.write(model, params, own)
    if whole is not None:
        written = peft_saved.added(written, model, params, whole)
    tensors = peft_saved.twice_named(written.tensors, model)
    kind = task_type(model.config.task, written.config["modules_to_save"] or ())
    config = {**written.config, "base_model_name_or_path": base_model or None, "task_type": kind}
    _write(pathlib.Path(folder), [_File(ADAPTER_CONFIG, WEIGHTS, config, tensors)], card or _CARD)


class _File(NamedTuple):
    """A configuration and tensors, and what their files are called."""

    config_name: str
    weights_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], np.ndarray]]


def _write(folder: pathlib.Path, files: Sequence[_File], card: str) -> None:
    with folders.written(folder.expanduser(), "adapter") as temporary:
        for file in files:
            folders.write_tensors(temporary / file.weights_name, file.tensors)
            folders.write_json(temporary / file.config_name, file.config)
        (temporary / CARD).write_text(card, encoding="utf-8")


def load_adapter(folder: str | pathlib.Path, model: Any, params: Params) -> tuple[Params, Any]:
    """Returns `params` with a folder's adapter, and the method that gives the same structure.

    What trains is float32, whatever type the file has, as in peft: bfloat16 and float16 numbers stay as they are, float64 ones are
    rounded. `save_adapter` writes it as float32.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors (PEFT) or adapter.safetensors (AdapterHub).
      model: the adapter's base model.
      params: its parameters.

    Raises:
      UserError: no adapter there; an option that jaxft doesn't have; weights missing, left over, of another base's shape, or not finite.
    """
    folder = pathlib.Path(folder).expanduser()
    loaded, method = _read(folder, model, params)
    for leaf in leaves(partition(loaded, method.mask(loaded))[0]):
        if jnp.issubdtype(leaf.value.dtype, jnp.floating) and not jnp.isfinite(leaf.value).all():
            raise UserError(
                f"{folder}: {leaf.names[0]} has numbers that aren't finite: training had gone wrong before it was written. "
                "Take the adapter of an earlier checkpoint."
            )
    return loaded, method


def _read(folder: pathlib.Path, model: Any, params: Params) -> tuple[Params, Any]:
    """Returns what `load_adapter` does, whatever numbers it holds."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}: it is no adapter of PEFT or AdapterHub.")
    config = read_json(folder / ADAPTER_CONFIG)
    if adapterhub.is_adapterhub(config):
        params, method = adapterhub.read(folder, config, model, params)
        head = adapterhub_head.read(folder, model, params)
        return (params, method) if head is None else (head[0], method + head[1])
    adapter_keys.check(config, adapter_keys.PEFT, str(folder / ADAPTER_CONFIG))
    kinds = {found.PEFT_TYPE: found for found in FORMATS}
    kind = config.get("peft_type")
    check_task(config, model.config.task, str(folder / ADAPTER_CONFIG))
    if kind not in kinds:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}.{nearest(str(kind), kinds)} jaxft reads {', '.join(sorted(kinds))}."
        )
    if not (folder / WEIGHTS).exists():
        if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
            raise UserError(
                f"{folder} holds its weights in a pickle file, which runs code when it is read; jaxft reads safetensors. If you trust it, "
                "write it anew with peft, which takes both: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW)."
            )
        raise UserError(f"{folder} has no {WEIGHTS}.")
    peft_leaves.check_head(folder, model)
    found = kinds[kind]
    if not config.get("modules_to_save") or found in _ALONE:
        return found.read(folder, config, model, params)
    saved = peft_saved.chosen(config, model, params, str(folder / ADAPTER_CONFIG))
    params, method = found.read(folder, config | {"modules_to_save": None}, model, params, saved)
    prefix = BASE if found in peft_virtual.FORMATS else PREFIX
    return peft_saved.read(folder, model, params, method, saved, prefix) if saved else (params, method)
