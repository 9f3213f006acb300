"""Sparse masks on a tiny model, and against peft's SHiRA."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
from evaluation_batches import evaluation_batches
from method_checks import (
    EXAMPLES,
    base,
    check_bfloat16,
    check_cuts,
    check_merge,
    check_start,
    check_two_devices,
    check_what_moves,
    logits,
    train,
)
from peft_checks import check_ours, check_theirs, check_training, load_in_peft, tensors, their_logits, tuned_by_peft
from tiny_models import largest_difference, moved, same_bits

import jaxft
from jaxft.config import DataConfig
from jaxft.errors import UserError
from jaxft.hub.peft import has_form
from jaxft.methods import LoRA, SparseMask, VeRA
from jaxft.methods.base import Material
from jaxft.methods.lora import LoRAKernel
from jaxft.methods.partition import size
from jaxft.methods.sparse_mask import SparseKernel
from jaxft.models import segments
from jaxft.models.node import is_node
from jaxft.tasks import SFT
from jaxft.train.scores import gradient_scores

METHOD = SparseMask(rank=1, targets=("q_proj", "layers/[02]/mlp/up_proj"))
PEFT = {
    "plain": ({"r": 1, "target_modules": ["q_proj", "down_proj"]}, "qwen2"),
    "seeded": ({"r": 3, "target_modules": ["up_proj", "layers.1.self_attn.o_proj", "lm_head"], "random_seed": 5}, "llama"),
}


def tuned(name):
    settings, family = PEFT[name]
    return tuned_by_peft(peft.ShiraConfig(task_type="CAUSAL_LM", **settings), "shira_", 0.3, family), family


def kernels(params):
    """Returns each sparse kernel by its name, without the layer axis."""
    found = {}
    for leaf in segments.leaves(params, is_leaf=is_node):
        if isinstance(leaf.value, SparseKernel):
            for index, name in enumerate(leaf.names):
                found[name] = leaf.part(index)
    return found


def test_it_starts_as_the_base_and_differs_once_moved():
    check_start(METHOD)


def test_only_the_values_move():
    check_what_moves(METHOD)


def test_merged_is_unmerged():
    check_merge(METHOD)
    check_merge(dataclasses.replace(METHOD, choice="magnitude", targets=("layers", "lm_head")))


@pytest.mark.parametrize("choice", ["random", "magnitude"])
def test_around_what_layers_have_in_common_it_merges_too(choice):
    vera, sparse = VeRA(rank=8, targets=("q_proj",)), dataclasses.replace(METHOD, choice=choice)
    for method in (vera + sparse, sparse + vera):
        check_merge(method)


@pytest.mark.slow
def test_the_values_are_float32_on_a_bfloat16_base():
    check_bfloat16(METHOD)


@pytest.mark.slow
def test_how_a_batch_is_cut_changes_nothing():
    check_cuts(METHOD)


@pytest.mark.slow
def test_two_devices_are_one():
    check_two_devices(METHOD)


# The node


def arrays():
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 7), (7, 6)))
    flat = np.sort(random.choice(42, 9, replace=False))
    return (
        x,
        kernel,
        jnp.asarray(flat // 6, jnp.int32),
        jnp.asarray(flat % 6, jnp.int32),
        jnp.asarray(random.standard_normal(9), jnp.float32),
    )


LORA = LoRAKernel(jnp.zeros((7, 6)), jnp.zeros((7, 2)), jnp.ones((2, 6)), jnp.float32(0.5), None)


def test_gradients_are_those_of_the_dense_sum_and_as_large_as_the_subset():
    x, kernel, rows, columns, values = arrays()
    low = jnp.asarray(np.random.default_rng(1).standard_normal((7, 2)), jnp.float32)

    def sparse(x, values, low):
        base = dataclasses.replace(LORA, base=kernel, lora_a=low)
        return jnp.sum(jnp.sin(SparseKernel(base, rows, columns, values).dot(x, None)))

    def plain(x, values, low):
        return jnp.sum(jnp.sin(x @ (kernel + 0.5 * low @ LORA.lora_b).at[rows, columns].add(values)))

    found, expected = (jax.grad(function, argnums=(0, 1, 2))(x, values, low) for function in (sparse, plain))
    assert found[1].shape == values.shape
    assert largest_difference(found, expected) <= 1e-5  # of a kernel that trains below it too


def test_a_lora_within_drops_as_by_itself_and_is_not_made_dense():
    x, kernel, rows, columns, values = arrays()
    lora = dataclasses.replace(LORA, base=kernel, lora_a=jnp.ones((7, 2)), dropout=jnp.float32(0.5))
    rng = jax.random.key(3)

    def run(x, lora, rng):
        return SparseKernel(lora, rows, columns, values).dot(x, rng)

    difference = x @ jnp.zeros((7, 6)).at[rows, columns].add(values)
    for key in (None, rng):
        np.testing.assert_allclose(run(x, lora, key), lora.dot(x, key) + difference, rtol=1e-5, atol=1e-5)
    assert largest_difference(run(x, lora, None), run(x, lora, rng)) > 0.1
    assert "f32[7,6] = dot_general" not in str(jax.make_jaxpr(run)(x, lora, rng))


def test_of_what_is_kept_for_the_backward_pass_nothing_is_as_large_as_a_kernel():
    """Of a kernel's sum with its difference, none is kept: what is kept beside the arguments is the input, (tokens, in)."""
    x, kernel, rows, columns, values = arrays()

    def run(values, x):
        return SparseKernel(kernel, rows, columns, values).dot(x, None)

    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(run, values, x)[1]) if leaf.shape == kernel.shape]
    assert all(np.array_equal(leaf, kernel) for leaf in kept)  # the base itself


