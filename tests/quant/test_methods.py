"""Methods on a quantized base: what they compute, what they leave alone, and which of them are refused."""

import functools

import jax
import numpy as np
import pytest
from four_bit_models import dense
from lenient_optax import lenient
from reference_training import packed_rows
from tiny_models import largest_difference, moved, same_bits

import jaxft
from jaxft.config import OptimizerConfig
from jaxft.errors import UserError
from jaxft.hub.load import OriginalKernels, describe_pretrained
from jaxft.methods import IA3, AdaLoRA, BitFit, Bottleneck, Full, LoRA, NormTuning, Partial, Prefix, Prompt, PTuning, SparseMask, VeRA
from jaxft.methods.partition import size, size_in_bytes, trainable_leaves
from jaxft.models import segments
from jaxft.models.node import dense as dense_of
from jaxft.models.node import is_node, is_quantized
from jaxft.tasks import SFT
from jaxft.train.fit import check_method
from jaxft.train.optimizer import make_optimizer
from jaxft.train.state import new_state
from jaxft.train.step import make_step

FORMAT = jaxft.Format()
SPARSE = SparseMask(rank=1, choice="magnitude", targets=("up_proj",))
METHODS = {  # sums, each method at kernels of its own: compiling takes most of the time
    "around kernels": LoRA(rank=4, rslora=True, rank_pattern=(("layers/0", 2),), targets=("q_proj",))
    + LoRA(rank=3, dora=True, targets=("gate_proj",))
    + AdaLoRA(init_rank=4, target_rank=2, tfinal=2, targets=("k_proj",))
    + VeRA(rank=8, targets=("v_proj",))
    + IA3(targets=("o_proj", "down_proj"))
    + SPARSE,
    "beside kernels": LoRA(rank=4, targets=("q_proj", "embed"), modules_to_save=("lm_head", "norm"), lora_plus_ratio=4.0)
    + Bottleneck(size=4)
    + Prefix(virtual_tokens=3)
    + PTuning(virtual_tokens=2),
    "without kernels": NormTuning() + Prompt(virtual_tokens=3),
}


@functools.cache
def base():
    """Returns the model with its kernels in 4 bits, and with the same kernels dense."""
    model, params = jaxft.load_pretrained(dense(), quantization=FORMAT)
    return model, params, jax.tree.map(lambda value: dense_of(value) if is_quantized(value) else value, params, is_leaf=is_node)


def gradients(model, params, method):
    trainable, frozen = jaxft.partition(params, method.mask(params))

    def mean(trainable, frozen, rows):
        sums = SFT().sums(model, jaxft.combine(trainable, frozen), rows, {})
        return sums.loss / sums.weight

    return jax.jit(jax.value_and_grad(mean))(trainable, frozen, packed_rows())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_computes_what_it_does_on_the_kernels_made_dense(name):
    method, (model, quantized, whole) = METHODS[name], base()
    check_method(method, model, jax.eval_shape(lambda: quantized), 0)
    params, like = (moved(method, model, start, size=0.05) for start in (quantized, whole))
    trained = trainable_leaves(params, method.mask(params))
    assert {leaf.value.dtype for leaf in trained} == {np.dtype("float32")}
    loss, found = gradients(model, params, method)
    expected_loss, expected = gradients(model, like, method)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    for leaf, one, other in zip(trained, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(other) > 0, leaf.title
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other), leaf.title  # float32, sums in another order


def test_merged_is_the_kernel_made_dense_and_changed_and_the_rest_stays_quantized():
    method, (model, quantized, whole) = METHODS["around kernels"], base()
    tuned, like = (moved(method, model, start, size=0.05) for start in (quantized, whole))
    merged, expected = method.merge(model, tuned), method.merge(model, like)
    assert not any(map(is_node, jax.tree.leaves(merged, is_leaf=is_node)))
    assert largest_difference(merged, expected) <= 1e-5
    alone = SPARSE.merge(model, moved(SPARSE, model, quantized))
    held = {leaf.path[-2] for leaf in segments.leaves(alone, is_leaf=is_node) if is_quantized(leaf.value)}
    assert held == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}


