"""Optimizer moments in 8 bits, by blocks of 256 as in 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.

As bitsandbytes does it, an update is made of moments read back to float32 and brought up to date there, and only what stays until the
next step is rounded: to the signed dynamic map, and second moments, which are never negative, to the unsigned one.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models import segments
from jaxft.quant.blockwise import decode_blocks, encode_blocks

BLOCK = 256  # values that share a scale, as in bitsandbytes
SMALLEST = 4096  # parameters; smaller ones keep float32 moments, as in bitsandbytes: they cost little, and norms and biases are among them
UNSIGNED = ("nu",)  # fields of optax's states that are never negative


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["signed", "stacked"])
@dataclasses.dataclass(frozen=True)
class Moments8bit:
    """One parameter's moments. Blocks lie in rows where they fill them, and are sharded with them; otherwise across the rows of a layer."""

    codes: Any  # uint8 of the parameter's shape
    scales: Any  # float32: (..., last / 256) where that is whole; otherwise ([layers,] blocks)
    signed: bool
    stacked: bool  # the first axis is that of layers

    def decoded(self) -> jax.Array:
        """Returns the moments, float32 of the parameter's shape."""
        blocks = _blocks(self.codes, self.stacked)
        return _joined(decode_blocks(jnp, blocks, self.scales, self.signed), self.codes.shape, self.stacked)

    def placement(self, parameter: NamedSharding) -> "Moments8bit":
        """Returns where the moments of a parameter lie that lies at `parameter`."""
        spec = (*parameter.spec, *[None] * self.codes.ndim)[: self.codes.ndim]
        last = math.prod(parameter.mesh.shape[axis] for axis in (spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],)) if axis)
        whole = self.codes.shape[-1] % BLOCK == 0
        scales = P(*spec[:-1], spec[-1] if self.scales.shape[-1] % last == 0 else None) if whole else P()
        return dataclasses.replace(self, codes=parameter, scales=NamedSharding(parameter.mesh, scales))


def is_8bit(value: Any) -> bool:
    """Returns whether `value` is one parameter's moments in 8 bits."""
    return isinstance(value, Moments8bit)


def in_8_bits(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, whose state is a named tuple of moments and counts, with the moments of large parameters held in 8 bits."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return jax.jit(lambda given: _encoded(inner.init(given)))(params)  # the moments are never there in float32

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> tuple[Any, Any]:
        whole = jax.tree.map(lambda value: value.decoded() if is_8bit(value) else value, state, is_leaf=is_8bit)
        updates, whole = inner.update(updates, whole, params, **given)
        return updates, _encoded(whole)

    return optax.GradientTransformationExtraArgs(init, update)


def _encoded(state: Any) -> Any:
    held = {name: _encoded_field(value, name not in UNSIGNED) for name, value in state._asdict().items() if name != "count"}
    return state._replace(**held)


def _encoded_field(moments: Any, signed: bool) -> Any:
    def encode(leaf: segments.Leaf) -> Any:
        if math.prod(leaf.shape) < SMALLEST:
            return leaf.value
        stacked = leaf.layers is not None
        codes, scales = encode_blocks(jnp, _blocks(leaf.value, stacked), signed)
        return Moments8bit(_joined(codes, leaf.value.shape, stacked), scales, signed, stacked)

    return segments.map_leaves(encode, moments)


def _blocks(values: Any, stacked: bool) -> Any:
    """Returns values (...) in blocks, (..., 256), zeros at the end of a layer that they don't fill."""
    if values.shape[-1] % BLOCK == 0:
        return values.reshape(*values.shape[:-1], -1, BLOCK)
    rows = values.reshape(values.shape[0] if stacked else 1, -1)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return rows.reshape(*([rows.shape[0]] if stacked else []), -1, BLOCK)


def _joined(blocks: Any, shape: tuple[int, ...], stacked: bool) -> Any:
    """Returns blocks as the values of `shape` that they were made of."""
    layers = shape[0] if stacked else 1
    return blocks.reshape(layers, -1)[:, : math.prod(shape) // layers].reshape(shape)
