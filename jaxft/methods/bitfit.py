"""BitFit: biases alone (Ben Zaken et al. 2021, arXiv:2106.10199)."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from jaxft.methods.base import Method, Params
from jaxft.methods.partition import cast, check_targets, first_match, mask_by_name, names_of, separate


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Trains the biases, or those of them that patterns choose: `("q_proj/bias", "mlp/.*/bias")`; a head is one more pattern.

    Models without biases, as Llama, Mistral and the bundled SmolLM2, have nothing here to train. Encoders and GPT-2 have them everywhere
    (the experiment bitfit_bert_sentiment), Qwen2 some:
    `--experiment=lora_llama2 --config.model.source=Qwen/Qwen2.5-0.5B-Instruct --config.method="BitFit()"`.

    >>> BitFit(targets=("q_proj/bias",)).targets
    ('q_proj/bias',)
    """

    targets: tuple[str, ...] = ("bias",)  # patterns of what trains

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params`, layers grouped by what trains; raises `UserError` where a pattern matches nothing."""
        check_targets(self.targets, names_of(params))
        return separate(params, self._trains)

    def mask(self, params: Params) -> Any:
        """Returns True at the targets."""
        return mask_by_name(params, self._trains)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` in their compute type."""
        return cast(params, self.mask(params), model.dtype)

    def _trains(self, name: str) -> bool:
        return first_match(self.targets, name) is not None
