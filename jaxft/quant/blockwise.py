"""Blockwise quantization: a kernel as codes of 4 or 8 bits and a scale for each block, as bitsandbytes on CPU has them, to the bit.

The torch weight W = kernel.T, (out, in), is cut row by row into blocks; each is divided by its largest magnitude and every value
replaced by the code of the nearest one in the code book. Double quantization then stores the scales, less their mean, in 8 bits each,
in blocks of 256 (QLoRA, arXiv:2305.14314, section 3). bitsandbytes' mean is torch's, whose last bit depends on the threads that sum more
than 32,768 scales: for double quantization of such a kernel, equality is with one thread (`mean`). All functions take numpy arrays and
compute on the host, exactly, or jax arrays and compute where those lie, under `jax.jit` or not; there XLA takes subnormal numbers for
zero, as it does everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxft.errors import UserError, unknown
from jaxft.models.node import Quantized
from jaxft.quant import codes
from jaxft.quant.product import product

NESTED_BLOCK = 256  # scales a block of the double quantization: QLoRA, section 3
BLOCK_SIZES = tuple(2**power for power in range(5, 13))  # 32 to 4096, those of bitsandbytes
_LEAST = np.float32(1e-38)  # the least divisor in bitsandbytes' 4-bit kernels: keeps the reciprocal of a block of zeros finite
_CHUNK = 2**18  # values quantized at a time on the host: what the arithmetic holds beside the result stays small


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kernel's values are stored.

    >>> Format("nf4", block_size=64).bits_a_parameter
    4.126953125
    """

    code: str = "nf4"  # nf4, fp4, int4 or int8: `codes.BOOKS`
    block_size: int = 64  # values that share a scale: a power of two, 32 to 4096
    double_quantization: bool = True  # the scales in 8 bits too

    def __post_init__(self) -> None:
        if self.code not in codes.BOOKS:
            raise unknown("code book", self.code, codes.BOOKS)
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise UserError(f"A block size is one of {', '.join(map(str, BLOCK_SIZES))}, not {self.block_size}.")

    @property
    def values_a_byte(self) -> int:
        """How many codes a byte holds."""
        return 1 if self.code == "int8" else 2

    @property
    def bits_a_parameter(self) -> float:
        """Bits a value takes in a large kernel, its share of the scales included."""
        scale = 8 + 32 / NESTED_BLOCK if self.double_quantization else 32
        return 8 / self.values_a_byte + scale / self.block_size


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "nested_scales", "offset"],
    meta_fields=["features", "kept_as", "format"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedKernel(Quantized):
    """A kernel (in, out) in a `Format`, or a stack of them; every array of a stack has a leading layer axis.

    Where blocks fill whole rows of W, (out, in), a row of `codes` is a row of W, so that both axes can be sharded; otherwise blocks run
    across the ends of rows, and all of W is one row.
    """

    codes: Any  # (rows, bytes) uint8: the first of two codes in the high half
    scales: Any  # (rows, blocks) float32; uint8 codes of `codes.INT8` with double quantization
    nested_scales: Any  # (nested blocks,) float32, None without double quantization
    offset: Any  # () float32: the mean of the scales, None without double quantization
    features: tuple[int, int]  # (in, out)
    kept_as: Any  # numpy dtype of the kernel when it is dense
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.features)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.nested_scales, self.offset) if part is not None)

    @property
    def dtype(self) -> Any:
        return self.kept_as

    def __repr__(self) -> str:
        doubly = ", double quantization" if self.format.double_quantization else ""
        shape = (*getattr(self.codes, "shape", ())[:-2], *self.features)  # a tree of shardings, or `partition`, has no arrays here
        return f"{type(self).__name__}({shape}, {self.kept_as}, {self.format.code}, blocks of {self.format.block_size}{doubly})"

    @property
    def format_name(self) -> str:
        return self.format.code

    def requantized(self, kernel: jax.Array) -> "QuantizedKernel":
        return quantize(kernel, self.format, self.kept_as)

    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return product(x, self, weight)

    def dense(self) -> jax.Array:
        return weight(self, jnp.float32).mT

    def placement(self, spec: PartitionSpec) -> "QuantizedKernel":
        across, along = (*spec, None, None)[:2]  # the kernel is (in, out), the codes lie as (out, in)
        rows = PartitionSpec() if self.codes.shape[-2] == 1 else PartitionSpec(along, across)
        return dataclasses.replace(
            self,
            codes=rows,
            scales=rows,
            nested_scales=None if self.nested_scales is None else PartitionSpec(),
            offset=None if self.offset is None else PartitionSpec(),
        )


