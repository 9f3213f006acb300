"""AdaLoRA: a low-rank difference in the form of an SVD, whose ranks a budget shares out (Zhang et al. 2023, arXiv:2303.10512)."""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError, unknown
from jaxft.methods.base import Method
from jaxft.methods.kernels import KERNEL, NO_BIAS, check_biases, check_ranks, fold, key_of, trains_bias
from jaxft.methods.lora import BIASES, narrow
from jaxft.methods.partition import cast, check_targets, combine, first_match, mask_by_name, partition
from jaxft.models import segments
from jaxft.models.dropout import dropped
from jaxft.models.node import Around, Kernel, dense, dot, is_node, node

Params = dict[str, Any]
_DEVIATION = 0.02  # of lora_a and lora_b at the start, as peft's
_EPSILON = 1e-5  # beside the rank in the scale, as peft's
_TRAINED = ("lora_a", "lora_e", "lora_b")


@node
@dataclasses.dataclass(frozen=True)
class AdaLoRAKernel(Around):
    """base + scale * lora_a @ diag(lora_e) @ lora_b; where lora_e is zero, the triplet is pruned.

    Fields, without the layer axis: base (in, out), lora_a (in, rank), lora_e (rank,), lora_b (rank, out) float32, scale () float32, and
    dropout, the rate () float32 on the low-rank branch's input, or None for none.
    """

    base: Kernel
    lora_a: jax.Array
    lora_e: jax.Array
    lora_b: jax.Array
    scale: jax.Array
    dropout: jax.Array | None

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        low = narrow(dropped(x, self.dropout, rng), self.lora_a.astype(x.dtype)) * (self.scale * self.lora_e).astype(x.dtype)
        return dot(x, self.base, rng) + low @ self.lora_b.astype(x.dtype)

    def dense(self) -> jax.Array:
        difference = jnp.matmul(self.lora_a * self.lora_e[..., None, :], self.lora_b, precision="highest")
        return dense(self.base) + self.scale[..., None, None] * difference

    def placement(self, spec: P) -> Any:
        rows, columns = (*spec, None, None)[:2]
        base = self.base_placement(spec)
        made: Any = AdaLoRAKernel  # a node of specs, not of arrays
        return made(base, P(rows, None), P(), P(None, columns), P(), None if self.dropout is None else P())


