"""LoRA: a low-rank difference beside frozen kernels (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError, unknown
from jaxft.methods import dora, lora_start
from jaxft.methods.base import Material, Method
from jaxft.methods.kernels import (
    ALL_BIASES,
    EMBEDDING,
    KERNEL,
    NO_BIAS,
    WORDS,
    check_biases,
    check_ranks,
    fold,
    key_of,
    trains_bias,
)
from jaxft.methods.partition import (
    cast,
    check_layers,
    check_not_quantized,
    check_patterns,
    check_targets,
    combine,
    first_match,
    mask_by_name,
    names_of,
    partition,
)
from jaxft.methods.rates import scaled
from jaxft.models import segments
from jaxft.models.dropout import dropped
from jaxft.models.node import Around, Kernel, Node, dense, dot, is_node, is_quantized, node, prepared, take

Params = dict[str, Any]
BIASES = (NO_BIAS, ALL_BIASES, "lora_only")
_FAST = ("lora_b", "lora_bias", "magnitude", "bias", "scale")  # what LoRA+'s ratio reaches in peft: B and everything of one axis


@jax.custom_vjp
def narrow(x: jax.Array, matrix: jax.Array) -> jax.Array:
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


narrow.defvjp(_narrow_forward, _narrow_backward)


@node
@dataclasses.dataclass(frozen=True)
class LoRAKernel(Around):
    """base + scale * lora_a @ lora_b, never formed while training; with a magnitude, its columns brought to those lengths (DoRA).

    Fields, without the layer axis: base (in, out), lora_a (in, rank), lora_b (rank, out) float32, scale () float32, and what is None
    where it isn't used: dropout, the rate () float32 on the low-rank branch's input; magnitude (out,) float32; start_a and start_b, the
    lora_a and lora_b whose product was taken out of the base; lora_bias (out,) float32, which scale multiplies too.
    """

    base: Kernel
    lora_a: jax.Array
    lora_b: jax.Array
    scale: jax.Array
    dropout: jax.Array | None
    magnitude: jax.Array | None = None
    start_a: jax.Array | None = None
    start_b: jax.Array | None = None
    lora_bias: jax.Array | None = None

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        inputs = dropped(x, self.dropout, rng)
        low = narrow(inputs, self.lora_a.astype(x.dtype)) * self.scale.astype(x.dtype)
        if self.magnitude is None:
            return dot(x, self.base, rng) + low @ self.lora_b.astype(x.dtype)
        factor, difference = self._factor(x.dtype), low @ self.lora_b.astype(x.dtype)
        if inputs is x:
            return factor * (dot(x, self.base, rng) + difference)
        # As peft: the base's product keeps its whole input, what DoRA changes of it sees the dropped one.
        return dot(x, self.base, rng) + (factor - 1) * dot(inputs, self.base, rng) + factor * difference

    def bias(self, bias: jax.Array | None) -> jax.Array | None:
        added = super().bias(bias)
        if self.lora_bias is None:
            return added
        own = self.scale[..., None] * self.lora_bias
        return own if added is None else added.astype(jnp.float32) + own

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        low = self.lora_a.astype(dtype)[ids] * self.scale.astype(dtype)
        rows = take(ids, self.base, dtype) + low @ self.lora_b.astype(dtype)
        return rows if self.magnitude is None else self._factor(dtype) * rows

    def tied(self) -> Kernel:
        """The base: peft changes a tied embedding where it is looked up, not the head."""
        return self.base

    def prepared(self) -> Node:
        """For a DoRA, the factor of each column in the place of its length: the norm is that of the whole kernel."""
        base = prepared(self.base)
        plain = LoRAKernel(base, self.lora_a, self.lora_b, self.scale, None, lora_bias=self.lora_bias)
        if self.magnitude is None:
            return plain
        factors = segments.each_layer(lambda layer: layer._factor(jnp.float32), self, stacked=self.scale.ndim == 1)
        return dora.ScaledColumns(plain, factors)

    def dense(self) -> jax.Array:
        difference = jnp.matmul(self.lora_a, self.lora_b, precision="highest")
        whole = dense(self.base) + self.scale[..., None, None] * difference
        return whole if self.magnitude is None else self._factor(jnp.float32)[..., None, :] * whole

    def _factor(self, dtype: Any) -> jax.Array:
        assert self.magnitude is not None
        return dora.factor(self.magnitude, self.base, self.lora_a, self.lora_b, self.scale).astype(dtype)

    def placement(self, spec: P) -> Any:
        rows, columns = (*spec, None, None)[:2]
        base = self.base_placement(spec)
        places = {"lora_a": P(rows, None), "lora_b": P(None, columns), "scale": P(), "dropout": P(), "magnitude": P(columns)}
        places |= {"start_a": P(rows, None), "start_b": P(None, columns), "lora_bias": P(columns)}
        made: Any = LoRAKernel  # a node of specs, not of arrays
        return made(base, **{field: None if getattr(self, field) is None else place for field, place in places.items()})


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Trains lora_a and lora_b beside the kernels that `targets` choose; everything else is frozen.

    With the default start the model starts as the base. So it does, but for rounding, with those that take a part of each kernel for
    lora_a and lora_b and leave the rest as the base: such an adapter is exported for the original base, with twice the rank.

    >>> LoRA(rank=8, alpha=16.0, targets=("q_proj", "v_proj")).rank
    8
    """

    rank: int = 8  # columns of lora_a, rows of lora_b
    alpha: float = 16.0  # the difference is scaled by alpha / rank
    dropout: float = 0.0  # on the low-rank branch's input
    targets: tuple[str, ...] = ("layers",)  # patterns of kernels; layers: every linear layer but the output head; embed: the embeddings
    layers: tuple[int, ...] = ()  # only targets in these layers, 0 is the lowest; empty: all
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    rank_pattern: tuple[tuple[str, int], ...] = ()  # (pattern, rank) for some of the targets, first match wins
    alpha_pattern: tuple[tuple[str, float], ...] = ()  # (pattern, alpha) for some of the targets, first match wins
    dora: bool = False  # train the length of each column by itself (Liu et al. 2024, arXiv:2402.09353)
    lora_plus_ratio: float = 1.0  # lora_b's learning rate, as a multiple of lora_a's (Hayou et al. 2024, arXiv:2402.12354)
    start: str = lora_start.DEFAULT  # default, gaussian, pissa, pissa_niter_N (N steps of a randomized SVD), olora, loftq or loftq_niter_N
    lora_bias: bool = False  # train a bias beside lora_b too: of linear layers, with the default start, without DoRA
    bias: str = "none"  # which biases train too: none, all, or lora_only, those of the targets
    modules_to_save: tuple[str, ...] = ()  # patterns of what trains whole beside the targets: lm_head, norm

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            if rank < 1:
                raise UserError(f"method.rank: a LoRA's rank is at least 1, not {rank}.")
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not 0 < alpha < math.inf:
                raise UserError(f"method.alpha: a LoRA's alpha is a finite number above 0, not {alpha}: the difference is scaled by it.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"method.dropout is a rate from 0 up to, not including, 1, not {self.dropout}.")
        if not self.lora_plus_ratio > 0.0:
            raise UserError(f"method.lora_plus_ratio is above 0, not {self.lora_plus_ratio}.")
        if self.bias not in BIASES:
            raise unknown("method.bias", self.bias, BIASES)
        lora_start.check(self.start)
        if self.lora_bias and (self.dora or self.start != lora_start.DEFAULT):
            raise UserError("method.lora_bias goes with start 'default' and without method.dora, as in PEFT. Leave one of them out.")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with a LoRA around each target's kernel.

        Raises `UserError` where a pattern matches nothing, for a rank above a kernel's smaller side, and for biases that aren't there.
        """
        if lora_start.loftq_iterations(self.start):
            raise UserError(
                f"method.start: '{self.start}' makes up for what quantization lost, so it takes the kernels as they were before. launch.py "
                "reads them; in a program: params = method.init_from_kernels(rng, model, params, jaxft.OriginalKernels(source))."
            )
        check_ranks(params, self._target_rank)
        check_biases(self.bias, params, self.is_target)
        return self.added(rng, model, params)

    def added(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns what `init` does, of any rank: peft's files may have one that is larger than the kernel's."""
        return self._init(rng, model, params, None)

    def begin(self, rng: jax.Array, model: nn.Module, params: Params, material: Material) -> Params:
        """Returns what `init` does, or `init_from_kernels` where LoftQ starts from what was quantized."""
        if not lora_start.loftq_iterations(self.start):
            return self.init(rng, model, params)
        return self.init_from_kernels(rng, model, params, material.kernel)

    def init_from_kernels(self, rng: jax.Array, model: nn.Module, params: Params, kernel: Callable[[str], Any]) -> Params:
        """Returns `params`, of a quantized model, with a LoRA that starts from what quantization lost (LoftQ, arXiv:2310.08659).

        One turn (`loftq`) leaves the base as it is; more of them quantize it again, and the LoRA is that base's alone.

        Args:
          rng: not used by a start that is found from the kernels.
          model: as for `init`.
          params: as for `init`, the targets' kernels quantized; `UserError` is raised where one isn't.
          kernel: gives the kernel of a name as it was, (in, out), one at a time.
        """
        check_ranks(params, self._target_rank)
        check_biases(self.bias, params, self.is_target)
        return self._init(rng, model, params, kernel)

    def _init(self, rng: jax.Array, model: nn.Module, params: Params, kernel: Callable[[str], Any] | None) -> Params:
        self._check(model, params)
        depth = sum(len(layers) for layers in segments.spans(params))
        per_layer: list[list[tuple[str, int, bool]]] = [[] for _ in range(depth)]
        for leaf in segments.leaves(params, is_leaf=is_node):
            if leaf.layers is not None:
                for layer, name in zip(leaf.layers, leaf.names, strict=True):
                    per_layer[layer].append((leaf.path[-2], self._target_rank(name), self.trains_whole(name)))
        params = segments.refine(params, lambda layer: tuple(per_layer[layer]))
        return segments.map_leaves(lambda leaf: self._around(rng, leaf, kernel), params, is_leaf=is_node)

    def mask(self, params: Params) -> Any:
        """Returns True at the low-rank leaves of each target, and at what trains whole."""
        low_rank = segments.map_leaves(lambda leaf: self._is_low_rank(leaf.names[0]), params)
        return jax.tree.map(operator.or_, low_rank, mask_by_name(params, self.trains_whole))

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns plain kernels: base + scale * lora_a @ lora_b in float32, cast once to the base's type.

        Raises `UserError` for embeddings that are the output head too, since only one of the two has the LoRA, and for a lora_bias of a
        layer without a bias.
        """
        for leaf in segments.leaves(params, is_leaf=is_node):
            if isinstance(leaf.value, LoRAKernel) and leaf.title == WORDS and model.config.tie_word_embeddings:
                raise UserError(
                    f"A LoRA on {leaf.title} can't be merged: this model's output head is the same table, and it has no LoRA. "
                    "Save the adapter alone: jaxft.save_adapter(folder, model, params, method)."
                )
        params = fold(params, LoRAKernel)
        return cast(params, mask_by_name(params, self.trains_whole), model.dtype)

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer, lora_b's rate `lora_plus_ratio` times lora_a's; so are a magnitude's, biases' and norms', as in peft."""
        if self.lora_plus_ratio == 1.0:
            return inner

        def factor(name: str) -> float:
            return self.lora_plus_ratio if name.rsplit("/", 1)[-1] in _FAST and f"/{EMBEDDING}/" not in name else 1.0

        def faster(updates: Any, params: Any) -> Any:
            own, others = partition(updates, self.mask(updates))
            return combine(scaled(own, factor), others)

        return optax.chain(inner, optax.stateless(faster))

    def _target_rank(self, name: str) -> int:
        """The rank at the kernel or table of this name, 0 where it is no target."""
        return self.rank_of(name) if self.is_target(name) else 0

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

    def is_target(self, name: str) -> bool:
        """Returns whether the kernel or table of this name gets a LoRA."""
        if name.rsplit("/", 1)[-1] not in (KERNEL, EMBEDDING) or first_match(self.targets, name) is None:
            return False
        return not self.layers or any(name.startswith(f"{segments.LAYERS}/{layer}/") for layer in self.layers)

    def _is_low_rank(self, name: str) -> bool:
        kernel, _, field = name.rpartition("/")
        return field in ("lora_a", "lora_b", "lora_bias", "magnitude") and self.is_target(kernel)

    def trains_whole(self, name: str) -> bool:
        """Returns whether the base's leaf of this name trains as it is: a bias, or one of the modules to save."""
        if first_match(self.modules_to_save, name) is not None:
            return not self.is_target(name) and not self.is_target(name.rpartition("/")[0])
        return trains_bias(self.bias, name, self.is_target)

    def _check(self, model: nn.Module, params: Params) -> None:
        kernels = [name for leaf in segments.leaves(params, is_leaf=is_node) if leaf.path[-1] in (KERNEL, EMBEDDING) for name in leaf.names]
        names = names_of(params)
        depth = sum(len(layers) for layers in segments.spans(params))
        check_layers(self.layers, depth, "method.layers")
        check_targets(self.targets, kernels)
        chosen = [name for name in kernels if self.is_target(name)]
        if not chosen:
            raise UserError(f"method.layers: no target of {', '.join(self.targets)} lies in the layers {self.layers}.")
        check_patterns([pattern for pattern, _ in self.rank_pattern], chosen, "method.rank_pattern")
        check_patterns([pattern for pattern, _ in self.alpha_pattern], chosen, "method.alpha_pattern")
        check_patterns(self.modules_to_save, names, "method.modules_to_save")
        for name in chosen:
            if first_match(self.modules_to_save, name) is not None:
                raise UserError(f"{name} is in method.targets and in method.modules_to_save: it gets a LoRA, or trains whole.")
        if model.config.tie_word_embeddings and self.trains_whole(WORDS):
            raise UserError(f"method.modules_to_save: {WORDS} is the output head too in this model, which PEFT can't train as one.")
        check_not_quantized(params, self.trains_whole)
        if any(name.endswith(f"/{EMBEDDING}") for name in chosen):
            if lora_start.decomposes(self.start):
                raise UserError(f"method.start: {self.start} is for linear layers; embeddings start at 'default'.")
            if self.lora_bias:
                raise UserError("method.lora_bias is for linear layers; method.targets has embeddings. Leave one of them out.")

    def _around(self, rng: jax.Array, leaf: segments.Leaf, kernel: Callable[[str], Any] | None) -> Any:
        rank = self._target_rank(leaf.names[0])
        if not rank:
            return leaf.value
        base = leaf.value
        if kernel is None:
            starts = [self._start(key_of(rng, name), leaf, index, rank) for index, name in enumerate(leaf.names)]
        else:
            starts, base = self._loftq(leaf, kernel, rank)
        lora_a, lora_b = jnp.stack([start.lora_a for start in starts]), jnp.stack([start.lora_b for start in starts])
        scale = jnp.asarray([self.scale_of(name) for name in leaf.names], jnp.float32)
        dropout = jnp.full(len(leaf.names), self.dropout, jnp.float32) if self.dropout and leaf.path[-1] == KERNEL else None
        if leaf.layers is None:
            lora_a, lora_b, scale, dropout = jax.tree.map(lambda part: part[0], (lora_a, lora_b, scale, dropout))
        made = LoRAKernel(base, lora_a, lora_b, scale, dropout)
        if lora_start.changes_base(self.start):
            rest = dense(base) - scale[..., None, None] * jnp.matmul(lora_a, lora_b, precision="highest")
            kept = {"start_a": jnp.copy(lora_a), "start_b": jnp.copy(lora_b)}  # a step donates what trains, and these stay
            made = dataclasses.replace(made, base=rest.astype(base.dtype), **kept)
        if self.lora_bias:
            made = dataclasses.replace(made, lora_bias=jnp.zeros((*lora_b.shape[:-2], lora_b.shape[-1]), jnp.float32))
        if self.dora:
            made = dataclasses.replace(made, magnitude=segments.each_layer(dora.norms_of, made, leaf.layers is not None))
        return made

    def _loftq(self, leaf: segments.Leaf, kernel: Callable[[str], Any], rank: int) -> tuple[list[lora_start.Start], Any]:
        """The starts of a leaf's layers, and the base that goes with them; one layer's dense kernel at a time."""
        if not is_quantized(leaf.value):
            raise UserError(
                f"method.start: '{self.start}' makes up for what quantization lost; {leaf.names[0]} isn't quantized. Set "
                "config.model.quantization, or take start 'pissa' in its place."
            )
        starts, bases = [], []
        for index, name in enumerate(leaf.names):
            whole = jnp.asarray(kernel(name)).astype(jnp.float32)
            start, base = lora_start.loftq(self.start, whole, leaf.part(index), rank, self.scale_of(name))
            starts.append(start)
            bases.append(base)
        if lora_start.loftq_iterations(self.start) == 1:
            return starts, leaf.value
        return starts, bases[0] if leaf.layers is None else jax.tree.map(lambda *parts: jnp.stack(parts), *bases)

    def _start(self, rng: jax.Array, leaf: segments.Leaf, index: int, rank: int) -> lora_start.Start:
        if leaf.path[-1] == EMBEDDING:
            return lora_start.embedding(rng, leaf.shape, rank)
        if not lora_start.changes_base(self.start):
            return lora_start.linear(self.start, rng, leaf.shape, rank)
        if is_node(leaf.value):
            other = " Start 'loftq' is made for it." if is_quantized(leaf.value) else ""
            raise UserError(
                f"method.start: '{self.start}' takes a part out of the base and leaves the rest, which {_held(leaf.value)} can't hold "
                f"exactly.{other}"
            )
        return lora_start.from_kernel(self.start, rng, dense(leaf.part(index)), rank, self.scale_of(leaf.names[index]))


def _held(value: Any) -> str:
    return f"a base in {value.format_name}" if is_quantized(value) else f"{type(value).__name__}"
