"""What a fine-tuning method is: two pure functions."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn

Params = dict[str, Any]


@runtime_checkable
class Method(Protocol):
    """A fine-tuning method: a frozen dataclass of its settings, with pure functions on parameters."""

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with the method's leaves added, or with some leaves stored in another form."""

    def mask(self, params: Params) -> Any:
        """Returns which leaves train: a pytree of bool with the structure of `params` (an optax mask)."""

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` with the method folded into the base; raises `UserError` where that isn't possible."""
