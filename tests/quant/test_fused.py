"""The fused product in Pallas' interpret mode: the plain form's numbers, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.node import dot
from jaxft.quant import Format, quantize
from jaxft.quant.fused import fits, fused


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("format", "inputs", "outputs", "tokens", "dtype"),
    [
        (Format("nf4"), 192, 64, 64, "float32"),
        (Format("nf4", 128), 256, 130, 70, "float32"),
        (Format("fp4", 64, double_quantization=False), 128, 40, 3, "bfloat16"),
    ],
)
def test_it_is_the_plain_product(format, inputs, outputs, tokens, dtype):
    kernel = quantize(normal(0, inputs, outputs), format)
    assert fits(kernel)
    x, direction = normal(1, tokens, inputs, dtype=dtype), normal(2, tokens, outputs, dtype=dtype)
    ours, pull = jax.vjp(lambda x: fused(x, kernel, True), x)
    expected, plain_pull = jax.vjp(lambda x: dot(x, kernel), x)
    # sums in another order; bfloat16 results may round to the next of 256 steps an octave
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    for one, other in ((ours, expected), (pull(direction)[0], plain_pull(direction)[0])):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).mean())


@pytest.mark.parametrize(
    ("format", "shape"),
    [(Format("int8"), (128, 64)), (Format("nf4"), (96, 64)), (Format("nf4", 32), (128, 64)), (Format("nf4"), (2, 128, 64))],
)
def test_what_it_cannot_take_is_told(format, shape):
    assert not fits(quantize(normal(0, *shape), format))


def test_a_row_that_blocks_run_across_does_not_fit():
    assert not fits(quantize(normal(0, 192, 1), Format("nf4", 128)))
