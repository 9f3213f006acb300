"""(IA)^3: learned vectors that scale keys, values and the feed-forward layer's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.methods.base import Method, Params
from jaxft.methods.kernels import chosen_kernels, fold, mask_of_nodes, wrap
from jaxft.methods.partition import check_patterns, first_match
from jaxft.models.node import Around, Kernel, dense, dot, linear, node
from jaxft.models.segments import Leaf

ANY = ".*"  # a pattern that matches every name


@dataclasses.dataclass(frozen=True)
class Scaled(Around):
    """A kernel with a learned vector. Fields, without the layer axis: base (in, out), scale float32."""

    base: Kernel
    scale: jax.Array


@node
@dataclasses.dataclass(frozen=True)
class ScaledOutput(Scaled):
    """scale (out,) times what the layer gives, its bias included."""

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return _times(dot(x, self.base, rng), self.scale)

    def linear(self, x: jax.Array, bias: jax.Array | None, rng: jax.Array | None) -> jax.Array:
        return _times(linear(x, self.base, bias, rng), self.scale)

    def bias(self, bias: jax.Array | None) -> jax.Array | None:
        added = super().bias(bias)
        return None if added is None else _times(added, self.scale)

    def dense(self) -> jax.Array:
        return dense(self.base) * self.scale[..., None, :]

    def placement(self, spec: P) -> Any:
        made: Any = ScaledOutput  # a node of specs, not of arrays
        return made(self.base_placement(spec), P((*spec, None, None)[1]))


@node
@dataclasses.dataclass(frozen=True)
class ScaledInput(Scaled):
    """scale (in,) times what the layer gets."""

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return dot(_times(x, self.scale), self.base, rng)

    def dense(self) -> jax.Array:
        return dense(self.base) * self.scale[..., None]

    def placement(self, spec: P) -> Any:
        made: Any = ScaledInput
        return made(self.base_placement(spec), P((*spec, None)[0]))


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x times a float32 scale, rounded to x's type once: near one, a bfloat16 scale would know no steps below 1/128."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Trains a vector for each target, which scales the layer's output, or its input where `feedforward` matches too.

    Vectors start at one, so the model starts as the base. Weight decay leaves them alone. Without targets they are the paper's: what a
    model's family names keys, values and the feed-forward layers' output.

    >>> IA3(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)).feedforward
    ('down_proj',)
    """

    targets: tuple[str, ...] = ()  # patterns of kernels; empty: the model's keys, values and feed-forward outputs
    feedforward: tuple[str, ...] = ()  # patterns of targets whose input is scaled in the output's stead; as targets where both are empty

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a vector beside each target's kernel; raises `UserError` where a pattern matches nothing."""
        method = self._for(model)
        chosen = chosen_kernels(params, method.targets)
        check_patterns(method.feedforward, chosen, "method.feedforward")
        return wrap(params, method._kind, method._around)

    def mask(self, params: Params) -> Any:
        """Returns True at the targets' vectors."""
        return mask_of_nodes(params, Scaled, ("scale",), self.targets or (ANY,))

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels and biases, each times its vector in float32, cast once to the base's type."""
        return fold(params, Scaled, self.is_target)

    def is_target(self, name: str) -> bool:
        """Returns whether the kernel of this name gets a vector; without targets, any that `init` gave one is its own."""
        return first_match(self.targets or (ANY,), name) is not None

    def _for(self, model: Any) -> "IA3":
        """The method with the targets that it has in a model."""
        if self.targets:
            return self
        roles = model.config.roles
        targets = tuple(dict.fromkeys((roles.keys, roles.values, roles.mlp_output)))
        return IA3(targets, self.feedforward or (roles.mlp_output,))

    def _kind(self, name: str) -> str | None:
        """Which side of a kernel is scaled, None where it is no target."""
        if not self.is_target(name):
            return None
        return "output" if first_match(self.feedforward, name) is None else "input"

    def _around(self, leaf: Leaf) -> Scaled:
        rows, columns = leaf.shape
        layers = () if leaf.layers is None else (len(leaf.layers),)
        if self._kind(leaf.names[0]) == "input":
            return ScaledInput(leaf.value, jnp.ones((*layers, rows), jnp.float32))
        return ScaledOutput(leaf.value, jnp.ones((*layers, columns), jnp.float32))