def test_parameters_are_counted_as_of_dense_kernels_and_bytes_as_they_lie():
    model, quantized, whole = base()
    for params, like in ((quantized, whole), (LoRA(rank=2).init(jax.random.key(0), model, start) for start in (quantized, whole))):
        assert size(params) == size(like)
        assert [*map(size, jaxft.partition(params, LoRA().mask(params)))] == [*map(size, jaxft.partition(like, LoRA().mask(like)))]
    kernel = quantized["layers"]["0-1"]["mlp"]["up_proj"]["kernel"]
    assert size(kernel) == 2 * 64 * 128
    assert size_in_bytes(kernel) == 2 * (64 * 128 // 2 + 128 + 4 + 4)  # of a layer: codes, a scale a block, theirs, the offset


def test_twenty_steps_leave_every_bit_of_the_base():
    method, (model, params, _) = LoRA(rank=4), base()
    tuned = method.init(jax.random.key(0), model, params)
    trainable, frozen = jaxft.partition(tuned, method.mask(tuned))
    kept = jax.tree.map(np.array, frozen)
    optimizer = lenient(make_optimizer(OptimizerConfig(learning_rate=1e-2), 20))
    step = jax.jit(make_step(model, SFT(), optimizer, seed=0), donate_argnums=0)
    state = new_state(jax.tree.map(np.array, trainable), optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, {name: array[None] for name, array in packed_rows().items()})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert same_bits(kept, frozen)
    whole = jaxft.combine(state.trainable, frozen)
    assert same_bits(kept, jaxft.partition(whole, method.mask(whole))[1])
    assert not same_bits(trainable, jaxft.partition(whole, method.mask(whole))[0])


REFUSED = {
    "full": (Full(), r"layers/0/attention/k_proj/kernel can't train: it is held in nf4.*model.quantization=none"),
    "layers": (Partial(last=1), "layers/1/attention/k_proj/kernel can't train: it is held in nf4"),
    "a pattern": (BitFit(targets=("up_proj",)), "layers/0/mlp/up_proj/kernel can't train"),
    "whole modules": (LoRA(targets=("q_proj",), modules_to_save=("layers/1/mlp",)), "layers/1/mlp/down_proj/kernel can't train"),
    "full beside a LoRA": (LoRA(targets=("q_proj",)) + Full(exclude=("mlp", "k_proj", "v_proj", "o_proj")), "q_proj/kernel can't train"),
    "pissa": (LoRA(start="pissa"), "takes a part out of the base.*a base in nf4 can't hold exactly. Start 'loftq' is made for it"),
    "olora": (LoRA(start="olora"), "a base in nf4 can't hold exactly"),
    "a pattern without a match": (
        Full(exclude=("kernl",)),
        "matched against: .*attention/k_proj/kernel, layers/N/attention/o_proj/kernel,",
    ),
    "loftq of too high a rank": (LoRA(start="loftq", rank=65), "a rank of 65 is above"),
    "loftq of embeddings": (LoRA(start="loftq", targets=("layers", "embed")), "embeddings start at 'default'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_shapes_alone(name):
    method, words = REFUSED[name]
    model, shapes = describe_pretrained(dense(), quantization=FORMAT)
    with pytest.raises(UserError, match=words):
        check_method(method, model, shapes, 0, OriginalKernels(dense()))


def test_what_leaves_the_kernels_alone_is_taken():
    model, shapes = describe_pretrained(dense(), quantization=FORMAT, quantized=("layers/0",))
    for method in (
        Full(exclude=("layers/0",)),
        Partial(last=1),
        NormTuning(),
        Partial(targets=("embed", "lm_head")),
        LoRA(start="loftq", layers=(0,)),
    ):
        check_method(method, model, shapes, 0, OriginalKernels(dense()))
