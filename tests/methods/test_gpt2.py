"""Every method on GPT-2, whose kernels, norms and tables have other names than Llama's, and whose layers have biases."""

import jax
import numpy as np
import optax
import pytest
from method_checks import base, check_cuts, check_merge, check_start, check_two_devices, check_what_moves, logits
from tiny_models import largest_difference, moved

from jaxft.errors import UserError
from jaxft.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    Full,
    LoRA,
    NormTuning,
    Partial,
    Prefix,
    Prompt,
    PTuning,
    SparseMask,
    VeRA,
)
from jaxft.methods.ia3 import Scaled, ScaledInput
from jaxft.models import segments
from jaxft.models.node import is_node

FAMILY = "gpt2"
METHODS = {
    "full": Full(),
    "partial": Partial(last=1, targets=("ln_f", "position_embed")),
    "biases": BitFit(),
    "norms": NormTuning(),
    "lora": LoRA(rank=2, alpha=4.0, modules_to_save=("position_embed",)),
    "dora": LoRA(rank=2, alpha=4.0, dora=True, targets=("c_attn", "mlp/c_proj"), bias="lora_only"),
    "adalora": AdaLoRA(init_rank=3, target_rank=2),
    "vera": VeRA(rank=6),
    "ia3": IA3(),
    "sparse": SparseMask(rank=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base_and_differs_once_moved(name):
    check_start(METHODS[name], FAMILY)


@pytest.mark.parametrize("name", METHODS)
def test_merged_is_unmerged(name):
    check_merge(METHODS[name], FAMILY)


TOGETHER = {  # what trains in each is all that its methods train, and what is frozen all that none of them does
    "one": LoRA(rank=2, targets=("c_attn",))
    + VeRA(rank=6, targets=("c_fc",))
    + IA3(("c_proj",), ("mlp/c_proj",))
    + NormTuning()
    + Prefix(3),
    "another": SparseMask(rank=1, targets=("c_attn",)) + LoRA(rank=2, dora=True, targets=("mlp",)) + BitFit() + Bottleneck() + Prompt(3),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_only_what_trains_moves(name):
    check_what_moves(TOGETHER[name], FAMILY)


@pytest.mark.slow
def test_how_a_batch_is_cut_changes_nothing():
    check_cuts(TOGETHER["another"], FAMILY)


@pytest.mark.slow
def test_two_devices_are_one():
    check_two_devices(TOGETHER["one"], FAMILY, {"data_parallel": 1, "tensor_parallel": 2})


@pytest.mark.parametrize("method", [Bottleneck(), Bottleneck.par_bn()], ids=["sequential", "parallel"])
def test_a_bottleneck_starts_as_the_base(method):
    model, params = base(FAMILY)
    assert largest_difference(logits(method.init(jax.random.key(0), model, params), FAMILY), logits(params, FAMILY)) <= 1e-5
    assert largest_difference(logits(moved(method, model, params), FAMILY), logits(params, FAMILY)) > 0.1


@pytest.mark.parametrize("method", [Bottleneck(), Prefix(2), Prompt(2), PTuning(2)], ids=lambda method: method.title)
def test_what_can_not_be_merged_says_so(method):
    model, params = base(FAMILY)
    with pytest.raises(UserError, match="can't be merged"):
        method.merge(model, method.init(jax.random.key(0), model, params))


def scaled(family):
    """Returns which kernels have a vector by default, and which of them on their input."""
    model, params = base(family)
    found = segments.leaves(IA3().init(jax.random.key(0), model, params), is_leaf=is_node)
    vectors = {leaf.names[1]: isinstance(leaf.value, ScaledInput) for leaf in found if isinstance(leaf.value, Scaled)}
    return {name.removeprefix("layers/1/").removesuffix("/kernel"): inner for name, inner in vectors.items()}


def test_ia3_scales_what_the_family_calls_keys_values_and_feed_forward_outputs():
    assert scaled("llama") == {"attention/k_proj": False, "attention/v_proj": False, "mlp/down_proj": True}
    assert scaled(FAMILY) == {"attention/c_attn": False, "mlp/c_proj": True}


def test_every_table_before_the_layers_has_the_lowest_rate():
    model, params = base(FAMILY)
    method = Full(layer_decay=0.5)
    optimizer = method.optimizer(optax.scale(-1.0), 10)
    trainable = method.init(jax.random.key(0), model, params)
    updates, _ = optimizer.update(jax.tree.map(np.ones_like, trainable), optimizer.init(trainable), trainable)
    assert (updates["embed"]["embedding"] == -0.125).all()
    assert (updates["position_embed"]["embedding"] == -0.125).all()
    assert (updates["ln_f"]["scale"] == -1.0).all()


def test_the_tied_table_alone_can_not_train_whole_in_a_lora():
    model, params = base(FAMILY)
    with pytest.raises(UserError, match="embed/embedding is the output head too"):
        LoRA(rank=2, modules_to_save=("embed",)).init(jax.random.key(0), model, params)
