"""The product with 4-bit codes as one Pallas kernel: W is looked up a tile at a time on the way to the product, and never written.

Written for Pallas' Triton backend, and NOT MEASURED: no GPU has run it, so that nothing takes it by default; `QuantizedKernel.dot` is the
plain form on every backend. Interpret mode checks its numbers (tests/quant/test_fused.py), and `benchmarks/dequantize.py` times it where
there is a GPU. A byte holds two neighbours along the input, so the even and the odd inputs are multiplied apart: nothing is interleaved.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxft.quant import codes
from jaxft.quant.blockwise import QuantizedKernel, decode_scales

TOKENS, OUTPUTS, BYTES = 64, 64, 32  # a program's tile: rows of x, rows of W, and bytes of a row at a time; 16 is Triton's least for a dot


def fits(kernel: QuantizedKernel) -> bool:
    """Returns whether the fused product can take a kernel: one layer, 4-bit codes, whole blocks in a row of W, and a row of whole tiles."""
    inputs, outputs = kernel.features
    packed = kernel.format.values_a_byte == 2 and kernel.codes.ndim == 2
    whole = inputs % kernel.format.block_size == 0
    return packed and whole and kernel.codes.shape[0] == outputs and kernel.format.block_size >= 2 * BYTES and inputs % (2 * BYTES) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused(x: jax.Array, kernel: QuantizedKernel, interpret: bool = False) -> jax.Array:
    """Returns x (tokens, in) times W.T, (tokens, out) in x's type, summed in float32. As in `product`, only x has a gradient."""
    even, odd = _padded(x[:, 0::2], TOKENS), _padded(x[:, 1::2], TOKENS)
    packed, scales = _padded(kernel.codes, OUTPUTS), _padded(_scales(kernel), OUTPUTS)
    bytes_a_row, blocks = packed.shape[1], scales.shape[1]
    made = pl.pallas_call(
        functools.partial(_forward_tile, kernel.format.code),
        out_shape=jax.ShapeDtypeStruct((even.shape[0], packed.shape[0]), x.dtype),
        grid=(even.shape[0] // TOKENS, packed.shape[0] // OUTPUTS),
        in_specs=[
            pl.BlockSpec((TOKENS, bytes_a_row), lambda i, j: (i, 0)),
            pl.BlockSpec((TOKENS, bytes_a_row), lambda i, j: (i, 0)),
            pl.BlockSpec((OUTPUTS, bytes_a_row), lambda i, j: (j, 0)),
            pl.BlockSpec((OUTPUTS, blocks), lambda i, j: (j, 0)),
        ],
        out_specs=pl.BlockSpec((TOKENS, OUTPUTS), lambda i, j: (i, j)),
        interpret=interpret,
    )(even, odd, packed, scales)
    return made[: x.shape[0], : kernel.features[1]]


def _forward_tile(code: str, even_ref: Any, odd_ref: Any, packed_ref: Any, scales_ref: Any, out_ref: Any) -> None:
    """One tile of outputs: a loop along the inputs."""
    steps = packed_ref.shape[1] // BYTES
    a_block = steps // scales_ref.shape[1]

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        part = pl.ds(index * BYTES, BYTES)
        scales = scales_ref[:, pl.ds(index // a_block, 1)]
        high, low = _halves(code, packed_ref[:, part], scales, even_ref.dtype)
        return total + _dot(even_ref[:, part], high.T) + _dot(odd_ref[:, part], low.T)

    out_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(out_ref.shape, jnp.float32)).astype(out_ref.dtype)


def _forward(x: jax.Array, kernel: QuantizedKernel, interpret: bool) -> tuple[jax.Array, QuantizedKernel]:
    return fused(x, kernel, interpret), kernel


def _backward(interpret: bool, kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    packed, scales = _padded(kernel.codes, OUTPUTS), _padded(_scales(kernel), OUTPUTS)
    rows = _padded(_padded(gradient, TOKENS).T, OUTPUTS).T
    outputs, bytes_a_row = packed.shape
    a_block = bytes_a_row // BYTES // scales.shape[1]
    half = jax.ShapeDtypeStruct((rows.shape[0], bytes_a_row), gradient.dtype)
    even, odd = pl.pallas_call(
        functools.partial(_backward_tile, kernel.format.code),
        out_shape=(half, half),
        grid=(rows.shape[0] // TOKENS, bytes_a_row // BYTES),
        in_specs=[
            pl.BlockSpec((TOKENS, outputs), lambda i, k: (i, 0)),
            pl.BlockSpec((outputs, BYTES), lambda i, k: (0, k)),
            pl.BlockSpec((outputs, 1), lambda i, k: (0, k // a_block)),
        ],
        out_specs=[pl.BlockSpec((TOKENS, BYTES), lambda i, k: (i, k))] * 2,
        interpret=interpret,
    )(rows, packed, scales)
    return jnp.stack([even, odd], axis=-1).reshape(rows.shape[0], -1)[: gradient.shape[0]], None


def _backward_tile(code: str, gradient_ref: Any, packed_ref: Any, scales_ref: Any, even_ref: Any, odd_ref: Any) -> None:
    """One tile of inputs, even and odd apart: a loop along the outputs."""

    def step(index: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part = pl.ds(index * OUTPUTS, OUTPUTS)
        high, low = _halves(code, packed_ref[part, :], scales_ref[part, :], gradient_ref.dtype)
        gradient = gradient_ref[:, part]
        return totals[0] + _dot(gradient, high), totals[1] + _dot(gradient, low)

    zero = jnp.zeros(even_ref.shape, jnp.float32)
    even, odd = jax.lax.fori_loop(0, packed_ref.shape[0] // OUTPUTS, step, (zero, zero))
    even_ref[...], odd_ref[...] = even.astype(even_ref.dtype), odd.astype(odd_ref.dtype)


fused.defvjp(_forward, _backward)


def _scales(kernel: QuantizedKernel) -> jax.Array:
    scales: jax.Array = decode_scales(jnp, kernel.scales, kernel.nested_scales, kernel.offset)
    return scales


def _padded(rows: jax.Array, tile: int) -> jax.Array:
    """Rows up to whole tiles; models' own sizes are whole already."""
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))


def _halves(code: str, packed: jax.Array, scales: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The values of the high and the low halves of bytes (rows, bytes), scaled in float32 and rounded to `dtype`."""
    whole = packed.astype(jnp.int32)
    return tuple((_selected(code, half) * scales).astype(dtype) for half in (whole >> 4, whole & 15))  # type: ignore[return-value]


def _selected(code: str, nibbles: jax.Array) -> jax.Array:
    """The values of codes by a tree of selects, a bit a level: Triton has no gather from a small table."""
    values = [jnp.full(nibbles.shape, float(value), jnp.float32) for value in codes.BOOKS[code]]
    for bit in range(4):
        odd = ((nibbles >> bit) & 1) != 0
        values = [jnp.where(odd, right, left) for left, right in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


_dot: Callable[[jax.Array, jax.Array], jax.Array] = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
