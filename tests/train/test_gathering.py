"""What goes from device to device where they share the weights, read off the compiled step."""

import functools
import re

import jax
import numpy as np
import pytest
from evaluation_batches import evaluation_batches
from jax.sharding import Mesh
from lenient_optax import make_optimizer
from tiny_models import load, make_examples, make_reference, moved

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.hub.quantized import PATTERNS, chosen, in_formats
from jaxft.methods import LoRA
from jaxft.models.llama import PLACEMENT
from jaxft.quant.blockwise import Format
from jaxft.tasks import SFT
from jaxft.train import placement
from jaxft.train.state import new_state
from jaxft.train.step import make_step

WIDTH, INNER, RANK, TOKENS = 64, 160, 3, 4 * 24
KERNELS = {WIDTH * WIDTH, WIDTH * INNER, WIDTH * WIDTH // 2}  # of q and o, of the MLP, of k and v
METHOD = LoRA(rank=RANK)


@functools.cache
def compiled(quantized, fsdp):
    """Returns the compiled step, its arguments, and what it gave: the loss and the state's trainable leaves."""
    model, params = load(make_reference("qwen2", num_hidden_layers=2, vocab_size=98, hidden_size=WIDTH, intermediate_size=INNER))
    if quantized:
        params = in_formats(params, chosen(params, Format("nf4", 32, True), PATTERNS))
    model, params = model.clone(remat="dots"), moved(METHOD, model, params, size=0.1)
    devices = np.asarray(jax.devices()[:fsdp]).reshape(1, fsdp, 1)
    mesh, optimizer = Mesh(devices, placement.AXES), make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3), 10)
    places, mask = placement.shardings(params, PLACEMENT, mesh), METHOD.mask(params)
    trainable, frozen = jaxft.partition(jax.device_put(params, places), mask)
    state = new_state(trainable, optimizer)
    sharding = placement.state_shardings(state, jaxft.partition(places, mask)[0], mesh, optimizer)
    (batch,) = evaluation_batches(make_examples([21, 24, 20, 22], answer=3), DataConfig(max_length=24, packing=False), 4, False)
    batch = placement.place_batch({key: value[None] for key, value in batch.items()}, mesh, placement.BATCH)
    step = jax.jit(placement.on_mesh(make_step(model, SFT(), optimizer, seed=0), mesh), out_shardings=(sharding, None))
    program = step.lower(jax.device_put(state, sharding), frozen, batch).compile()
    state, metrics = program(jax.device_put(state, sharding), frozen, batch)
    return program.as_text(), float(metrics["loss"]), jax.device_get(state.trainable)


def gathered(text):
    """Returns type and size of every array that an all-gather within the layers' loops makes."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(.*op_name=\"[^\"]*layers/while", text)
    return [(kind, int(np.prod([int(side) for side in sides.split(",")]))) for kind, sides in found]


def test_codes_are_gathered_and_no_dense_kernel():
    found = gathered(compiled(True, 2)[0])
    codes = [size for kind, size in found if kind == "u8"]
    assert {size // 2 for size in KERNELS} <= set(codes)
    assert max(size for kind, size in found if kind != "u8") <= RANK * INNER  # a LoRA's


def test_dense_kernels_are_gathered_and_no_activations():
    found = gathered(compiled(False, 2)[0])
    assert set(found) >= {("f32", size) for size in KERNELS}
    assert not [size for _, size in found if size % TOKENS == 0 and size not in KERNELS and size > RANK * INNER]


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_devices_that_share_the_weights_compute_what_one_does(quantized):
    _, loss, trained = compiled(quantized, 1)
    _, found, again = compiled(quantized, 2)
    np.testing.assert_allclose(found, loss, rtol=1e-6)  # float32 sums in another order
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), again, trained)
