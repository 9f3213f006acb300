"""Bottleneck adapters: small networks after a layer's sub-layers, or beside them (Houlsby et al. 2019, arXiv:1902.00751)."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.methods.base import Method, Params
from jaxft.methods.partition import check_layers
from jaxft.models import segments
from jaxft.models.dropout import dropped
from jaxft.models.layers import ACTIVATIONS
from jaxft.models.node import Join

SITES = ("attention_output", "mlp_output")
INPUTS = ("output", "sum", "residual")
STARTS = ("mam_adapter", "bert", "houlsby")  # AdapterHub's names
TRAINED_SCALES = ("", "learned", "channel")
NONLINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = ACTIVATIONS | {
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "leakyrelu": nn.leaky_relu,
}
_BERT, _HOULSBY = 0.02, 0.01  # standard deviations; houlsby cuts at two of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer's kernel (in, out) and bias (out,), float32."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel.astype(x.dtype) + self.bias.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BottleneckAdapter(Join):
    """residual + output + scale * up(activation(down(x))), where x is the output, the sum, or the residual.

    The sum is residual + output, after the layer's norm where that comes next (BERT).

    Fields, without the layer axis: down (hidden_size, size), up (size, hidden_size), scale () or (1,) or (hidden_size,) float32, and
    dropout, the rate () float32 on what is added, or None for none.
    """

    down: Projection
    up: Projection
    scale: jax.Array
    dropout: jax.Array | None
    activation: str = dataclasses.field(metadata={"static": True})
    input: str = dataclasses.field(metadata={"static": True})

    def join(self, residual: jax.Array, output: jax.Array, rng: jax.Array | None, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
        joined = residual + output
        x = norm(joined) if self.input == "sum" else {"output": output, "residual": residual}[self.input]
        added = self.up(NONLINEARITIES[self.activation](self.down(x))) * self.scale.astype(x.dtype)
        return joined + dropped(added, self.dropout, rng)


@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Trains a bottleneck at chosen places of every layer; everything else is frozen.

    The defaults are Houlsby's adapter, after attention and after the MLP. `seq_bn` is the one of Pfeiffer et al. 2020
    (arXiv:2005.00247), after the MLP alone; `par_bn` the scaled parallel one of He et al. 2021 (arXiv:2110.04366), beside the MLP. The
    three have AdapterHub's names and settings, but for the start: with mam_adapter, the default, `up` is zero and the model starts as
    the base. AdapterHub starts sequential ones by bert, which adds noise of about size 0.02 ** 2 * sqrt(hidden_size * size) times the
    input's.

    An adapter can't be merged.

    >>> Bottleneck.seq_bn(reduction=8.0).sites
    ('mlp_output',)
    """

    sites: tuple[str, ...] = SITES  # where: attention_output, mlp_output
    input: str = "output"  # what it reads: a sub-layer's output, its sum with the residual (normed in BERT), or the residual (parallel)
    reduction: float = 16.0  # hidden_size over the bottleneck's size
    layer_reductions: tuple[tuple[int, float], ...] = ()  # (layer, reduction) where layers differ from it
    size: int = 0  # the bottleneck's size; 0: by the reduction
    activation: str = "swish"  # relu, swish, silu, gelu, gelu_new, tanh, sigmoid, leakyrelu
    scaling: float = 1.0  # a factor on what is added
    trained_scale: str = ""  # in the place of scaling, a trained one that starts at 1: learned (a number), channel (one a feature)
    leave_out: tuple[int, ...] = ()  # layers without an adapter, 0 is the lowest
    dropout: float = 0.0  # on what is added
    init_weights: str = "mam_adapter"  # mam_adapter: starts as the base; bert, houlsby: normal of 0.02, cut normal of 0.01

    @classmethod
    def double_seq_bn(cls, **changes: Any) -> "Bottleneck":
        """Returns Houlsby's adapter: after attention and after the MLP, swish, a sixteenth of the width."""
        return cls(**changes)

    @classmethod
    def seq_bn(cls, **changes: Any) -> "Bottleneck":
        """Returns Pfeiffer's adapter: after the MLP's sum with the residual, relu, a sixteenth of the width."""
        return cls(**({"sites": ("mlp_output",), "input": "sum", "activation": "relu"} | changes))

    @classmethod
    def par_bn(cls, **changes: Any) -> "Bottleneck":
        """Returns He's scaled parallel adapter: beside the MLP, relu, half the width, times 4."""
        preset: dict[str, Any] = {"sites": ("mlp_output",), "input": "residual", "activation": "relu", "reduction": 2.0, "scaling": 4.0}
        return cls(**(preset | changes))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise UserError(f"method.sites: name each place once: {', '.join(SITES)}.")
        choices = {"input": INPUTS, "init_weights": STARTS, "activation": NONLINEARITIES, "trained_scale": TRAINED_SCALES}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise unknown(f"method.{field}", getattr(self, field), known)
        for site in self.sites:
            if site not in SITES:
                raise unknown("place in method.sites", site, SITES)
        for reduction in (self.reduction, *(reduction for _, reduction in self.layer_reductions)):
            if not 0 < reduction < math.inf:
                raise UserError(f"method.reduction is a finite factor above 0, not {reduction}.")
        if self.size < 0 or (self.size and self.layer_reductions):
            raise UserError("method.size is at least 1, or 0 for a size by the reduction; layer_reductions don't go with a size.")
        if self.trained_scale and self.scaling != 1.0:
            raise UserError("method.scaling is the fixed factor: with method.trained_scale it stays 1.")
        if self.scaling == 0.0:
            raise UserError("method.scaling is 0: what is added would be nothing.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"method.dropout is a rate from 0 up to, not including, 1, not {self.dropout}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with an adapter at each place.

        Raises `UserError` where there is one already, and for layers that the model doesn't have.
        """
        depth = sum(len(layers) for layers in segments.spans(params))
        hidden = model.config.hidden_size
        self._check_layers(depth)
        params = segments.refine(params, lambda layer: self.size_at(layer, hidden))
        stacks = {}
        for layers in segments.spans(params):
            stack = params[segments.LAYERS][segments.key(layers)]
            if taken := [site for site in self.sites if site in stack]:
                raise UserError(f"There is something at {taken[0]} of these parameters already: one adapter a place.")
            size = self.size_at(layers[0], hidden)
            made = {site: self._stacked(rng, site, layers, hidden, size) for site in self.sites} if size else {}
            stacks[segments.key(layers)] = stack | made
        return params | {segments.LAYERS: stacks}

    def mask(self, params: Params) -> Any:
        """Returns True at the adapters' projections, and at their scale where that trains."""

        def trains(leaf: segments.Leaf) -> bool:
            if leaf.layers is None or leaf.path[2] not in self.sites or len(leaf.path) < 4:
                return False
            return leaf.path[3] in ("down", "up") or (leaf.path[3] == "scale" and bool(self.trained_scale))

        return segments.map_leaves(trains, params)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Raises `UserError`: what has an activation in it is no part of a kernel."""
        raise UserError(
            "A bottleneck adapter can't be merged: its activation stands between two kernels. "
            "Keep it beside the base: jaxft.save_adapter(folder, model, params, method), or --mode=export --format=adapterhub."
        )

    def size_at(self, layer: int, hidden_size: int) -> int:
        """Returns the bottleneck's size at a layer, 0 where it has none."""
        if layer in self.leave_out:
            return 0
        reduction = dict(self.layer_reductions).get(layer, self.reduction)
        return self.size or max(int(hidden_size // reduction), 1)  # as AdapterHub rounds

    def _check_layers(self, depth: int) -> None:
        for field, layers in (("leave_out", self.leave_out), ("layer_reductions", [layer for layer, _ in self.layer_reductions])):
            check_layers(layers, depth, f"method.{field}")
        if set(self.leave_out) >= set(range(depth)):
            raise UserError("method.leave_out leaves every layer out: nothing trains.")

    def _stacked(self, rng: jax.Array, site: str, layers: Sequence[int], hidden: int, size: int) -> BottleneckAdapter:
        """The adapters of a segment; each one's numbers depend on its name alone, not on how layers are grouped."""
        count = len(layers)
        keys = [jax.random.split(jax.random.fold_in(rng, zlib.crc32(f"layers/{n}/{site}".encode()) & 0x7FFFFFFF)) for n in layers]
        down = jnp.stack([self._drawn(key[0], (hidden, size)) for key in keys])
        up = jnp.stack([self._drawn(key[1], (size, hidden)) for key in keys])
        if self.init_weights == "mam_adapter":
            up = jnp.zeros_like(up)
        scale = {"": (), "learned": (1,), "channel": (hidden,)}[self.trained_scale]
        return BottleneckAdapter(
            Projection(down, jnp.zeros((count, size), jnp.float32)),
            Projection(up, jnp.zeros((count, hidden), jnp.float32)),
            jnp.full((count, *scale), self.scaling, jnp.float32),
            jnp.full(count, self.dropout, jnp.float32) if self.dropout else None,
            self.activation,
            self.input,
        )

    def _drawn(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if self.init_weights == "bert":
            return _BERT * jax.random.normal(key, shape, jnp.float32)
        if self.init_weights == "houlsby":
            return _HOULSBY * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        bound = shape[0] ** -0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