class Allocation(NamedTuple):
    """The optimizer's state: steps done, the smoothed importance of each weight and its uncertainty, and the inner state."""

    step: jax.Array  # () int32
    importance: Any
    uncertainty: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Trains lora_a, lora_e and lora_b beside the targets' kernels, and prunes what matters least to a budget of ranks.

    The budget stays at `init_rank` a kernel for `tinit` steps, falls as a cube to `target_rank` and stays there for the last `tfinal`.
    A triplet's importance is |weight * gradient|, smoothed, times its smoothed uncertainty, with the gradient as it is before clipping.

    >>> AdaLoRA(init_rank=6, target_rank=2, tinit=1, tfinal=4).budget(5, total=12, kernels=10)
    (23, True)
    """

    init_rank: int = 12  # of each kernel at the start
    target_rank: int = 8  # of a kernel at the end, on average
    alpha: float = 16.0  # the difference is scaled by alpha / init_rank
    dropout: float = 0.0  # on the low-rank branch's input
    targets: tuple[str, ...] = ("layers",)  # patterns of kernels; layers: every linear layer but the output head
    tinit: int = 0  # steps before the budget falls
    tfinal: int = 0  # steps at the end with the final ranks
    delta_t: int = 1  # steps from one allocation to the next
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # smoothing of its uncertainty
    orthogonality: float = 0.5  # weight of the regularizer that keeps lora_a and lora_b orthogonal
    total_steps: int = 0  # that the schedule is for; 0: those of the run
    bias: str = NO_BIAS  # which biases train too: none, all, or lora_only, those of the targets

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_rank <= self.init_rank:
            raise UserError(f"method.target_rank is from 1 to init_rank, {self.init_rank}, not {self.target_rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"method.dropout is a rate from 0 up to, not including, 1, not {self.dropout}.")
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"method.{name} is between 0 and 1, not {getattr(self, name)}.")
        for name, least in (("tinit", 0), ("tfinal", 0), ("delta_t", 1), ("orthogonality", 0.0), ("total_steps", 0)):
            if getattr(self, name) < least:
                raise UserError(f"method.{name} is {least} or more, not {getattr(self, name)}.")
        if not self.alpha > 0.0:
            raise UserError(f"method.alpha is above 0, not {self.alpha}.")
        if self.bias not in BIASES:
            raise unknown("method.bias", self.bias, BIASES)

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with an AdaLoRA around each target's kernel.

        Raises `UserError` where a pattern matches nothing, for a rank above a kernel's smaller side, and for biases that aren't there.
        """
        check_ranks(params, lambda name: self.init_rank if self.is_target(name) else 0, "method.init_rank")
        check_biases(self.bias, params, self.is_target)
        return self.added(rng, model, params)

    def added(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns what `init` does, of any rank: peft's files may have one that is larger than the kernel's."""
        kernels = [name for leaf in segments.leaves(params, is_leaf=is_node) if leaf.path[-1] == KERNEL for name in leaf.names]
        check_targets(self.targets, kernels)
        per_layer: dict[int, list[tuple[str, bool]]] = {}
        for leaf in segments.leaves(params, is_leaf=is_node):
            for layer, name in zip(leaf.layers or (), leaf.names, strict=False):
                per_layer.setdefault(layer, []).append((leaf.path[-2], self.is_target(name)))
        params = segments.refine(params, lambda layer: tuple(per_layer[layer]))
        return segments.map_leaves(lambda leaf: self._around(rng, leaf), params, is_leaf=is_node)

    def mask(self, params: Params) -> Any:
        """Returns True at lora_a, lora_e and lora_b of each target, and at biases that train too."""
        return jax.tree.map(operator.or_, self._triplets(params), mask_by_name(params, self.trains_bias))

    def _triplets(self, params: Params) -> Any:
        """Which leaves are a target's lora_a, lora_e or lora_b."""

        def trains(leaf: segments.Leaf) -> bool:
            kernel, _, field = leaf.names[0].rpartition("/")
            return field in _TRAINED and self.is_target(kernel)

        return segments.map_leaves(trains, params)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels: the base and the difference in float32, cast once to the base's type."""
        params = fold(params, AdaLoRAKernel)
        return cast(params, mask_by_name(params, self.trains_bias), model.dtype)

    def penalty(self, params: Params) -> jax.Array:
        """Returns `orthogonality` times the mean of |lora_a' lora_a - I| and |lora_b lora_b' - I| over its kernels, Frobenius norms."""
        norms = []
        for kernel in self._kernels(params):
            norms += [jnp.ravel(_from_identity(kernel.lora_a)), jnp.ravel(_from_identity(jnp.swapaxes(kernel.lora_b, -1, -2)))]
        return self.orthogonality * jnp.mean(jnp.concatenate(norms))

    def budget(self, step: int, total: int, kernels: int) -> tuple[int, bool]:
        """Returns how many triplets are left after `step` of `total` steps, and whether those of least importance are pruned then."""
        start, target = self.init_rank * kernels, self.target_rank * kernels
        last = total - self.tfinal
        if step <= self.tinit:
            return start, False
        if step >= last:
            return target, step == last
        left = 1 - (step - self.tinit) / (last - self.tinit)
        return int((start - target) * left**3 + target), step % self.delta_t == 0

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer with the budget; raises `UserError` where the schedule leaves no step for it to fall."""
        total = self.total_steps or steps
        last = total - self.tfinal
        if self.tinit >= last or (last < 2 and self.target_rank < self.init_rank):  # importance is known after a step
            raise UserError(
                f"method.tinit is {self.tinit} and method.tfinal {self.tfinal}: of {total} steps none is left to share the budget out in."
            )

        within = optax.with_extra_args_support(inner)

        def init(params: Any) -> Allocation:
            importance, uncertainty = (self._beside(jax.tree.map(jnp.zeros_like, self._own(params)), params) for _ in range(2))
            return Allocation(jnp.zeros((), jnp.int32), importance, uncertainty, within.init(params))

        def update(gradients: Any, state: Allocation, params: Any = None, **given: Any) -> tuple[Any, Allocation]:
            step = state.step + 1
            updates, held = within.update(gradients, state.inner, params, **given)
            before = self._own(state.importance), self._own(state.uncertainty)
            now = self._smoothed(self._own(gradients), self._own(params), self._own(updates), before)
            still = step < total - self.tfinal
            importance, uncertainty = jax.tree.map(lambda new, old: jnp.where(still, new, old), now, before)
            updates = self._pruned(updates, params, jax.tree.map(jnp.multiply, importance, uncertainty), step, total)
            return updates, Allocation(step, self._beside(importance, params), self._beside(uncertainty, params), held)

        return optax.GradientTransformationExtraArgs(init, update)

    def _smoothed(self, gradients: Any, params: Any, updates: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
        """Importance and uncertainty of each weight after the step (equations 9 and 10), of the weight as it is then."""
        now = jax.tree.map(lambda leaf, update, gradient: jnp.abs((leaf + update) * gradient), params, updates, gradients)
        importance = jax.tree.map(lambda old, new: self.beta1 * old + (1 - self.beta1) * new, before[0], now)
        uncertainty = jax.tree.map(
            lambda old, new, smooth: self.beta2 * old + (1 - self.beta2) * jnp.abs(new - smooth), before[1], now, importance
        )
        return importance, uncertainty

    def _pruned(self, updates: Any, params: Any, scores: Any, step: jax.Array, total: int) -> Any:
        """The updates, those of pruned values such that they are zero; after the last allocation what is zero stays so."""
        own = [leaf for leaf in segments.leaves(scores, is_leaf=_is_kernel) if self._is_own(leaf)]
        # The barrier: computed again where they are compared, sums in another order would put the one at the threshold above it.
        triplets = jax.lax.optimization_barrier({leaf.names[0]: _triplet_scores(leaf.value) for leaf in own})
        every = jnp.sort(jnp.concatenate([jnp.ravel(found) for found in triplets.values()]))
        table = [self.budget(number, total, every.size // self.init_rank) for number in range(total + 1)]
        place = jnp.minimum(step, total)
        less = every.size - jnp.asarray([budget for budget, _ in table], jnp.int32)[place]
        allocates = jnp.asarray([masks for _, masks in table])[place] & (less > 0)
        threshold = every[jnp.maximum(less - 1, 0)]

        def prune(keys: Any, update: Any, value: Any) -> Any:
            leaf = segments.leaf_of(segments.path_of(keys), update)
            if not self._is_own(leaf):
                return update
            zero = (allocates & (triplets[leaf.names[0]] <= threshold)) | ((step > total - self.tfinal) & (value.lora_e == 0))
            return dataclasses.replace(update, lora_e=jnp.where(zero, -value.lora_e, update.lora_e))

        return jax.tree_util.tree_map_with_path(prune, updates, params, is_leaf=_is_kernel)

    def is_target(self, name: str) -> bool:
        """Returns whether the kernel of this name gets an AdaLoRA."""
        return name.rsplit("/", 1)[-1] == KERNEL and first_match(self.targets, name) is not None

    def trains_bias(self, name: str) -> bool:
        """Returns whether the base's leaf of this name is a bias that trains too."""
        return trains_bias(self.bias, name, self.is_target)

    def _own(self, tree: Any) -> Any:
        """The leaves of this method's triplets, None in the place of others."""
        return partition(tree, self._triplets(tree))[0]

    def _beside(self, own: Any, params: Any) -> Any:
        """The leaves of `_own`, and a scalar for each other one that trains, as a head's: a state's trees have the trainable's form."""
        return combine(own, jax.tree.map(lambda _: jnp.zeros(()), partition(params, self._triplets(params))[1]))

    def _is_own(self, leaf: segments.Leaf) -> bool:
        return _is_kernel(leaf.value) and self.is_target(leaf.names[0])

    def _kernels(self, params: Any) -> list[AdaLoRAKernel]:
        return [leaf.value for leaf in segments.leaves(params, is_leaf=_is_kernel) if self._is_own(leaf)]

    def _around(self, rng: jax.Array, leaf: segments.Leaf) -> Any:
        if not self.is_target(leaf.names[0]):
            return leaf.value
        rows, columns = leaf.shape
        keys = [jax.random.split(key_of(rng, name)) for name in leaf.names]
        lora_a = _DEVIATION * jnp.stack([jax.random.normal(first, (rows, self.init_rank), jnp.float32) for first, _ in keys])
        lora_b = _DEVIATION * jnp.stack([jax.random.normal(second, (self.init_rank, columns), jnp.float32) for _, second in keys])
        count = len(leaf.names)
        scale = jnp.full(count, self.alpha / (self.init_rank + _EPSILON), jnp.float32)
        dropout = jnp.full(count, self.dropout, jnp.float32) if self.dropout else None
        fields = (lora_a, jnp.zeros((count, self.init_rank), jnp.float32), lora_b, scale, dropout)
        return AdaLoRAKernel(leaf.value, *(jax.tree.map(lambda part: part[0], fields) if leaf.layers is None else fields))


def _is_kernel(value: Any) -> bool:
    """Whether a value is an AdaLoRA, within another method's node or not."""
    return isinstance(value, AdaLoRAKernel)


def _from_identity(matrix: jax.Array) -> jax.Array:
    """The Frobenius norm of matrix' matrix - I, (...), of (..., long, rank); its gradient at zero is zero."""
    product = jnp.einsum("...ir,...is->...rs", matrix, matrix, precision="highest")
    squares = jnp.sum((product - jnp.eye(matrix.shape[-1], dtype=matrix.dtype)) ** 2, axis=(-1, -2))
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(matrix.dtype).tiny))


def _triplet_scores(scores: AdaLoRAKernel) -> jax.Array:
    """The importance of each triplet, (..., rank): its value's, and the means over its two vectors (equation 12)."""
    return scores.lora_e + jnp.mean(scores.lora_a, axis=-2) + jnp.mean(scores.lora_b, axis=-1)
