"""Several LoRA adapters on one base, and a batch in which each row has its own, as in peft's mixed batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError
from jaxft.methods.base import Params
from jaxft.methods.kernels import KERNEL
from jaxft.methods.lora import LoRA, LoRAKernel, narrow
from jaxft.methods.lora_combination import check_rest, low_rank_kernels
from jaxft.models import segments
from jaxft.models.dropout import dropped
from jaxft.models.node import Around, Kernel, Shared, dot, is_node, node, take

BASE_ALONE = -1  # the row has no adapter


@node
@dataclasses.dataclass(frozen=True)
class MixedLoRAKernel(Around):
    """base + the low-rank difference of each row's own adapter.

    The adapters' columns stand side by side, as one LoRA of all their ranks together; a row keeps its own adapter's, and the others are
    multiplied with zero. So ranks may differ, an adapter without this kernel takes no room, and the base is multiplied once.

    Fields, without the layer axis: base (in, out), lora_a (in, ranks) and lora_b (ranks, out) float32, scale (adapters, ranks) float32,
    zero where a column is another adapter's, index (rows,) or (rows, length) int32, and dropout, each adapter's rate (adapters,)
    float32, or None.
    """

    base: Kernel
    lora_a: jax.Array
    lora_b: jax.Array
    scale: jax.Array
    index: Shared
    dropout: jax.Array | None

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        index = self._of_tokens(x.shape[0])
        rate = None if self.dropout is None else _row(self.dropout, index)[:, None]
        low = narrow(dropped(x, rate, rng), self.lora_a.astype(x.dtype)) * _row(self.scale, index).astype(x.dtype)
        return dot(x, self.base, rng) + low @ self.lora_b.astype(x.dtype)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        index = self._of_tokens(ids.size).reshape(ids.shape)
        low = self.lora_a.astype(dtype)[ids] * _row(self.scale, index).astype(dtype)
        return take(ids, self.base, dtype) + low @ self.lora_b.astype(dtype)

    def tied(self) -> Kernel:
        """The base, as of one LoRA."""
        return self.base

    def dense(self) -> jax.Array:
        raise UserError("Adapters of different rows are no one kernel. Merge one of them by itself: method.merge(model, params).")

    def _of_tokens(self, tokens: int) -> jax.Array:
        """Each token's adapter, (tokens,): tokens stand row after row, all rows of one length."""
        index = self.index.value
        if tokens % index.size or (index.ndim > 1 and tokens != index.size):
            shape = "x".join(map(str, index.shape))
            raise UserError(f"The adapters were chosen for {shape} (rows, or rows x length), which {tokens} tokens aren't.")
        return jnp.repeat(index.ravel(), tokens // index.size)

    def placement(self, spec: P) -> Any:
        rows, columns = (*spec, None, None)[:2]
        made: Any = MixedLoRAKernel  # a node of specs, not of arrays
        everywhere: Any = P()
        dropout = None if self.dropout is None else P()
        return made(self.base_placement(spec), P(rows, None), P(None, columns), P(), Shared(everywhere), dropout)


def _row(table: jax.Array, index: jax.Array) -> jax.Array:
    """The table's rows at index, zero where there is no such row."""
    return table.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def mix_adapters(base: Params, adapters: Sequence[tuple[Params, LoRA]]) -> Params:
    """Returns parameters that hold several LoRA adapters side by side; until `choose_adapters`, they act as the base alone.

    A pass costs what one LoRA of all ranks together costs. lora_a and lora_b may train; the gradient of an adapter is that of its rows.

    Args:
      base: the base model's parameters.
      adapters: parameters and method each, on `base`, as `load_adapter` or `init` give them; their ranks and targets may differ.

    Raises:
      UserError: an adapter of another base or method, one that trained more than its LoRA, a DoRA, or one on the output head.

    >>> import jax.numpy as jnp
    >>> def model_of(kernel):
    ...     return {"layers": {"0-0": {"proj": {"kernel": kernel}}}}
    >>> eye = jnp.eye(2)[None]
    >>> kernels = [LoRAKernel(eye, jnp.ones((1, 2, r)), jnp.ones((1, r, 2)), jnp.full(1, float(r)), None) for r in (1, 3)]
    >>> mixed = mix_adapters(model_of(eye), [(model_of(kernel), LoRA()) for kernel in kernels])
    >>> kernel = segments.one_layer(choose_adapters(mixed, [1, 0, -1]), 0)["proj"]["kernel"]
    >>> dot(jnp.ones((3, 2)), kernel).tolist()
    [[19.0, 19.0], [3.0, 3.0], [1.0, 1.0]]
    """
    if not adapters:
        raise UserError("There are no adapters to mix.")
    held: dict[str, dict[int, LoRAKernel]] = {}
    for number, (params, _) in enumerate(adapters):
        for name, kernel in low_rank_kernels(params).items():
            held.setdefault(name, {})[number] = kernel
        check_rest(base, params, number)
    if heads := [name for name in held if name.endswith(f"/{KERNEL}") and not name.startswith(f"{segments.LAYERS}/")]:
        raise UserError(
            f"{heads[0]} is a target of one of the adapters: the output head sees scored tokens without their rows. "
            "Merge that adapter, or leave the head out of its targets."
        )
    index = Shared(jnp.full(1, BASE_ALONE, jnp.int32))

    def ranks(name: str) -> tuple[tuple[int, int], ...]:
        return tuple((number, kernel.lora_a.shape[1]) for number, kernel in held[name].items())

    def signature(layer: int) -> tuple[Any, ...]:
        place = f"{segments.LAYERS}/{layer}/"
        return tuple((name.removeprefix(place), ranks(name)) for name in sorted(held) if name.startswith(place))

    def around(leaf: segments.Leaf) -> Any:
        if leaf.names[0] not in held:
            return leaf.value
        parts = [_side_by_side(held[name], len(adapters)) for name in leaf.names]
        stacked = parts[0] if leaf.layers is None else jax.tree.map(lambda *layers: jnp.stack(layers), *parts)
        return MixedLoRAKernel(leaf.value, **stacked, index=index)

    return segments.map_leaves(around, segments.refine(base, signature), is_leaf=is_node)


def choose_adapters(params: Params, index: Any) -> Params:
    """Returns mixed parameters for a batch whose row i has adapter index[i].

    All choices of one shape share one compiled program. Inside `jax.jit`, where numbers can't be looked at, one that no adapter has is
    the base alone.

    Args:
      params: as `mix_adapters` gives them.
      index: (rows,) whole numbers from 0 in the order of the adapters, -1 for the base alone; or (rows, length), one a token, for packed
        rows whose examples differ.

    Raises:
      UserError: parameters without mixed adapters; numbers that no adapter has.
    """
    counts = {value.scale.shape[-2] for value in jax.tree.leaves(params, is_leaf=is_node) if isinstance(value, MixedLoRAKernel)}
    if not counts:
        raise UserError("These parameters hold no adapters to choose from: make them by mix_adapters.")
    (count,) = counts
    if not isinstance(index, jax.core.Tracer):
        index = np.asarray(index)
        if index.ndim not in (1, 2) or not index.size or not np.issubdtype(index.dtype, np.integer):
            raise UserError(f"Adapters are chosen by whole numbers, (rows,) or (rows, length), not by {index.dtype} of {index.shape}.")
        if index.min() < BASE_ALONE or index.max() >= count:
            wrong = index.max() if index.max() >= count else index.min()
            raise UserError(f"There is no adapter {wrong}: they are numbered 0 to {count - 1}, and {BASE_ALONE} is the base alone.")
    chosen = Shared(jnp.asarray(index, jnp.int32))

    def choose(value: Any) -> Any:
        return dataclasses.replace(value, index=chosen) if isinstance(value, MixedLoRAKernel) else value

    return jax.tree.map(choose, params, is_leaf=is_node)


def _side_by_side(kernels: dict[int, LoRAKernel], count: int) -> dict[str, Any]:
    """One kernel's low-rank parts of all its adapters, each in columns of its own."""
    lora_a = jnp.concatenate([kernel.lora_a for kernel in kernels.values()], axis=1)
    lora_b = jnp.concatenate([kernel.lora_b for kernel in kernels.values()], axis=0)
    owner = np.repeat(list(kernels), [kernel.lora_a.shape[1] for kernel in kernels.values()])
    scales, rates = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for number, kernel in kernels.items():
        scales[number] = kernel.scale
        rates[number] = 0.0 if kernel.dropout is None else kernel.dropout
    scale = np.where(owner == np.arange(count)[:, None], scales[:, None], np.float32(0))
    return {"lora_a": lora_a, "lora_b": lora_b, "scale": jnp.asarray(scale), "dropout": jnp.asarray(rates) if rates.any() else None}
