"""Partial fine-tuning: some layers, or whatever patterns choose."""

import dataclasses
import re
from typing import Any

import jax
import optax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.methods.base import Method, Params
from jaxft.methods.partition import cast, check_layers, check_patterns, first_match, mask_by_name, names_of, separate
from jaxft.methods.rates import train_from
from jaxft.models import segments

_LAYER = re.compile(rf"{segments.LAYERS}/(\d+)/")


@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """Trains whole layers, chosen by their numbers, and whatever `targets` match; everything else is frozen.

    Frozen layers below the lowest one that trains take no backward pass. The output head alone is `targets=("lm_head",)`, the norms alone
    are NormTuning. With `unfreeze_every`, training starts with the topmost of the chosen layers and takes in one more below it after
    every so many steps (gradual unfreezing, Howard & Ruder 2018, arXiv:1801.06146); `targets` train from the start.

    >>> Partial(last=4).last
    4
    """

    last: int = 0  # layers at the top
    first: int = 0  # layers at the bottom
    layers: tuple[int, ...] = ()  # layers by number, 0 is the lowest
    targets: tuple[str, ...] = ()  # patterns of leaves, beside the layers
    unfreeze_every: int = 0  # steps until the next lower layer trains too; 0: all from the start

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("last", "first", "unfreeze_every"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} is 0 or more, not {getattr(self, name)}.")
        if not (self.last or self.first or self.layers or self.targets):
            raise UserError("Partial trains nothing: set method.last, method.first, method.layers or method.targets.")
        if self.unfreeze_every and not (self.last or self.first or self.layers):
            raise UserError("method.unfreeze_every is for layers, and none is chosen: set method.last, method.first or method.layers.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params`, layers grouped by what trains; raises `UserError` for layers that don't exist and patterns without a match."""
        depth = _depth(params)
        for name in ("last", "first"):
            if getattr(self, name) > depth:
                raise UserError(f"method.{name} is {getattr(self, name)}; the model has {depth} layers.")
        check_layers(self.layers, depth, "method.layers")
        check_patterns(self.targets, names_of(params), "method.targets")
        return separate(params, self._chooses(depth))

    def mask(self, params: Params) -> Any:
        """Returns True at the chosen layers and targets."""
        return mask_by_name(params, self._chooses(_depth(params)))

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` in their compute type."""
        return cast(params, self.mask(params), model.dtype)

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer, with layers joining one by one where `unfreeze_every` is set."""
        if not self.unfreeze_every:
            return inner

        def starts(tree: Any) -> dict[int, int]:
            order = sorted(self._layers(_depth(tree)), reverse=True)
            return {layer: place * self.unfreeze_every for place, layer in enumerate(order)}

        def start(name: str, tree: Any) -> int:
            match = _LAYER.match(name)
            return 0 if match is None or first_match(self.targets, name) is not None else starts(tree).get(int(match[1]), 0)

        return train_from(inner, start)

    def _layers(self, depth: int) -> set[int]:
        return {*range(self.first), *range(depth - self.last, depth), *self.layers}

    def _chooses(self, depth: int) -> Any:
        layers = self._layers(depth)

        def trains(name: str) -> bool:
            match = _LAYER.match(name)
            return (match is not None and int(match[1]) in layers) or first_match(self.targets, name) is not None

        return trains


def _depth(params: Params) -> int:
    return sum(len(layers) for layers in segments.spans(params))