def quantize(kernel: Any, format: Format, dtype: Any = None) -> QuantizedKernel:
    """Returns a kernel (in, out), or a stack (layers, in, out) of them, float32, bfloat16 or float16, in `format`.

    `dtype` is the type that it is in when it is dense, its own where it is None. Each layer is quantized by itself, as torch does.
    A numpy array gives numpy arrays, computed a part at a time; its fastest layout is a transposed torch weight.

    Raises:
      UserError: an array of another number of axes, or without a value.
    """
    if kernel.ndim not in (2, 3) or not kernel.size:
        raise UserError(
            f"A kernel is (in, out), or (layers, in, out), and has values; this one is {tuple(kernel.shape)}: it can't be quantized."
        )
    kept_as = np.dtype(kernel.dtype if dtype is None else dtype)
    if not isinstance(kernel, np.ndarray):
        return _quantize_jit(kernel, format, kept_as)
    if kernel.ndim == 2:
        return _quantize(np, kernel, format, kept_as)
    layers = [_quantize(np, layer, format, kept_as) for layer in kernel]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_jit(kernel: jax.Array, format: Format, kept_as: Any) -> QuantizedKernel:
    one = functools.partial(_quantize, jnp, format=format, kept_as=kept_as)
    return jax.vmap(one)(kernel) if kernel.ndim == 3 else one(kernel)


def _quantize(xp: ModuleType, kernel: Any, format: Format, kept_as: Any) -> QuantizedKernel:
    flat = kernel.T.reshape(-1)
    block = format.block_size
    code, scales = _encode_8bit(xp, flat, block) if format.code == "int8" else _encode_4bit(xp, flat, format)
    rows = kernel.shape[1] if kernel.shape[0] % block == 0 else 1
    nested_scales = offset = None
    if format.double_quantization:
        offset = mean(xp, scales)
        scales, nested_scales = _encode_8bit(xp, scales - offset, NESTED_BLOCK)
    return QuantizedKernel(code.reshape(rows, -1), scales.reshape(rows, -1), nested_scales, offset, kernel.shape, kept_as, format)


def _encode_4bit(xp: ModuleType, flat: Any, format: Format) -> tuple[Any, Any]:
    """Returns the packed codes, (ceil(values / 2),) uint8, and each block's scale, (blocks,) float32."""
    midpoints, order = codes.borders(format.code)

    def part(values: Any) -> tuple[Any, Any]:
        scaled, largest = _scaled(xp, values, format.block_size)
        rank = (scaled > midpoints[0]).astype(np.uint8)
        for midpoint in midpoints[1:]:
            rank = rank + (scaled > midpoint).astype(np.uint8)
        code = rank if (order == np.arange(16)).all() else _look_up(xp, order, rank)
        code = code.reshape(-1)[: values.size + values.size % 2]
        return code[0::2] * np.uint8(16) + code[1::2], largest

    return _in_parts(xp, part, flat)


def _scaled(xp: ModuleType, values: Any, block: int) -> tuple[Any, Any]:
    """Returns values (values,) divided by their block's largest magnitude, (blocks, block) with zeros at the end, and that, (blocks,)."""
    blocks = _blocks(xp, values, block)
    largest = xp.abs(blocks).max(axis=1)
    # XLA would take the floor, a subnormal number, for zero
    floor = _LEAST if xp is np else np.finfo(np.float32).tiny
    divisor = xp.maximum(largest, floor)[:, None]
    scaled = blocks * (np.float32(1) / divisor)
    if values.size % block:  # bitsandbytes divides the last block where it isn't full, and raises its scale to the floor
        scaled = xp.concatenate([scaled[:-1], blocks[-1:] / divisor[-1:]])
        largest = xp.concatenate([largest[:-1], xp.where(largest[-1:] < floor, _LEAST, largest[-1:])])
    return scaled, largest


def _blocks(xp: ModuleType, values: Any, block: int) -> Any:
    values = values.astype(np.float32)
    short = -values.size % block
    return (xp.concatenate([values, xp.zeros(short, np.float32)]) if short else values).reshape(-1, block)


