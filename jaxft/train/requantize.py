"""A merged model in 4 bits again, and what that loses."""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import console
from jaxft.errors import UserNote
from jaxft.hub.quantized import PATTERNS, chosen, formats_of, in_formats
from jaxft.hub.save import BITSANDBYTES, save_pretrained
from jaxft.models import segments
from jaxft.models.node import dense, is_node, is_quantized
from jaxft.models.registry import family_of
from jaxft.quant.blockwise import Format
from jaxft.train import placement
from jaxft.train.evaluate import Evaluator
from jaxft.train.report import card
from jaxft.train.setup import Setup, on_host, stopping_model
from jaxft.train.state import State


def export(setup: Setup, state: State, evaluator: Evaluator, folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes the merged model as a folder of bitsandbytes' 4-bit weights; prints what they lose.

    Kernels that the base holds in 4 bits are quantized again in its format; of a base that isn't quantized, every linear layer but the
    output head, in NF4 with double quantization.
    """
    experiment, params = setup.experiment, setup.params(state)
    merged = experiment.method.merge(setup.model, on_host(params))
    formats = formats_of(params) or chosen(merged, Format(), PATTERNS)
    again = in_formats(merged, formats)
    errors = kernel_errors(merged, again)
    places = placement.shardings(again, family_of(setup.model.config.architecture).module.PLACEMENT, setup.mesh)
    loss = _report(errors, evaluator, state, placement.place(again, places), experiment.eval.split)
    if summary:
        summary = {**summary, "eval": {**summary["eval"], "after, in 4 bits again": {"loss": loss}}}
    with warnings.catch_warnings(record=True, action="always", category=UserNote) as notes:
        save_pretrained(
            folder, stopping_model(setup), again, setup.tokenizer, card=card(experiment, summary, BITSANDBYTES), format=BITSANDBYTES
        )
    for note in notes:
        console.say(f"Note: {note.message}\n")


def kernel_errors(params: Any, again: Any) -> dict[str, float]:
    """Returns, by name, how far each kernel is off that is quantized in `again` and wasn't in `params`: |difference| / |kernel|."""
    before = {name: (leaf, index) for leaf in segments.leaves(params, is_leaf=is_node) for index, name in enumerate(leaf.names)}
    found = {}
    for leaf in segments.leaves(again, is_leaf=is_node):
        for index, name in enumerate(leaf.names if is_quantized(leaf.value) else ()):
            old, place = before[name]
            if not is_quantized(old.value):
                found[name] = float(_error(old.part(place), leaf.part(index)))
    return found


def _error(kernel: Any, again: Any) -> jax.Array:
    kernel, again = dense(kernel), dense(again)
    return jnp.linalg.norm(again - kernel) / jnp.linalg.norm(kernel)


def _report(errors: Mapping[str, float], evaluator: Evaluator, state: State, again: Any, split: str) -> float:
    """Prints what was lost; returns the loss of what is written."""
    examples = evaluator.chosen(split)
    before, after = evaluator.measure(state, examples).metrics["loss"], evaluator.measure_params(again, examples).metrics["loss"]
    worst = max(errors, key=errors.__getitem__, default="")
    rows = [("loss", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")]
    if errors:
        rows += [
            ("kernels, mean relative error", "-", f"{sum(errors.values()) / len(errors):.4f}", ""),
            (f"largest: {worst}", "-", f"{errors[worst]:.4f}", ""),
        ]
    console.table(f"Merged and quantized again, on {len(examples):,} rows of {split}", ("", "before", "after", "difference"), rows)
    return after
