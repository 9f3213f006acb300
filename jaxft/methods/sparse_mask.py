"""Sparse masks: a fixed small subset of the weights trains.

Random, large or important weights: Bhardwaj et al. 2024 (SHiRA, arXiv:2406.13175); chosen by Fisher information: Sung et al. 2021
(FISH mask, arXiv:2111.09839).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError, unknown
from jaxft.methods.base import Material, Method, Params
from jaxft.methods.kernels import chosen_kernels, fold, is_kernel, key_of, mask_of_nodes, stacked, wrap
from jaxft.methods.partition import first_match
from jaxft.models import segments
from jaxft.models.node import Around, Kernel, dense, dot, is_node, node
from jaxft.models.segments import Leaf

CHOICES = ("random", "magnitude", "gradient", "fisher")
FROM_GRADIENTS = ("gradient", "fisher")


def _sum(shape: tuple[int, ...], base: Kernel | None, rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """base, zero where it is None, + the sparse difference, (in, out) float32."""
    return _added(jnp.zeros(shape, jnp.float32) if base is None else dense(base), rows, columns, values)


def _added(whole: jax.Array, rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    return whole.at[rows, columns].add(values, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    shape: tuple[int, ...], x: jax.Array, base: Kernel | None, rows: jax.Array, columns: jax.Array, values: jax.Array
) -> jax.Array:
    """x (tokens, in) times base, zero where it is None, plus the sparse difference, of a shape (in, out): (tokens, out).

    The sum is made for the product alone and made again in the backward pass: of what is kept, nothing is larger than the subset. It is
    rounded to x's type once, as a merged kernel is.
    """
    return x @ _sum(shape, base, rows, columns, values).astype(x.dtype)


def _forward(
    shape: tuple[int, ...], x: jax.Array, base: Kernel | None, rows: jax.Array, columns: jax.Array, values: jax.Array
) -> tuple[jax.Array, Any]:
    return _product(shape, x, base, rows, columns, values), (x, base, rows, columns, values)


def _backward(shape: tuple[int, ...], kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    x, base, rows, columns, values = kept
    whole = jnp.matmul(x.T, gradient, preferred_element_type=jnp.float32)
    of_base = None if base is None else jax.vjp(dense, base)[1](whole)[0]
    x_gradient = gradient @ _sum(shape, base, rows, columns, values).astype(x.dtype).T
    return x_gradient, of_base, None, None, whole[rows, columns]


_product.defvjp(_forward, _backward)


@node
@dataclasses.dataclass(frozen=True)
class SparseKernel(Around):
    """base + a sparse difference at fixed places.

    Fields, without the layer axis: base (in, out), rows and columns (count,) int32, no place twice, values (count,) float32.
    """

    base: Kernel
    rows: jax.Array
    columns: jax.Array
    values: jax.Array

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        places = (self.rows, self.columns, self.values)
        if not isinstance(self.base, Around):
            return _product(self.shape, x, self.base, *places)
        # another method's node may drop, and its dense form may cost more than a product
        return dot(x, self.base, rng) + _product(self.shape, x, None, *places)

    def dense(self) -> jax.Array:
        return (_added if self.rows.ndim == 1 else jax.vmap(_added))(dense(self.base), self.rows, self.columns, self.values)

    def placement(self, spec: P) -> Any:
        made: Any = SparseKernel  # a node of specs, not of arrays
        return made(self.base_placement(spec), P(), P(), P())


@dataclasses.dataclass(frozen=True)
class SparseMask(Method):
    """Trains a difference at fixed places of each target's kernel; gradient, moments and checkpoints are as large as the subset.

    A kernel gets as many places as a LoRA of `rank` has numbers, rank * (in + out), or the share `density` of its weights. `choice` says
    which: `random`; `magnitude`, the largest weights; `gradient`, where the mean gradient of some training batches is largest; `fisher`,
    where the mean of its square is. The last two look at `score_batches` batches before training starts, one kernel's gradient as large
    as the kernel: for them `init` alone isn't enough, see `init_from_scores`.

    >>> SparseMask(density=0.01, choice="magnitude").choice
    'magnitude'
    """

    rank: int = 8  # as many places as a LoRA of this rank has numbers
    density: float = 0.0  # share of a kernel's weights in rank's stead; 0: by rank
    choice: str = "random"  # random, magnitude, gradient, fisher
    score_batches: int = 4  # micro-batches that gradient and fisher look at
    targets: tuple[str, ...] = ("layers",)  # patterns of kernels; layers: every linear layer but the output head

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"method.rank is at least 1, not {self.rank}.")
        if not 0.0 <= self.density < 1.0:
            raise UserError(f"method.density is a share from 0 up to, not including, 1, not {self.density}.")
        if self.density and self.rank != SparseMask.rank:
            raise UserError(f"method.density, {self.density}, stands in the place of method.rank, {self.rank}: set one of them.")
        if self.choice not in CHOICES:
            raise unknown("method.choice", self.choice, CHOICES)
        if self.score_batches < 1:
            raise UserError(f"method.score_batches is 1 or more, not {self.score_batches}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a difference of zero at places of each target's kernel.

        Raises `UserError` where a pattern matches nothing, a kernel has too few weights, or the choice goes by gradients.
        """
        if self.choice in FROM_GRADIENTS:
            raise UserError(
                f"method.choice is {self.choice}: places are chosen by gradients of training batches. launch.py takes them; in a program: "
                "scores = jaxft.train.scores.gradient_scores(...); params = method.init_from_scores(rng, model, params, scores)."
            )
        self.check_fits(params)
        return wrap(params, self._kind, lambda leaf: self._around(rng, leaf, None))

    def begin(self, rng: jax.Array, model: nn.Module, params: Params, material: Material) -> Params:
        """Returns what `init` does, or `init_from_scores` where the choice goes by gradients."""
        if self.choice not in FROM_GRADIENTS:
            return self.init(rng, model, params)
        self.check_fits(params)
        found = material.scores(params, self.is_target, self.choice, self.score_batches)
        return self.init_from_scores(rng, model, params, found)

    def init_from_scores(self, rng: jax.Array, model: nn.Module, params: Params, scores: Params) -> Params:
        """Returns `params` with a difference of zero at the places of each target's kernel that score highest.

        Args:
          rng: not used by choices that go by scores.
          model: as for `init`.
          params: as for `init`.
          scores: of the structure of `params` as given, an array of a kernel's shape where there is a target.
        """
        self.check_fits(params)
        found = {
            name: leaf.part(index)
            for leaf in segments.leaves(scores, is_leaf=is_node)
            if is_kernel(leaf)
            for index, name in enumerate(leaf.names)
            if self.is_target(name)
        }
        return wrap(params, self._kind, lambda leaf: self._around(rng, leaf, found))

    def mask(self, params: Params) -> Any:
        """Returns True at the differences' values."""
        return mask_of_nodes(params, SparseKernel, ("values",), self.targets)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels: base plus the difference in float32, cast once to the base's type."""
        return fold(params, SparseKernel)

    def count_of(self, rows: int, columns: int) -> int:
        """Returns how many places a kernel of this shape gets.

        >>> SparseMask(rank=2).count_of(10, 20), SparseMask(density=0.1).count_of(10, 20)
        (60, 20)
        """
        return max(round(self.density * rows * columns), 1) if self.density else self.rank * (rows + columns)

    def is_target(self, name: str) -> bool:
        """Returns whether the kernel of this name gets a difference."""
        return first_match(self.targets, name) is not None

    def check_fits(self, params: Params, field: str = "method.rank") -> None:
        """Raises `UserError` where a pattern matches nothing, and for a kernel of fewer weights than `field` asks for."""
        chosen_kernels(params, self.targets)
        for leaf in segments.leaves(params, is_leaf=is_node):
            if not is_kernel(leaf) or not any(map(self.is_target, leaf.names)):
                continue
            (rows, columns), count = leaf.shape, self.count_of(*leaf.shape)
            if count > rows * columns:
                raise UserError(
                    f"{field}: {leaf.title} is {rows} x {columns}; a rank of {self.rank} asks for {count:,} of its "
                    f"{rows * columns:,} weights. The greatest rank it can have is {rows * columns // (rows + columns)}."
                )

    def _kind(self, name: str) -> bool | None:
        return self.is_target(name) or None

    def _around(self, rng: jax.Array, leaf: Leaf, scores: dict[str, jax.Array] | None) -> SparseKernel:
        rows, columns = leaf.shape
        count = self.count_of(rows, columns)
        places = []
        for index, name in enumerate(leaf.names):
            if scores is not None:
                score: Callable[[], jax.Array] = functools.partial(scores.__getitem__, name)
            elif self.choice == "magnitude":
                score = functools.partial(_magnitude, leaf, index)
            else:
                score = functools.partial(jax.random.uniform, key_of(rng, name), (rows, columns))
            places.append(highest(score(), count))
        found = stacked(leaf, places)
        return SparseKernel(leaf.value, found[..., 0, :], found[..., 1, :], jnp.zeros(found[..., 0, :].shape, jnp.float32))


def _magnitude(leaf: Leaf, index: int) -> jax.Array:
    return jnp.abs(dense(leaf.part(index)))


def highest(scores: jax.Array, count: int) -> jax.Array:
    """Returns rows and columns of the highest of `scores` (in, out), (2, count) int32, column by column, as SHiRA's files order them.

    >>> highest(jnp.array([[3.0, 1.0], [2.0, 5.0]]), 2).tolist()
    [[0, 1], [0, 1]]
    """
    _, flat = jax.lax.top_k(scores.T.reshape(-1), count)
    columns, rows = jnp.divmod(jnp.sort(flat), scores.shape[0])
    return jnp.stack([rows, columns]).astype(jnp.int32)


def scores_from_gradient(gradients: Params, choice: str) -> Params:
    """Returns what one batch's gradients add to the scores, of their structure: the gradients, or for `fisher` their squares.

    Scores are the mean over batches; for `gradient`, its size.
    """
    return jax.tree.map(jnp.square, gradients) if choice == "fisher" else gradients