def test_state_is_in_proportion_to_the_subset():
    _, before, after, _, _, optimizer = train(METHOD)
    expected = 3 * (32 + 32) + 2 * (32 + 56)
    assert size(after) == size(before) == expected
    assert size(optimizer) <= 2 * expected + 8


# Which weights


def test_random_places_are_all_different_and_depend_on_the_name_alone():
    model, params = base()
    one = kernels(METHOD.init(jax.random.key(0), model, params))
    every = kernels(SparseMask(rank=1).init(jax.random.key(0), model, params))
    for name, kernel in one.items():
        assert len(set(zip(kernel.rows.tolist(), kernel.columns.tolist(), strict=True))) == sum(kernel.shape)
        assert same_bits((kernel.rows, kernel.columns), (every[name].rows, every[name].columns))
    assert not np.array_equal(one["layers/0/attention/q_proj/kernel"].rows, one["layers/1/attention/q_proj/kernel"].rows)


def test_density_gives_a_share_of_every_kernel():
    model, params = base()
    for kernel in kernels(SparseMask(density=0.1).init(jax.random.key(0), model, params)).values():
        assert len(kernel.values) == round(0.1 * kernel.shape[0] * kernel.shape[1])


def test_magnitude_takes_the_largest_weights():
    model, params = base()
    for kernel in kernels(dataclasses.replace(METHOD, choice="magnitude").init(jax.random.key(0), model, params)).values():
        taken = np.zeros(kernel.shape, bool)
        taken[kernel.rows, kernel.columns] = True
        sizes = np.abs(np.asarray(kernel.base))
        assert sizes[taken].min() >= sizes[~taken].max()


BATCHES = list(evaluation_batches(EXAMPLES, DataConfig(max_length=32, packing=False), 2, False))


@pytest.fixture(scope="module")
def gradients():
    """The gradient of each batch's mean loss to layer 1's q_proj."""
    model, params = base()

    def loss(kernel, batch):
        kernels = params["layers"]["0-2"]["attention"]["q_proj"]["kernel"].at[1].set(kernel)
        attention = params["layers"]["0-2"]["attention"] | {"q_proj": {"kernel": kernels}}
        changed = params | {"layers": {"0-2": params["layers"]["0-2"] | {"attention": attention}}}
        sums = SFT().sums(model, changed, batch, {})
        return sums.loss / sums.weight

    kernel = params["layers"]["0-2"]["attention"]["q_proj"]["kernel"][1]
    gradient = jax.jit(jax.grad(loss))
    return [np.asarray(gradient(kernel, batch)) for batch in BATCHES]


def scores(params, chosen, kind, count):
    return gradient_scores(base()[0], SFT(), BATCHES[:count], params, chosen, kind)


MATERIAL = Material(scores, None)


@pytest.mark.parametrize("choice", ["gradient", "fisher"])
def test_gradients_of_training_batches_choose_the_weights(choice, gradients):
    model, params = base()
    expected = np.abs(np.mean(gradients, axis=0)) if choice == "gradient" else np.mean(np.square(gradients), axis=0)
    found = scores(params, lambda name: "q_proj" in name, choice, 2)
    np.testing.assert_allclose(found["layers"]["0-2"]["attention"]["q_proj"]["kernel"][1], expected, rtol=1e-3, atol=1e-7)
    assert found["layers"]["0-2"]["mlp"]["up_proj"]["kernel"] is None
    method = SparseMask(rank=1, choice=choice, score_batches=2, targets=("q_proj",))
    made = method.begin(jax.random.key(0), model, params, MATERIAL)
    kernel = kernels(made)["layers/1/attention/q_proj/kernel"]
    taken = np.zeros(kernel.shape, bool)
    taken[kernel.rows, kernel.columns] = True
    assert expected[taken].min() >= expected[~taken].max() * (1 - 1e-3)
    assert largest_difference(kernel.base, params["layers"]["0-2"]["attention"]["q_proj"]["kernel"][1]) == 0


