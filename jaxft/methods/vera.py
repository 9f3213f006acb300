"""VeRA: one pair of random matrices for all layers, scaled by small learned vectors (Kopiczko et al. 2023, arXiv:2310.11454)."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError, unknown
from jaxft.methods.base import Method, Params
from jaxft.methods.kernels import ALL_BIASES, NO_BIAS, check_biases, chosen_kernels, fold, is_kernel, mask_of_nodes, trains_bias, wrap
from jaxft.methods.partition import cast, first_match, mask_by_name
from jaxft.models import segments
from jaxft.models.attention import KEPT
from jaxft.models.dropout import dropped
from jaxft.models.node import Around, Kernel, Shared, dense, dot, is_node, node
from jaxft.models.segments import Leaf

BIASES = (NO_BIAS, ALL_BIASES, "vera_only")


@node
@dataclasses.dataclass(frozen=True)
class VeRAKernel(Around):
    """base + (vera_a[:in] * lambda_d) @ (vera_b[:, :out] * lambda_b), never formed while training.

    Fields, without the layer axis: base (in, out), vera_a (largest in, rank) and vera_b (rank, largest out) float32, which all kernels
    have in common, lambda_d (rank,) and lambda_b (out,) float32, and dropout, the rate () float32 on the branch's input, or None.
    """

    base: Kernel
    vera_a: Shared
    vera_b: Shared
    lambda_d: jax.Array
    lambda_b: jax.Array
    dropout: jax.Array | None

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        first, second = (part.astype(x.dtype) for part in self._projections())
        low = checkpoint_name(dropped(x, self.dropout, rng) @ first, KEPT) * self.lambda_d.astype(x.dtype)
        return dot(x, self.base, rng) + (low @ second) * self.lambda_b.astype(x.dtype)

    def dense(self) -> jax.Array:
        first, second = self._projections()
        difference = jnp.matmul(first * self.lambda_d[..., None, :], second, precision="highest")
        return dense(self.base) + difference * self.lambda_b[..., None, :]

    def _projections(self) -> tuple[jax.Array, jax.Array]:
        """What this kernel uses of the random matrices: (in, rank) and (rank, out)."""
        rows, columns = self.shape[-2:]
        return self.vera_a.value[:rows], self.vera_b.value[:, :columns]

    def placement(self, spec: P) -> Any:
        made: Any = VeRAKernel  # a node of specs, not of arrays
        base = self.base_placement(spec)
        everywhere: Any = P()
        dropout = None if self.dropout is None else P()
        return made(base, Shared(everywhere), Shared(everywhere), P(), P((*spec, None, None)[1]), dropout)


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Trains lambda_d and lambda_b of each target; the two random matrices between them are frozen and held once.

    With lambda_b zero the model starts as the base. The matrices are those that peft draws from the same seed.

    >>> VeRA(rank=64, targets=("q_proj", "v_proj")).rank
    64
    """

    rank: int = 256  # columns of vera_a, rows of vera_b; larger than a LoRA's
    d_initial: float = 0.1  # where lambda_d starts
    dropout: float = 0.0  # on the branch's input
    targets: tuple[str, ...] = ("layers",)  # patterns of kernels; layers: every linear layer but the output head
    seed: int = 0  # of the two random matrices, from 0 up to 2**32; peft's projection_prng_key
    bias: str = NO_BIAS  # which biases train too: none, all, or vera_only, those of the targets
    save_projection: bool = True  # whether an adapter's file has the two matrices; else its readers draw them by the seed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"method.rank is at least 1, not {self.rank}.")
        if self.bias not in BIASES:
            raise unknown("method.bias", self.bias, BIASES)
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"method.dropout is a rate from 0 up to, not including, 1, not {self.dropout}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"method.seed is a whole number from 0 up to 2**32, not {self.seed}.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with vectors around each target's kernel.

        Raises `UserError` where a pattern matches nothing, for more vectors than the largest kernel has weights, and for biases that
        aren't there.
        """
        check_biases(self.bias, params, self.is_target)
        chosen = set(chosen_kernels(params, self.targets))
        leaves = segments.leaves(params, is_leaf=is_node)
        shapes = [leaf.shape for leaf in leaves if is_kernel(leaf) and chosen & set(leaf.names)]
        rows, columns = map(max, zip(*shapes, strict=True))
        if self.rank > rows * columns:  # it may well be above a kernel's own rank
            raise UserError(
                f"method.rank is {self.rank}; the largest target is {rows} x {columns}, with fewer weights than that. Lower it."
            )
        # drawn on the host when numbers are there: a check by shapes alone takes no memory
        drawn = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, self.rank), (self.rank, columns))]
        shared = [Shared(part) for part in jax.pure_callback(lambda: projections(self.seed, self.rank, rows, columns), drawn)]
        return wrap(params, lambda name: self.is_target(name) or None, lambda leaf: self._around(leaf, *shared))

    def mask(self, params: Params) -> Any:
        """Returns True at the targets' vectors, and at biases that train too."""
        vectors = mask_of_nodes(params, VeRAKernel, ("lambda_d", "lambda_b"), self.targets)
        return jax.tree.map(operator.or_, vectors, mask_by_name(params, self.trains_bias))

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels: base plus the difference in float32, cast once to the base's type."""
        params = fold(params, VeRAKernel)
        return cast(params, mask_by_name(params, self.trains_bias), model.dtype)

    def is_target(self, name: str) -> bool:
        """Returns whether the kernel of this name gets vectors."""
        return first_match(self.targets, name) is not None

    def trains_bias(self, name: str) -> bool:
        """Returns whether the base's leaf of this name is a bias that trains too."""
        return trains_bias(self.bias, name, self.is_target)

    def _around(self, leaf: Leaf, vera_a: Shared, vera_b: Shared) -> VeRAKernel:
        layers = () if leaf.layers is None else (len(leaf.layers),)
        lambda_d = jnp.full((*layers, self.rank), self.d_initial, jnp.float32)
        lambda_b = jnp.zeros((*layers, leaf.shape[1]), jnp.float32)
        dropout = jnp.full(layers, self.dropout, jnp.float32) if self.dropout else None
        return VeRAKernel(leaf.value, vera_a, vera_b, lambda_d, lambda_b, dropout)


def projections(seed: int, rank: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vera_a (rows, rank) and vera_b (rank, columns), as peft draws them: uniform, of variance 2 / inputs (He et al. 2015).

    torch's generator on a CPU is the Mersenne twister, of whose numbers a float takes the lower 24 bits; numpy has the same.
    """
    draw = np.random.MT19937()
    draw._legacy_seeding(seed)

    def uniform(shape: tuple[int, int]) -> np.ndarray:
        bound = np.float32(math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1]))
        unit = (draw.random_raw(shape[0] * shape[1]) & (2**24 - 1)).astype(np.float64) * 2.0**-24
        return (unit * np.float64(bound + bound) - bound).astype(np.float32).reshape(shape)  # rounded once: a fused multiply and add

    return uniform((rank, rows)).T, uniform((columns, rank)).T
