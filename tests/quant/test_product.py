"""The product with a quantized kernel: the plain form's values and gradient, nothing dense kept, placement, and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxft
from jaxft.models.node import dot, linear, take
from jaxft.quant import Format, quantize
from jaxft.train import placement


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(x, kernel):
    return x @ kernel.dense().astype(x.dtype)


@pytest.mark.parametrize("format", [Format("nf4"), Format("fp4", 32, double_quantization=False), Format("int8", 128)])
@pytest.mark.parametrize("shape", [(128, 48), (33, 7)])
def test_product_and_gradient_are_the_plain_forms(format, shape):
    kernel = quantize(normal(0, *shape), format)
    x, direction = normal(1, 5, shape[0]), normal(2, 5, shape[1])
    ours, pull = jax.vjp(lambda x: dot(x, kernel), x)
    expected, plain_pull = jax.vjp(lambda x: plain(x, kernel), x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(pull(direction)[0], plain_pull(direction)[0], rtol=1e-5, atol=1e-5)


def test_product_is_in_the_type_of_x():
    kernel = quantize(normal(0, 64, 32), Format(), dtype="bfloat16")
    x = normal(1, 4, 64, dtype=jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16
    assert kernel.dense().dtype == jnp.float32
    ours = dot(x, kernel)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, plain(x, kernel))
    np.testing.assert_array_equal(linear(x, kernel, jnp.ones(32)), ours + jnp.bfloat16(1))
    np.testing.assert_array_equal(take(jnp.array([3, 1]), kernel, jnp.float32), kernel.dense()[jnp.array([3, 1])])


def test_what_derives_from_the_kernel_is_zero():
    kernel = quantize(normal(0, 64, 32), Format(double_quantization=False))
    gradient = jax.grad(lambda kernel: dot(normal(1, 4, 64), kernel).sum(), allow_int=True)(kernel)
    assert gradient.codes.dtype == jax.dtypes.float0
    assert not np.asarray(gradient.scales).any()


def test_nothing_dense_waits_for_the_backward_pass():
    kernels = quantize(normal(0, 3, 128, 128), Format())

    def run(x, form):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(form(x, kernel)), None), x, kernels)[0].sum()

    def kept(form):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(lambda x: run(x, form), normal(1, 2, 128))[1]))

    dense = 3 * 128 * 128 * 4
    assert kept(plain) > dense
    assert kept(dot) < dense / 4  # codes, scales, and the activations of two tokens


@pytest.mark.parametrize("shape", [(128, 96), (33, 6)])
def test_two_devices_have_the_product_of_one(shape):
    kernel = quantize(normal(0, 2, *shape), Format())
    x = normal(1, 4, shape[0])
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 1, 2), placement.AXES)
    params = {"layers": {"0-1": {"kernel": kernel}}}
    for spec in (P(None, "tensor"), P("tensor", None)):
        places = placement.shardings(params, [("kernel", spec)], mesh)
        placed = placement.place(params, places)["layers"]["0-1"]["kernel"]

        def run(x, kernels):
            return jax.vmap(dot, in_axes=(None, 0))(x, kernels)

        if shape == (128, 96):  # whole rows: each device holds half of the codes
            assert {shard.data.size for shard in placed.codes.addressable_shards} == {kernel.codes.size // 2}
        np.testing.assert_allclose(jax.jit(run)(x, placed), run(x, kernel), rtol=1e-5, atol=1e-5)


def test_a_sharded_kernel_is_quantized_to_the_same_bits():
    array = normal(0, 128, 64)
    mesh = Mesh(np.asarray(jax.devices()), ("tensor",))
    sharded = quantize(jax.device_put(array, NamedSharding(mesh, P(None, "tensor"))), Format())
    jax.tree.map(np.testing.assert_array_equal, sharded, quantize(array, Format()))


@pytest.mark.parametrize("spec", [P(None, None, "tensor"), P(None, "tensor"), P()])
def test_a_sharded_model_is_quantized_where_it_lies(spec):
    mesh = Mesh(np.asarray(jax.devices()), ("tensor",))
    array = normal(0, 3, 128, 96)

    def held(value):
        params = {"embed": {"embedding": normal(1, 8, 96)}, "layers": {"0-2": {"mlp": {"up_proj": {"kernel": value}}}}}
        return jaxft.quantized(params, Format())["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]

    placed = held(jax.device_put(array, NamedSharding(mesh, spec)))
    jax.tree.map(np.testing.assert_array_equal, placed, held(array))
    share = 1 if spec == P() else 2
    for part in (placed.codes, placed.scales):
        assert {shard.data.size for shard in part.addressable_shards} == {part.size // share}


def test_one_shape_is_compiled_once():
    traces = []

    @jax.jit
    def run(x, kernel):
        traces.append(None)
        return dot(x, kernel)

    for seed in range(3):
        run(normal(seed, 4, 64), quantize(normal(seed, 64, 32), Format()))
    assert len(traces) == 1


def test_four_bits_and_an_eighth_are_held_for_a_parameter():
    kernel = quantize(normal(0, 1024, 1024), Format())
    held = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(kernel))
    assert 8 * held / 1024**2 == pytest.approx(4.127, abs=1e-3)
    assert Format().bits_a_parameter == pytest.approx(4.127, abs=1e-3)


def test_error_on_normal_values_is_the_known_one():
    values = normal(0, 1024, 1024)
    error = jnp.abs(quantize(values, Format(double_quantization=False)).dense() - values)
    assert float(error.mean()) == pytest.approx(0.0728, abs=3e-4)
    assert float((error / jnp.abs(values)).mean()) == pytest.approx(0.2033, abs=3e-3)


def test_a_checkpoint_gives_the_kernel_back(tmp_path):
    kernel = quantize(normal(0, 2, 96, 40), Format("nf4", 32), dtype="bfloat16")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kernel", kernel)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "kernel", jax.tree.map(jnp.zeros_like, kernel))
    assert jax.tree.structure(again) == jax.tree.structure(kernel)
    jax.tree.map(np.testing.assert_array_equal, again, kernel)
