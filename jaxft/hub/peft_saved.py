"""PEFT's modules_to_save beside any kind of adapter: modules that train whole, which here are a `Partial` in a sum with the method."""

import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import jax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.hub import peft_leaves, peft_lora_config, peft_tensors
from jaxft.hub.checkpoint import FLOATS, header
from jaxft.hub.names import Entry, tensors_of
from jaxft.hub.peft_format import PREFIX, WEIGHTS, Params, Written
from jaxft.hub.peft_tensors import Slot, module_of
from jaxft.hub.task import second_names
from jaxft.methods.base import Compose, Method
from jaxft.methods.kernels import WORDS
from jaxft.methods.partial import Partial
from jaxft.methods.partition import first_match
from jaxft.models.node import is_node


def split(method: Method) -> tuple[Method, Partial | None]:
    """Returns a method and what of it trains whole by patterns alone, or None where it is no such sum.

    >>> from jaxft.methods import IA3
    >>> split(IA3() + Partial(targets=("lm_head",)))[1].targets, split(Partial(targets=("lm_head",)) + IA3())[0]
    (('lm_head',), IA3(targets=(), feedforward=()))
    """
    if isinstance(method, Compose) and len(method.methods) == 2:
        for other, whole in (method.methods, method.methods[::-1]):
            if isinstance(whole, Partial) and whole.targets and whole == Partial(targets=whole.targets):
                return other, whole
    return method, None


def added(written: Written, model: nn.Module, params: Params, whole: Partial) -> Written:
    """Returns an adapter with the modules that `whole` trains; raises `UserError` where one of them has another tensor in it."""
    every = tensors_of(model, params)
    saved = {module_of(entry) for entry in every if first_match(whole.targets, entry.path) is not None}
    check_head(every, saved)
    _check_not_tied(model, every, saved, "This method")
    check_apart(module for module in saved if any(name.startswith(f"{written.prefix}{module}.") for name in written.tensors))
    tensors = {slot.key: slot.read for slot in slots(every, saved, written.prefix)}
    config = {**written.config, "modules_to_save": names(saved, map(module_of, every))}
    return dataclasses.replace(written, config=config, tensors={**written.tensors, **tensors})


def twice_named(tensors: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns an adapter's tensors, what has two names in a tied model by both, as peft writes it: the bias of an encoder's head."""
    both = second_names(model) if model.config.tie_word_embeddings else {}
    return {**tensors, **{PREFIX + second: tensors[PREFIX + first] for first, second in both.items() if PREFIX + first in tensors}}


def check_head(every: Iterable[Entry], saved: Set[str]) -> None:
    """Raises `UserError` where the head of masked_lm that multiplies with the embedding is saved: peft wants that too, in its module."""
    if any(entry.path == "lm_head/bias" and module_of(entry) in saved for entry in every):
        raise UserError(
            "PEFT's files hold the head of masked_lm with a copy of the embedding alone, so an adapter can't bring a new head along. Write "
            "the merged model (--format=hf, save_pretrained), or leave the head as it is."
        )


def check_apart(both: Iterable[str]) -> None:
    """Raises `UserError` for modules that are saved and have an adapter."""
    if (module := next(iter(both), None)) is not None:
        raise UserError(f"{module} trains whole and has an adapter too, which PEFT's files can't hold. Leave one of them out.")


def names(saved: Set[str], modules: Iterable[str]) -> list[str] | None:
    """Returns names that peft, which takes each module that ends with one, understands as these modules and no others.

    >>> names({"model.norm"}, ["model.norm", "model.layers.0.mlp.up_proj"])
    ['norm']
    >>> names({"classifier.dense", "classifier.out_proj"}, ["classifier.dense", "classifier.out_proj", "roberta.encoder.dense"])
    ['classifier']
    """
    modules = set(modules)

    def short(module: str) -> str:
        parts = module.split(".")
        tails = parts[-1:] if any(part.isdecimal() for part in parts) else parts  # PEFT can't wrap a layer's own modules of modules
        return next((tail for tail in tails if peft_lora_config.covered(tail, modules) <= saved), module)

    return sorted({short(module) for module in saved}) or None


def slots(every: Iterable[Entry], saved: Collection[str], prefix: str = PREFIX) -> list[Slot]:
    """Returns the places of the saved modules' tensors."""
    return [peft_tensors.whole(prefix + entry.name, entry) for entry in every if module_of(entry) in saved]


def chosen(config: Mapping[str, Any], model: Any, params: Params, where: str) -> set[str]:
    """Returns which modules a configuration saves; raises `UserError` for a name that is no module's, and for a tied embedding."""
    every = tensors_of(model, params)
    saved = peft_lora_config.saved_modules(config, dict.fromkeys(map(module_of, every)), where)
    _check_not_tied(model, every, saved, f"{where}: modules_to_save")
    twice = next((entry.path for entry in every if module_of(entry) in saved and entry.path.endswith("/bias")), None)
    if config.get("bias") == "all" and twice:
        raise UserError(
            f"{where}: bias is 'all' and modules_to_save trains {twice} too, which jaxft has for LoRA alone. Train the adapter with "
            "another bias, or without the module."
        )
    for entry in every:
        if module_of(entry) in saved and is_node(entry.leaf.value):
            raise UserError(f"These parameters hold {type(entry.leaf.value).__name__} at {entry.path}, which {where} saves whole.")
    return saved


def _check_not_tied(model: Any, every: Iterable[Entry], saved: Collection[str], what: str) -> None:
    if model.config.tie_word_embeddings and any(module_of(entry) in saved and entry.path == WORDS for entry in every):
        raise UserError(
            f"{what} has the embeddings, which are the output head too in this model: PEFT can't hold one that is both. Leave them out, or "
            "write the merged model."
        )


def read(
    folder: pathlib.Path, model: nn.Module, params: Params, method: Method, saved: Collection[str], prefix: str
) -> tuple[Params, Method]:
    """Returns `params` with the saved modules of a folder, and the sum of `method` and what trains them."""
    every = tensors_of(model, params)
    places = dict.fromkeys([entry.path.rpartition("/")[0] for entry in every if module_of(entry) in saved], True)
    patterns = peft_lora_config.summarize(places, [entry.path.rpartition("/")[0] for entry in every], "/")
    whole = Partial(targets=tuple(patterns))
    params = whole.init(jax.random.key(0), model, params)
    wanted = slots(tensors_of(model, params), saved, prefix)
    stored = header(folder / WEIGHTS, (*FLOATS, "I32"))  # beside the indices of a SHiRA
    found = {slot.key: stored[slot.key] for slot in wanted if slot.key in stored}
    peft_leaves.check(folder / WEIGHTS, {slot.key: slot.shape for slot in wanted}, found)
    return peft_tensors.fill(folder / WEIGHTS, params, wanted), method + whole