def test_a_sum_passes_the_scores_on_of_kernels_as_they_act():
    model, params = base()
    method = LoRA(rank=2, targets=("q_proj",)) + SparseMask(rank=1, choice="fisher", score_batches=1, targets=("layers/1/attention",))
    made = method.begin(jax.random.key(0), model, params, MATERIAL)
    alone = method.methods[1].begin(jax.random.key(0), model, params, MATERIAL)
    one, other = kernels(made)["layers/1/attention/o_proj/kernel"], kernels(alone)["layers/1/attention/o_proj/kernel"]
    assert same_bits((one.rows, one.columns), (other.rows, other.columns))
    check_merged = method.merge(model, made)
    assert not any(map(is_node, jax.tree.leaves(check_merged, is_leaf=is_node)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "method.rank is at least 1, not 0"),
        ({"density": 1.0}, "method.density is a share"),
        ({"choice": "magnitud"}, "Did you mean 'magnitude'"),
        ({"score_batches": 0}, "method.score_batches is 1 or more"),
        ({"rank": 17, "targets": ("q_proj",)}, "a rank of 17 asks for 1,088 of its 1,024 weights. The greatest rank it can have is 16"),
        ({"targets": ("q_prj",)}, "matches nothing. Did you mean 'q_proj'"),
        ({"choice": "fisher"}, "gradients of training batches. launch.py takes them"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        SparseMask(**settings).init(jax.random.key(0), model, params)


# Against peft


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    model, family = tuned(name)
    check_theirs(model, tmp_path, family)


def test_peft_gives_our_logits(tmp_path):
    check_ours(METHOD, tmp_path)


def test_a_subset_of_another_size_is_filled_up_with_zeros_for_peft(tmp_path):
    model, params = base()
    method = SparseMask(density=0.09, choice="magnitude", targets=("layers", "lm_head"))
    made = moved(method, model, params, size=0.1)
    jaxft.save_adapter(tmp_path / "a", model, made, method)
    assert largest_difference(their_logits(load_in_peft(tmp_path / "a")), logits(made)) <= 1e-4
    back, _ = jaxft.load_adapter(tmp_path / "a", model, params)
    assert largest_difference(logits(back), logits(made)) <= 1e-5


@pytest.mark.slow
def test_training_is_that_of_peft():
    check_training(*tuned("plain"))


def test_a_subset_that_shira_can_not_hold_is_refused(tmp_path):
    model, params = base()
    method = SparseMask(density=0.99, targets=("up_proj",))
    made = method.init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match="SHiRA can't hold 1,774 of the 1,792 weights"):
        jaxft.save_adapter(tmp_path / "a", model, made, method)
    assert not has_form(model, made, method)
    assert has_form(model, METHOD.init(jax.random.key(0), model, params), METHOD)


def test_places_outside_of_the_kernel_are_refused(tmp_path):
    model, params = base()
    jaxft.save_adapter(tmp_path / "a", model, METHOD.init(jax.random.key(0), model, params), METHOD)
    held = tensors(tmp_path / "a")
    name = "base_model.model.model.layers.1.self_attn.q_proj.shira_indices"
    for column in (40, int(held[name][0, 1])):
        changed = {key: value.copy() for key, value in held.items()}
        changed[name][:, 0] = (column, changed[name][1, 1])
        safetensors.numpy.save_file(changed, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(UserError, match="outside of the kernel, or one of them twice"):
            jaxft.load_adapter(tmp_path / "a", model, params)


def test_a_broken_configuration_gives_one_clear_message(tmp_path):
    model, params = base()
    jaxft.save_adapter(tmp_path / "a", model, METHOD.init(jax.random.key(0), model, params), METHOD)
    path = tmp_path / "a" / "adapter_config.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"r": 2}, r"\(64,\) for \(128,\)"),
        ({"r": 10**9}, r"adapter_config.json: r: layers/0-2/attention/q_proj/kernel is 32 x 32; .* The greatest rank it can have is 16"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"target_modules": "q_proj("}, "is no regular expression"),
        ({"target_modules": 3}, "target_modules is 3"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=message):
            jaxft.load_adapter(tmp_path / "a", model, params)
