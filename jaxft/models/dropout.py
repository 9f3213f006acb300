"""The rates of a model's dropout, and how a run sets others than the model came with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError

KINDS = ("hidden_dropout", "attention_dropout", "classifier_dropout")
OWN = -1.0  # stands for the rate that the model's config.json has


def with_dropout(model: Any, rates: Mapping[str, float]) -> Any:
    """Returns the model with these rates in the place of its own; what its config.json says stays as it is.

    Args:
      model: its configuration's `dropouts` says which kinds it has, and in which of its fields.
      rates: by kind, as KINDS; `OWN` leaves one as it is.

    Raises:
      UserError: a rate that isn't one, or of a kind that the model hasn't.
    """
    given = {kind: rate for kind, rate in rates.items() if rate != OWN}
    check(given)
    known = model.config.dropouts
    for kind in given:
        if kind not in known:
            name = model.config.architecture
            raise UserError(f"config.model.{kind} is set, but {name} has no such dropout. It has: {', '.join(known)}. Leave it out.")
    fields = {field: rate for kind, rate in given.items() for field in known[kind]}
    return model.clone(config=dataclasses.replace(model.config, **fields))


def check(rates: Mapping[str, float]) -> None:
    """Raises `UserError` for a rate that isn't one."""
    for kind, rate in rates.items():
        if rate != OWN and not 0.0 <= rate < 1.0:
            raise UserError(f"config.model.{kind} is a rate from 0 up to, not including, 1, or -1 for the model's own, not {rate}.")
