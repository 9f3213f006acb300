"""LoRA: a low-rank difference beside frozen kernels (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError
from jaxft.methods.base import Method
from jaxft.methods.partition import check_patterns, first_match
from jaxft.models import segments
from jaxft.models.node import Kernel, Node, dense, dot, is_node, node

Params = dict[str, Any]
KERNEL = "kernel"  # what the families call a linear layer's weight


@jax.custom_vjp
def _narrow(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x (tokens, in) times a narrow matrix (in, rank).

    The matrix's gradient is made as (rank, in), long rows that vector units fill, and then turned; measured on CPU, that takes a third
    of the time of making it as it is stored.
    """
    return x @ matrix


def _narrow_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ matrix, (x, matrix)


def _narrow_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = kept
    turned = jax.lax.optimization_barrier(gradient.T @ x)  # without it, XLA makes the product as it is stored
    return gradient @ matrix.T, turned.T


_narrow.defvjp(_narrow_forward, _narrow_backward)


@node
@dataclasses.dataclass(frozen=True)
class LoRAKernel(Node):
    """base + scale * lora_a @ lora_b, never formed while training.

    Fields, without the layer axis: base (in, out), lora_a (in, rank), lora_b (rank, out) float32, scale () float32, and dropout, the
    rate () float32 on the low-rank branch's input, or None for none.
    """

    base: Kernel
    lora_a: jax.Array
    lora_b: jax.Array
    scale: jax.Array
    dropout: jax.Array | None

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        low = x
        if self.dropout is not None and rng is not None:
            keep = jax.random.bernoulli(rng, 1.0 - self.dropout, x.shape)
            low = jnp.where(keep, x / (1.0 - self.dropout).astype(x.dtype), 0)
        low = _narrow(low, self.lora_a.astype(x.dtype)) * self.scale.astype(x.dtype)
        return dot(x, self.base, rng) + low @ self.lora_b.astype(x.dtype)

    def dense(self) -> jax.Array:
        difference = jnp.matmul(self.lora_a, self.lora_b, precision="highest")
        return dense(self.base) + self.scale[..., None, None] * difference

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def placement(self, spec: P) -> Any:
        rows, columns = (*spec, None, None)[:2]
        base = self.base.placement(spec) if is_node(self.base) else spec
        made: Any = LoRAKernel  # a node of specs, not of arrays
        return made(base, P(rows, None), P(None, columns), P(), None if self.dropout is None else P())


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Trains lora_a and lora_b beside the kernels that `targets` choose; everything else is frozen.

    With lora_b zero the model starts as the base. lora_a starts uniform in +-1/sqrt(in), as peft's does.

    >>> LoRA(rank=8, alpha=16.0, targets=("q_proj", "v_proj")).rank
    8
    """

    rank: int = 8  # columns of lora_a, rows of lora_b
    alpha: float = 16.0  # the difference is scaled by alpha / rank
    dropout: float = 0.0  # on the low-rank branch's input
    targets: tuple[str, ...] = ("layers",)  # patterns of kernels; layers: every linear layer but the output head
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    rank_pattern: tuple[tuple[str, int], ...] = ()  # (pattern, rank) for some of the targets, first match wins
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # (pattern, alpha) for some of the targets, first match wins

    def __post_init__(self) -> None:
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            if rank < 1:
                raise UserError(f"method.rank: a LoRA's rank is at least 1, not {rank}.")
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not alpha > 0:
                raise UserError(f"method.alpha: a LoRA's alpha is above 0, not {alpha}: the difference is scaled by it.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"method.dropout is a rate from 0 up to, not including, 1, not {self.dropout}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a LoRA around each target's kernel; raises `UserError` where a pattern matches nothing."""
        self._check(params)
        depth = sum(len(layers) for layers in segments.spans(params))
        per_layer: list[list[tuple[str, int]]] = [[] for _ in range(depth)]
        for leaf in segments.leaves(params, is_leaf=is_node):
            if leaf.layers is not None:
                for layer, name in zip(leaf.layers, leaf.names, strict=True):
                    per_layer[layer].append((leaf.path[-2], self._rank_of(leaf, name)))
        params = segments.regroup(params, lambda layer: tuple(per_layer[layer]))
        return segments.map_leaves(lambda leaf: self._around(rng, leaf), params, is_leaf=is_node)

    def mask(self, params: Params) -> Any:
        """Returns True at the lora_a and lora_b of each target."""

        def trains(leaf: segments.Leaf) -> bool:
            *_, field = leaf.path
            return field in ("lora_a", "lora_b") and first_match(self.targets, leaf.names[0].removesuffix(f"/{field}")) is not None

        return segments.map_leaves(trains, params)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels: base + scale * lora_a @ lora_b in float32, cast once to the base's type."""

        def fold(value: Any) -> Any:
            return value.dense().astype(value.dtype) if isinstance(value, LoRAKernel) else value

        return jax.tree.map(fold, params, is_leaf=is_node)

    def rank_of(self, name: str) -> int:
        """Returns the rank at the target of this name."""
        return self._pattern(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns alpha at the target of this name."""
        return self._pattern(self.alpha_pattern, name, self.alpha)

    def scale_of(self, name: str) -> float:
        """Returns the factor on lora_a @ lora_b of the kernel of this name."""
        rank, alpha = self.rank_of(name), self.alpha_of(name)
        return alpha / rank**0.5 if self.rslora else alpha / rank

    @staticmethod
    def _pattern(pairs: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
        found = first_match([pattern for pattern, _ in pairs], name)
        return default if found is None else pairs[found][1]

    def _check(self, params: Params) -> None:
        kernels = [name for leaf in segments.leaves(params, is_leaf=is_node) if leaf.path[-1] == KERNEL for name in leaf.names]
        check_patterns(self.targets, kernels, "method.targets")
        chosen = [name for name in kernels if first_match(self.targets, name) is not None]
        check_patterns([pattern for pattern, _ in self.rank_pattern], chosen, "method.rank_pattern")
        check_patterns([pattern for pattern, _ in self.alpha_pattern], chosen, "method.alpha_pattern")

    def _rank_of(self, leaf: segments.Leaf, name: str) -> int:
        """The rank at a leaf's layer, 0 where it isn't a target."""
        if leaf.path[-1] != KERNEL or first_match(self.targets, name) is None:
            return 0
        rank = self.rank_of(name)
        if rank > min(leaf.shape):
            raise UserError(f"method.rank: {name} is {leaf.shape[0]} x {leaf.shape[1]}; a rank of {rank} is more than it can have.")
        return rank

    def _around(self, rng: jax.Array, leaf: segments.Leaf) -> Any:
        rank = self._rank_of(leaf, leaf.names[0])
        if not rank:
            return leaf.value
        rows, columns = leaf.shape
        bound = rows**-0.5
        lora_a = jnp.stack([jax.random.uniform(_key(rng, name), (rows, rank), jnp.float32, -bound, bound) for name in leaf.names])
        lora_b = jnp.zeros((len(leaf.names), rank, columns), jnp.float32)
        scale = jnp.asarray([self.scale_of(name) for name in leaf.names], jnp.float32)
        dropout = jnp.full(len(leaf.names), self.dropout, jnp.float32) if self.dropout else None
        made = LoRAKernel(leaf.value, lora_a, lora_b, scale, dropout)
        if leaf.layers is None:
            made = dataclasses.replace(jax.tree.map(lambda part: part[0], dataclasses.replace(made, base=None)), base=leaf.value)
        return made


def _key(rng: jax.Array, name: str) -> jax.Array:
    """A key that depends on the kernel's name alone, not on how layers are grouped."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)
