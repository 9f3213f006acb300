"""Two devices compute what one does, and hold what they should."""

import functools

import jax
import numpy as np
import pytest
from evaluation_batches import evaluation_batches
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lenient_optax import make_optimizer
from tiny_models import largest_difference, load, make_examples, make_reference, moved, same_bits

import jaxft
from jaxft.config import DataConfig, OptimizerConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.methods import AdaLoRA, LoRA
from jaxft.models.llama import PLACEMENT
from jaxft.models.registry import FAMILIES
from jaxft.tasks import SFT
from jaxft.train import placement
from jaxft.train.optimizer import OPTIMIZERS
from jaxft.train.state import new_state
from jaxft.train.step import make_step

METHOD = LoRA(rank=4, targets=("q_proj", "up_proj", "down_proj", "lm_head"), dropout=0.2)
OTHERS = (
    LoRA(rank=4, targets=("q_proj", "down_proj", "lm_head", "embed"), dropout=0.2, dora=True, lora_plus_ratio=2.0, bias="lora_only"),
    LoRA(rank=4, targets=("q_proj", "lm_head"), start="pissa"),
    AdaLoRA(init_rank=4, target_rank=2, targets=("q_proj", "down_proj", "lm_head"), dropout=0.2),
)
# a large epsilon: AdamW's division by the gradient's size makes nothing of rounding
OPTIMIZER = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=0, eps=1e-3)
EXAMPLES = make_examples([9, 14, 21, 12, 30, 7, 16, 11], answer=3)
MESHES = {
    "data": {"data_parallel": 2},
    "fsdp": {"data_parallel": 1, "fsdp_parallel": 2},
    "tensor": {"data_parallel": 1, "tensor_parallel": 2},
}


def mesh_of(name):
    if name == "one device":
        return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), placement.AXES)
    return placement.make_mesh(TrainConfig(batch_size=4, **MESHES[name]))


@functools.cache
def base():
    return load(make_reference("qwen2", num_hidden_layers=2, vocab_size=98))


def placed(mesh, optimizer, method=METHOD):
    """Returns state, its shardings and frozen leaves, laid out as a run lays them out."""
    model, params = base()
    params = moved(method, model, params, size=0.1)
    places = placement.shardings(params, PLACEMENT, mesh)
    mask = method.mask(params)
    trainable, frozen = jaxft.partition(jax.device_put(params, places), mask)
    state = new_state(trainable, optimizer)
    sharding = placement.state_shardings(state, jaxft.partition(places, mask)[0], mesh, optimizer)
    return jax.device_put(state, sharding), sharding, frozen


@functools.cache
def run(name, method=METHOD):
    """Returns the losses of two steps and the state after them."""
    mesh = mesh_of(name)
    optimizer = method.optimizer(make_optimizer(OPTIMIZER, 10), 10)
    state, sharding, frozen = placed(mesh, optimizer, method)
    function = placement.on_mesh(make_step(base()[0], SFT(), optimizer, seed=0, penalty=method.penalty), mesh)
    step = jax.jit(function, donate_argnums=0, out_shardings=(sharding, None))
    (batch,) = evaluation_batches(EXAMPLES, DataConfig(max_length=64, packing=False), 8, False)
    batch = placement.place_batch({key: value.reshape(2, 4, -1) for key, value in batch.items()}, mesh, placement.BATCH)
    losses = []
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return losses, state, sharding


@pytest.mark.parametrize("name", MESHES)
def test_two_devices_give_the_losses_and_the_leaves_of_one(name):
    losses, state, _ = run("one device")
    found_losses, found, _ = run(name)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)  # float32 sums in another order
    assert largest_difference(found.trainable, state.trainable) <= 1e-5
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", MESHES)
def test_the_state_stays_where_it_was_placed(name):
    _, state, sharding = run(name)
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, sharding))


@pytest.mark.parametrize("method", OTHERS, ids=("dora", "pissa", "adalora"))
def test_loras_relatives_too(method):
    losses, state, _ = run("one device", method)
    found_losses, found, _ = run("tensor", method)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert largest_difference(found.trainable, state.trainable) <= 1e-5
    assert losses[1] < losses[0]


