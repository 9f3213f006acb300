"""Codes, scales and dequantized values are bitsandbytes' own, to the bit."""

import bitsandbytes.backends.default.ops as default_ops
import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.models import segments
from jaxft.quant import Format, QuantizedKernel, from_bitsandbytes, quantize, to_bitsandbytes
from jaxft.quant.blockwise import weight

torch._dynamo.config.disable = True  # bitsandbytes compiles what its CPU library lacks, anew for each shape; eager code is as right
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def numbers(seed, shape, kind, dtype):
    """A torch weight (out, in) of normal values, with what `kind` names among them, and the same bits in numpy."""
    random = np.random.default_rng(seed)
    values = random.normal(size=shape).astype(np.float32) * 0.02
    somewhere = random.random(shape) < 0.01
    if kind == "outliers":
        values[somewhere] *= 1e4
    elif kind == "zeros":
        values[: shape[0] // 2 + 1] = 0
    elif kind == "subnormals":
        values = np.where(random.random(shape) < 0.5, values * np.float32(1e-37), values * np.float32(1e-39))
    elif kind == "steps":
        values = np.round(values * 200) / 16
    tensor = torch.from_numpy(values).to(TORCH[dtype])
    bits = tensor.view(torch.int16).numpy().view(jnp.dtype(dtype)) if tensor.element_size() == 2 else tensor.numpy()
    return tensor, bits


def theirs(tensor, format):
    if format.code == "int8":
        packed, state = bnb.quantize_blockwise(tensor, blocksize=format.block_size)
        if format.double_quantization:
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = bnb.quantize_blockwise(state.absmax - state.offset, blocksize=256)
            state.nested = True
        return packed, state
    return bnb.quantize_4bit(tensor, blocksize=format.block_size, compress_statistics=format.double_quantization, quant_type=format.code)


def dequantized(packed, state, format):
    if format.code == "int8":
        return bnb.dequantize_blockwise(packed, state)
    if state.shape[-1] % format.block_size == 0:
        return bnb.dequantize_4bit(packed, state)
    # their AVX-512 kernel takes a wrong scale where blocks run across the ends of rows; their torch code is right everywhere
    absmax = state.absmax
    if format.double_quantization:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return default_ops._dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, format.block_size, state.shape, state.dtype)


def bits(array):
    array = np.ascontiguousarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def assert_equal_bits(ours, theirs):
    np.testing.assert_array_equal(bits(ours), bits(theirs))


def assert_as_bitsandbytes(kernel, tensor, values=True):
    packed, state = theirs(tensor, kernel.format)
    parts = to_bitsandbytes(kernel)
    assert_equal_bits(parts["packed"], packed.numpy())
    assert_equal_bits(parts["absmax"], state.absmax.numpy())
    if kernel.format.double_quantization:
        assert_equal_bits(parts["nested_absmax"], state.state2.absmax.numpy())
        assert parts["offset"] == float(state.offset)
    if values:
        state.dtype = torch.float32
        # adding zero makes -0 and 0 one: bitsandbytes' kernels differ in the sign of FP4's second zero
        assert_equal_bits(weight(kernel, np.float32) + np.float32(0), dequantized(packed, state, kernel.format).numpy() + np.float32(0))


SHAPES = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 70)), st.sampled_from([(64, 128), (96, 256), (48, 4096), (1, 1), (300, 257), (3, 2048)])
)
CODES = st.sampled_from(["nf4", "fp4", "int8"])
DTYPES = st.sampled_from(list(TORCH))
KINDS = st.sampled_from(["normal", "outliers", "zeros", "subnormals", "steps"])
FORMATS = st.builds(Format, CODES, st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]), st.booleans())


