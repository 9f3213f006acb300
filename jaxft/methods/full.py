"""Full fine-tuning: everything trains, but for what is left out by name."""

import dataclasses
import re
from typing import Any

import jax
import optax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.methods.base import Method, Params
from jaxft.methods.partition import cast, check_patterns, combine, first_match, mask_by_name, names_of, partition, separate
from jaxft.methods.rates import scaled
from jaxft.models import segments

_LAYER = re.compile(rf"{segments.LAYERS}/(\d+)/")
_BEFORE = "embed"  # what the names of what comes before the layers hold


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains every parameter that no pattern of `exclude` matches.

    With `layer_decay` below 1, a layer's learning rate is that factor times the one above it (Howard & Ruder 2018, arXiv:1801.06146);
    what comes before the layers is one layer further down, what comes after them trains at the whole rate.

    >>> Full(exclude=("embed",)).exclude
    ('embed',)
    """

    exclude: tuple[str, ...] = ()  # patterns of what stays frozen
    layer_decay: float = 1.0  # learning rate of a layer, as a share of the one above

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.layer_decay <= 1.0:
            raise UserError(f"method.layer_decay is a factor above 0 and up to 1, not {self.layer_decay}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params`, layers grouped by what trains; raises `UserError` where a pattern matches nothing."""
        check_patterns(self.exclude, names_of(params), "method.exclude")
        return separate(params, self._trains)

    def mask(self, params: Params) -> Any:
        """Returns True at everything that isn't left out."""
        return mask_by_name(params, self._trains)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` in their compute type."""
        return cast(params, self.mask(params), model.dtype)

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer with each layer's rate decayed."""
        return inner if self.layer_decay == 1.0 else optax.chain(inner, optax.stateless(self._decayed))

    def _decayed(self, updates: Any, params: Any = None) -> Any:
        depth = sum(len(layers) for layers in segments.spans(updates))

        def factor(name: str) -> float:
            if match := _LAYER.match(name):
                return self.layer_decay ** (depth - 1 - int(match[1]))
            return self.layer_decay**depth if _BEFORE in name.partition("/")[0] else 1.0

        own, others = partition(updates, self.mask(updates))
        return combine(scaled(own, factor), others)

    def _trains(self, name: str) -> bool:
        return first_match(self.exclude, name) is None