def shard(array):
    """Returns the shape of what one device holds."""
    return array.addressable_shards[0].data.shape


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("data", {"base": (2, 32, 56), "lora_a": (2, 32, 4), "lora_b": (2, 4, 56), "embedding": (98, 32), "bias": (2, 32)}),
        ("fsdp", {"base": (2, 16, 56), "lora_a": (2, 16, 4), "lora_b": (2, 4, 56), "embedding": (98, 16), "bias": (2, 32)}),
        ("tensor", {"base": (2, 32, 28), "lora_a": (2, 32, 4), "lora_b": (2, 4, 28), "embedding": (49, 32), "bias": (2, 16)}),
    ],
)
def test_each_device_holds_its_share(name, shapes):
    model, params = base()
    params = moved(METHOD, model, params)
    params = jax.device_put(params, placement.shardings(params, PLACEMENT, mesh_of(name)))
    layer = params["layers"]["0-1"]
    kernel = layer["mlp"]["up_proj"]["kernel"]
    found = {"base": kernel.base, "lora_a": kernel.lora_a, "lora_b": kernel.lora_b}
    found |= {"embedding": params["embed"]["embedding"], "bias": layer["attention"]["q_proj"]["bias"]}
    assert {key: shard(array) for key, array in found.items()} == shapes


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_a_model_is_loaded_straight_into_its_places(name, tmp_path):
    make_reference("qwen2", num_hidden_layers=2, vocab_size=98).save_pretrained(tmp_path)
    placing = functools.partial(placement.shardings, mesh=mesh_of(name))
    _, found = jaxft.load_pretrained(tmp_path, placing=placing)
    assert same_bits(jax.device_get(found), jax.device_get(base()[1]))
    places = placement.shardings(found, PLACEMENT, mesh_of(name))
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, found, places))
    assert shard(found["layers"]["0-1"]["mlp"]["up_proj"]["kernel"]) == {"fsdp": (2, 16, 56), "tensor": (2, 32, 28)}[name]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_lie_where_their_parameters_do(optimizer, name):
    state, _, _ = placed(mesh_of(name), make_optimizer(OptimizerConfig(name=optimizer), 10))
    found = 0
    for path, parameter in jax.tree_util.tree_leaves_with_path(state.trainable):
        for place, moment in jax.tree_util.tree_leaves_with_path(state.optimizer):
            if place[-len(path) :] == path and moment.shape == parameter.shape:
                assert moment.sharding.is_equivalent_to(parameter.sharding, moment.ndim)
                found += 1
    assert found == len(jax.tree.leaves(state.trainable)) * (2 if optimizer == "adamw" else 1)


def test_what_an_axis_does_not_divide_is_on_every_device():
    params = {"embed": {"embedding": np.zeros((97, 32), np.float32)}}
    found = placement.shardings(params, PLACEMENT, mesh_of("tensor"))
    assert found["embed"]["embedding"].is_fully_replicated


def test_a_leaf_that_the_table_does_not_cover_is_an_error():
    with pytest.raises(ValueError, match="covers no 'router/kernel'"):
        placement.shardings({"router": {"kernel": np.zeros((2, 2), np.float32)}}, PLACEMENT, mesh_of("data"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model.__name__)
def test_every_familys_table_covers_its_names(family):
    paths = {path.replace("{layer}", "0") for _, path, _ in family.module.HF_NAMES}
    params = {}
    for path in paths:
        inner = params
        *parts, last = path.replace("layers/0", "layers/0-0").split("/")
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = np.zeros((1, 2, 2) if "layers" in path else (2, 2), np.float32)
    placement.shardings(params, family.module.PLACEMENT, mesh_of("fsdp"))


def test_a_batch_is_split_by_its_rows():
    batch = {"tokens": np.arange(2 * 4 * 3, dtype=np.int32).reshape(2, 4, 3)}
    found = placement.place_batch(batch, mesh_of("data"), placement.BATCH)["tokens"]
    assert [piece.data.shape for piece in found.addressable_shards] == [(2, 2, 3)] * 2
    np.testing.assert_array_equal(found, batch["tokens"])


def test_a_lora_lies_along_its_kernel():
    kernel = moved(METHOD, *base())["layers"]["0-1"]["mlp"]["down_proj"]["kernel"]
    spec = kernel.placement(P("tensor", "fsdp"))
    assert (spec.base, spec.lora_a, spec.lora_b, spec.scale) == (P("tensor", "fsdp"), P("tensor", None), P(None, "fsdp"), P())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_parallel": 3}, r"2 devices can't form a mesh .* \[3, 1, 1\]"),
        ({"data_parallel": 1}, r"= \[1, 1, 1\] takes 1 devices; there are 2. Set one of them to -1"),
        ({"fsdp_parallel": -1}, "can't form a mesh"),
        ({"tensor_parallel": 0}, "can't form a mesh"),
        ({"batch_size": 3}, "train.batch_size is 3 rows, which 2 devices"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        placement.make_mesh(TrainConfig(**settings))


def test_the_default_is_all_devices_along_data():
    assert dict(placement.make_mesh(TrainConfig()).shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
