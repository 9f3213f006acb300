"""Code books: the values in [-1, 1] that a code of 4 or 8 bits stands for, scaled by its block's largest magnitude."""

import functools

import numpy as np
from numpy.typing import NDArray

Book = NDArray[np.float32]

# NormalFloat: the quantiles of a normal distribution, with an exact zero. QLoRA, arXiv:2305.14314, appendix E.
NF4: Book = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)

# A sign bit, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4: floats of two exponent bits and one of mantissa, as bitsandbytes orders them.
FP4: Book = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)

# Sixteen even steps around an exact zero, the 4-bit integers of QLoRA's comparison (arXiv:2305.14314, section 5): -8/8 ... 7/8 would
# lose the largest positive value, so the book is symmetric and its last code repeats the largest.
INT4: Book = np.array([*range(-7, 8), 7], np.float32) / np.float32(7)

_DECADES = 7  # of the dynamic maps: 1e-6 to 1


@functools.cache
def dynamic(signed: bool = True) -> Book:
    """Returns the 256 values of the dynamic 8-bit map: fewer bits of fraction for each smaller power of ten.

    8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, and bitsandbytes' `create_dynamic_map`, to the bit.
    `signed` False gives values in [0, 1] only, for second moments: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.

    >>> dynamic().size, float(dynamic().max()), float(dynamic(signed=False).min())
    (256, 1.0, 0.0)
    """
    values: list[NDArray[np.float32]] = [np.array([0.0, 1.0], np.float32)]
    for decade in range(_DECADES):
        edges = _linspace(2**decade if signed else 2 ** (decade + 1))
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - _DECADES + 1)) * means
        values += [scaled, -scaled] if signed else [scaled]
    book: Book = np.sort(np.concatenate(values))
    return book


def _linspace(steps: int) -> NDArray[np.float32]:
    """`steps` even steps from 0.1 to 1 as torch takes them in float32: from both ends to the middle, each product and sum rounded once."""
    first, last = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
    index = np.arange(steps + 1)
    joined: NDArray[np.float32] = np.where(index < (steps + 1) // 2, first + step * index, last - step * (steps - index)).astype(np.float32)
    return joined


INT8: Book = dynamic()
BOOKS: dict[str, Book] = {"nf4": NF4, "fp4": FP4, "int4": INT4, "int8": INT8}
BINS = 65536  # the grid on [-1, 1] that bitsandbytes rounds a value to before it looks its 8-bit code up


@functools.cache
def bins(signed: bool = True) -> NDArray[np.uint8]:
    """Returns the nearest 8-bit code of each of the `BINS` grid points."""
    book = dynamic(signed)
    grid = np.arange(BINS, dtype=np.float32) / np.float32((BINS - 1) / 2) - np.float32(1)
    return np.searchsorted((book[1:] + book[:-1]) / np.float32(2), grid).astype(np.uint8)


@functools.cache
def borders(name: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Returns the midpoints between neighbouring values of a 4-bit book, (15,), and the codes from the least value up, (16,)."""
    order = np.argsort(BOOKS[name], kind="stable").astype(np.uint8)
    values = BOOKS[name][order]
    return (values[1:] + values[:-1]) / np.float32(2), order