def _encode_8bit(xp: ModuleType, flat: Any, block: int) -> tuple[Any, Any]:
    """Returns dynamic 8-bit codes, (values,) uint8, and each block's scale, (blocks,) float32."""

    def part(values: Any) -> tuple[Any, Any]:
        code, largest = encode_blocks(xp, _blocks(xp, values, block))
        return code.reshape(-1)[: values.size], largest

    return _in_parts(xp, part, flat)


def encode_blocks(xp: ModuleType, blocks: Any, signed: bool = True) -> tuple[Any, Any]:
    """Returns dynamic 8-bit codes of blocks (..., block) float32, uint8 of the same shape, and each block's scale, (...) float32."""
    largest = xp.abs(blocks).max(axis=-1)
    inverse = np.float32(1) / xp.where(largest == 0, np.float32(1), largest)
    # the bounds also keep XLA from fusing each product with the sum after it, which would round once instead of twice
    place = (xp.clip(blocks * inverse[..., None], -1, 1) + np.float32(1)) * np.float32((codes.BINS - 1) / 2)
    place = xp.where(place > 0, place, np.float32(0))  # zero times the infinite inverse of a subnormal scale is no number
    code = _look_up(xp, codes.bins(signed), (place + np.float32(0.5)).astype(np.int32))
    return xp.where((largest == 0)[..., None], np.uint8(0), code), largest  # a block of zeros: any code times zero


def decode_blocks(xp: ModuleType, code: Any, largest: Any, signed: bool = True) -> Any:
    """Returns the values of codes (..., block) with scales (...), float32."""
    return _look_up(xp, codes.dynamic(signed), code) * largest[..., None]