@settings(max_examples=100, deadline=None)
@given(SHAPES, DTYPES, FORMATS, KINDS, st.integers(0, 2**31))
def test_arrays_on_the_host_have_their_bits(shape, dtype, format, kind, seed):
    tensor, values = numbers(seed, shape, kind, dtype)
    assert_as_bitsandbytes(quantize(values.T, format), tensor)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("code", "dtype", "shape", "block", "kind"),
    [
        ("nf4", "float32", (96, 256), 64, "outliers"),
        ("nf4", "bfloat16", (200, 257), 64, "normal"),
        ("fp4", "float16", (64, 512), 128, "normal"),
        ("int8", "float32", (96, 96), 256, "normal"),
        ("nf4", "float32", (65, 33), 32, "zeros"),
    ],
)
def test_arrays_on_a_device_have_their_bits(code, dtype, shape, block, kind, double):
    tensor, values = numbers(1, shape, kind, dtype)
    kernel = quantize(jnp.asarray(values.T), Format(code, block, double))
    assert isinstance(kernel.codes, jax.Array)
    assert_as_bitsandbytes(kernel, tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_to_a_half_type_as_theirs(dtype):
    tensor, values = numbers(2, (96, 256), "outliers", dtype)
    kernel = quantize(jnp.asarray(values.T), Format())
    packed, state = theirs(tensor, kernel.format)
    expected = dequantized(packed, state, kernel.format).float().numpy()
    np.testing.assert_array_equal(np.asarray(weight(kernel, dtype), np.float32), expected)


@pytest.fixture
def one_thread():
    """Torch sums 32768 numbers and more in a part a thread; its bits are those of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_large_kernel_is_quantized_in_parts_with_their_bits():
    tensor, values = numbers(3, (1500, 1408), "outliers", "float32")
    assert_as_bitsandbytes(quantize(values.T, Format()), tensor)


def test_a_block_of_zeros_is_119():
    kernel = quantize(np.zeros((128, 4), np.float32), Format())
    assert set(np.unique(kernel.codes)) == {119}
    assert not np.asarray(kernel.dense()).any()


@pytest.mark.parametrize("shape", [(64, 24), (33, 7)])
def test_a_stack_is_its_layers(shape):
    random = np.random.default_rng(4)
    stack = random.normal(size=(3, *shape)).astype(np.float32)
    format = Format(block_size=32)
    for array in (stack, jnp.asarray(stack)):
        kernel = quantize(array, format)
        assert kernel.shape == (3, *shape)
        for layer in range(3):
            alone = quantize(stack[layer], format)
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], kernel)
            jax.tree.map(assert_equal_bits, one, jax.tree.map(jnp.asarray, alone))
            parts = to_bitsandbytes(kernel, layer)
            assert_equal_bits(parts["packed"], to_bitsandbytes(alone)["packed"])
            assert_equal_bits(np.asarray(kernel.dense())[layer], alone.dense())


def test_a_stack_can_be_cut_joined_and_scanned():
    random = np.random.default_rng(5)
    params = {"layers": {"0-3": {"kernel": quantize(jnp.asarray(random.normal(size=(4, 64, 64)), jnp.float32), Format())}}}
    cut = segments.regroup(params, lambda layer: layer > 0)
    assert [kernel["kernel"].shape for kernel in cut["layers"].values()] == [(1, 64, 64), (3, 64, 64)]
    joined = segments.regroup(cut, lambda _: 0)
    jax.tree.map(assert_equal_bits, params, joined)
    x = jnp.asarray(random.normal(size=(5, 64)), jnp.float32)
    stack = joined["layers"]["0-3"]["kernel"]
    scanned = jax.lax.scan(lambda carry, kernel: (kernel.dot(carry, None), None), x, stack)[0]
    expected = x
    for layer in np.asarray(stack.dense()):
        expected = expected @ layer
    np.testing.assert_allclose(scanned, expected, rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("code", ["nf4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_parts_make_the_kernel_again(code, double):
    values = np.random.default_rng(6).normal(size=(40, 33)).astype(np.float32)
    kernel = quantize(values, Format(code, 64, double), "bfloat16")
    again = from_bitsandbytes(to_bitsandbytes(kernel))
    assert isinstance(again, QuantizedKernel)
    assert jax.tree.structure(again) == jax.tree.structure(kernel)
    jax.tree.map(assert_equal_bits, again, kernel)


def test_mistaken_formats_are_named():
    with pytest.raises(UserError, match="There is no code book 'nf5'. Did you mean 'nf4'?"):
        Format("nf5")
    with pytest.raises(UserError, match="A block size is one of 32, .*, 4096, not 48"):
        Format(block_size=48)


@pytest.mark.parametrize("shape", [(10,), (2, 2, 2, 2), (0, 4)])
@pytest.mark.parametrize("made", [np.ones, jnp.ones])
def test_what_is_no_kernel_is_told(shape, made):
    with pytest.raises(UserError, match=r"A kernel is \(in, out\)"):
        quantize(made(shape, np.float32), Format())


def test_it_prints_and_counts_as_an_array():
    kernel = quantize(np.ones((3, 64, 32), np.float32), Format())
    assert repr(kernel) == "QuantizedKernel((3, 64, 32), float32, nf4, blocks of 64, double quantization)"
    without = jax.tree.map(lambda _: None, kernel)  # as in the trainable half of `partition`
    assert repr(without) == "QuantizedKernel((64, 32), float32, nf4, blocks of 64, double quantization)"
    assert (kernel.ndim, kernel.size, kernel.nbytes) == (3, 6144, 3 * (64 * 32 // 2 + 32 + 4 + 4))
