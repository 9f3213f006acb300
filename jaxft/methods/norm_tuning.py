"""Norm tuning: the scales and biases of the norms (Zhao et al. 2023, arXiv:2312.11420)."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from jaxft.methods.base import Method, Params
from jaxft.methods.partition import cast, check_targets, first_match, mask_by_name, names_of, separate


@dataclasses.dataclass(frozen=True)
class NormTuning(Method):
    """Trains every norm's scale, and its bias where it has one; or the norms that patterns choose.

    >>> NormTuning(targets=("input_norm", "post_attention_norm")).targets
    ('input_norm', 'post_attention_norm')
    """

    targets: tuple[str, ...] = (".*",)  # patterns of norms

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params`, layers grouped by what trains; raises `UserError` where a pattern matches no norm."""
        check_targets(self.targets, [name for name in names_of(params) if is_norm(name)])
        return separate(params, self.trains)

    def mask(self, params: Params) -> Any:
        """Returns True at the norms' leaves."""
        return mask_by_name(params, self.trains)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` in their compute type."""
        return cast(params, self.mask(params), model.dtype)

    def trains(self, name: str) -> bool:
        """Returns whether the leaf of this name trains."""
        return is_norm(name) and first_match(self.targets, name) is not None


def is_norm(name: str) -> bool:
    """Returns whether a leaf of this name is a norm's: the families name them so."""
    *_, module, _ = ("", *name.split("/"))
    return module.endswith("norm") or module.startswith("ln_")