def _in_parts(xp: ModuleType, function: Any, flat: Any) -> tuple[Any, Any]:
    """Applies `function` to parts of whole blocks on the host, to everything at once under XLA; joins the two results."""
    if xp is jnp:
        result: tuple[Any, Any] = function(flat)
        return result
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [function(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def mean(xp: ModuleType, values: Any) -> Any:
    """Returns the mean of values (values,) float32, summed in the order of torch on one CPU thread, so that it has torch's bits.

    Four vectors of eight run side by side, in groups of 16 that are summed in groups of 16, and so on, four levels deep
    (ATen/native/cpu/SumKernel.cpp). Other orders differ in the last bit, which would change codes at the border between two.
    """
    lanes = 8 if values.size >= 8 else 1
    vectors = values.size // lanes
    body = values[: vectors * lanes].reshape(vectors, lanes)
    groups = vectors // 4
    sums = _cascade(xp, body[: groups * 4].reshape(groups, 4 * lanes)).reshape(4, lanes)
    total = _in_order(sums[0], [*body[groups * 4 :], *sums[1:]])
    total = _in_order(np.float32(0), [*values[vectors * lanes :], *total])
    # XLA would multiply by the rounded inverse of a number that it knows
    size = np.float32(values.size) if xp is np else jax.lax.optimization_barrier(jnp.float32(values.size))
    return total / size


def _cascade(xp: ModuleType, rows: Any) -> Any:
    """Returns the sum of rows (rows, width) over four levels, (width,)."""
    step = 2 ** max(4, int(np.ceil(np.log2(max(len(rows), 2)))) // 4)
    width = rows.shape[1]
    zero = xp.zeros(width, np.float32)
    rest = []
    for _ in range(3):
        whole = len(rows) // step
        rest.append(_in_order(zero, rows[whole * step :]))
        rows = _in_order(xp.zeros((whole, width), np.float32), rows[: whole * step].reshape(whole, step, width).swapaxes(0, 1))
    return _in_order(rest[0], [*rest[1:], _in_order(zero, rows)])


def _in_order(total: Any, terms: Any) -> Any:
    for term in terms:
        total = total + term
    return total


def weight(kernel: QuantizedKernel, dtype: Any) -> Any:
    """Returns the torch weight W = kernel.T, (out, in) or (layers, out, in), dequantized in float32 and rounded to `dtype`."""
    if isinstance(kernel.codes, np.ndarray):
        one = functools.partial(_weight, np, kernel, np.dtype(dtype))
        return one(*_arrays(kernel)) if kernel.codes.ndim == 2 else np.stack([one(*layer) for layer in _layers(kernel)])
    return _weight_jit(kernel, np.dtype(dtype))


def _arrays(kernel: QuantizedKernel) -> tuple[Any, Any, Any, Any]:
    return kernel.codes, kernel.scales, kernel.nested_scales, kernel.offset


def _layers(kernel: QuantizedKernel) -> list[tuple[Any, Any, Any, Any]]:
    return [tuple(None if part is None else part[layer] for part in _arrays(kernel)) for layer in range(len(kernel.codes))]  # type: ignore[misc]


@functools.partial(jax.jit, static_argnums=1)
def _weight_jit(kernel: QuantizedKernel, dtype: Any) -> jax.Array:
    one = functools.partial(_weight, jnp, kernel, dtype)
    return jax.vmap(one)(*_arrays(kernel)) if kernel.codes.ndim == 3 else one(*_arrays(kernel))


def _weight(xp: ModuleType, kernel: QuantizedKernel, dtype: Any, code: Any, scales: Any, nested_scales: Any, offset: Any) -> Any:
    inputs, outputs = kernel.features
    block = kernel.format.block_size
    scales = decode_scales(xp, scales, nested_scales, offset)
    values = _look_up(xp, codes.BOOKS[kernel.format.code], _halves(xp, code) if kernel.format.values_a_byte == 2 else code)
    short = scales.shape[1] * block - values.shape[1]
    values = xp.pad(values[:, : scales.shape[1] * block], ((0, 0), (0, max(short, 0))))
    scaled = values.reshape(*scales.shape, block) * scales[..., None]
    return scaled.reshape(-1)[: inputs * outputs].reshape(outputs, inputs).astype(dtype)


def _halves(xp: ModuleType, code: Any) -> Any:
    """Returns the two codes of each byte, (rows, 2 * bytes) uint8."""
    return xp.stack([code >> np.uint8(4), code & np.uint8(15)], axis=-1).reshape(code.shape[0], -1)


def _look_up(xp: ModuleType, table: Any, index: Any) -> Any:
    """Returns the table's values at `index`, which can't be out of bounds. XLA fuses this with what uses it (benchmarks/dequantize.py)."""
    return table[index] if xp is np else jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def decode_scales(xp: ModuleType, scales: Any, nested_scales: Any, offset: Any) -> Any:
    """Returns each block's scale, (rows, blocks) float32."""
    if nested_scales is None:
        return scales
    each = xp.repeat(nested_scales, NESTED_BLOCK)[: scales.size].reshape(scales.shape)
    product = _look_up(xp, codes.INT8, scales) * each
    # the bound does nothing but keep XLA from fusing the product and the sum, which would round once instead of twice
    return xp.maximum(product, np.finfo(np.float32).min) + offset


def to_bitsandbytes(kernel: QuantizedKernel, layer: int | None = None) -> dict[str, Any]:
    """Returns a kernel, or one layer of a stack, as bitsandbytes holds it: numpy arrays and what its `QuantState` says.

    `packed` (ceil(values / 2), 1) uint8, `absmax` (blocks,) float32 or uint8, `nested_absmax` (nested blocks,) float32 or None,
    `offset` a float or None, `shape` that of the torch weight, (out, in), `dtype` and `format`. An 8-bit code has `packed` (out, in).
    """
    code, scales, nested_scales, offset = (
        None if part is None else np.asarray(part if layer is None else part[layer]) for part in _arrays(kernel)
    )
    assert code is not None
    assert scales is not None
    assert code.ndim == 2, "a stack, and no layer of it is named"
    shape = kernel.features[::-1]
    return {
        "packed": code.reshape(-1, 1) if kernel.format.values_a_byte == 2 else code.reshape(shape),
        "absmax": scales.reshape(-1),
        "nested_absmax": nested_scales,
        "offset": None if offset is None else float(offset),
        "shape": shape,
        "dtype": kernel.kept_as,
        "format": kernel.format,
    }


def from_bitsandbytes(parts: Mapping[str, Any]) -> QuantizedKernel:
    """Returns the kernel, with numpy arrays, that parts as `to_bitsandbytes` names them describe."""
    format: Format = parts["format"]
    outputs, inputs = parts["shape"]
    rows = outputs if inputs % format.block_size == 0 else 1
    return QuantizedKernel(
        np.asarray(parts["packed"], np.uint8).reshape(rows, -1),
        np.asarray(parts["absmax"], np.uint8 if format.double_quantization else np.float32).reshape(rows, -1),
        np.asarray(parts["nested_absmax"], np.float32) if format.double_quantization else None,
        np.asarray(parts["offset"], np.float32) if format.double_quantization else None,
        (int(inputs), int(outputs)),
        np.dtype(parts["dtype"]),
        format,
    )
