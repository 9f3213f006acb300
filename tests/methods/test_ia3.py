"""(IA)^3 on a tiny model, and against peft."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from method_checks import base, check_bfloat16, check_cuts, check_merge, check_start, check_two_devices, check_what_moves, logits
from peft_checks import check_ours, check_theirs, check_training, tuned_by_peft
from tiny_models import moved

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, LoRA, SparseMask, VeRA
from jaxft.methods.ia3 import ScaledInput, ScaledOutput
from jaxft.models.segments import one_layer

METHOD = IA3(targets=("k_proj", "v_proj", "layers/[02]/mlp/(up|down)_proj"), feedforward=("down_proj",))
PEFT = {
    "default": ({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "qwen2"),
    "outputs only": ({"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "feedforward_modules": []}, "qwen2"),
    "expressions": (
        {"target_modules": r".*\.[12]\.(self_attn\.o_proj|mlp\..*_proj)", "feedforward_modules": r".*\.1\.mlp\.down_proj"},
        "llama",
    ),
    "excluded": (
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"], "feedforward_modules": ["down_proj"]},
        "llama",
    ),
}


def tuned(name):
    settings, family = PEFT[name]
    return tuned_by_peft(peft.IA3Config(task_type="CAUSAL_LM", **settings), "ia3_", 0.3, family), family


def test_it_starts_as_the_base_and_differs_once_moved():
    check_start(METHOD, "qwen2")


def test_only_the_vectors_move():
    check_what_moves(METHOD, "qwen2")


def test_merged_is_unmerged_biases_included():
    check_merge(METHOD, "qwen2")


def test_a_sum_with_lora_on_the_same_kernels_merges_as_it_runs():
    check_merge(LoRA(rank=2, targets=("v_proj", "down_proj")) + IA3(), "qwen2")


def test_a_lora_around_it_leaves_the_bias_scaled_and_merges_as_it_runs():
    method = IA3(targets=("q_proj", "v_proj"), feedforward=()) + LoRA(rank=2, targets=("q_proj", "v_proj"))
    check_merge(method, "qwen2")
    model, params = base("qwen2")
    alone = moved(method.methods[0], model, params)
    around = method.methods[1].init(jax.random.key(0), model, alone)  # changes nothing until it has moved
    np.testing.assert_allclose(logits(around, "qwen2"), logits(alone, "qwen2"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [AdaLoRA, VeRA, SparseMask])
def test_what_stands_around_it_forwards_the_bias(kind):
    settings = {AdaLoRA: {"init_rank": 2, "target_rank": 1}, VeRA: {"rank": 2}, SparseMask: {"rank": 1}}[kind]
    model, params = base("qwen2")
    alone = moved(IA3(targets=("v_proj",), feedforward=()), model, params)
    method = kind(targets=("v_proj",), **settings)
    around, alone = (
        one_layer(found, 1)["attention"]["v_proj"]["kernel"] for found in (method.init(jax.random.key(0), model, alone), alone)
    )
    x, bias = jnp.ones((2, around.shape[0])), jnp.arange(around.shape[1], dtype=jnp.float32)
    np.testing.assert_allclose(around.linear(x, bias, None), alone.linear(x, bias, None), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_vectors_are_float32_on_a_bfloat16_base():
    check_bfloat16(METHOD, "qwen2")


@pytest.mark.slow
def test_how_a_batch_is_cut_changes_nothing():
    check_cuts(METHOD, "qwen2")


@pytest.mark.slow
def test_two_devices_are_one():
    check_two_devices(METHOD, "qwen2", {"data_parallel": 1, "tensor_parallel": 2})


def test_outputs_are_scaled_with_their_bias_and_inputs_before_the_product():
    random = np.random.default_rng(0)
    x, kernel, rows, columns, bias = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((5, 4), (4, 3), (4,), (3,), (3,)))
    np.testing.assert_allclose(ScaledOutput(kernel, columns).linear(x, bias, None), (x @ kernel + bias) * columns, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ScaledInput(kernel, rows).linear(x, bias, None), (x * rows) @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_on_bfloat16_a_scale_near_one_is_not_rounded_to_it():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 4)), jnp.bfloat16)
    kernel = jnp.eye(4, dtype=jnp.bfloat16)
    for kind in (ScaledOutput, ScaledInput):
        assert (kind(kernel, jnp.full(4, 1.003)).dot(x, None) != x).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("k_prj",)}, "method.targets: the pattern 'k_prj' matches nothing. Did you mean 'k_proj'"),
        ({"targets": ("k_proj",), "feedforward": ("down_proj",)}, "method.feedforward: the pattern 'down_proj' matches nothing"),
        ({"targets": ("norm",), "feedforward": ()}, "matches nothing"),
    ],
)
def test_targets_that_are_not_there_are_named(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        IA3(**settings).init(jax.random.key(0), model, params)


# Against peft


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    model, family = tuned(name)
    check_theirs(model, tmp_path, family)


@pytest.mark.parametrize(("method", "family"), [(METHOD, "qwen2"), (IA3(targets=("q_proj", "lm_head"), feedforward=("lm_head",)), "llama")])
def test_peft_gives_our_logits(method, family, tmp_path):
    check_ours(method, tmp_path, family)


@pytest.mark.slow
def test_training_is_that_of_peft():
    check_training(*tuned("default"))


def test_a_second_one_and_none_are_refused(tmp_path):
    model, params = base()
    with pytest.raises(UserError, match="hold no IA3"):
        jaxft.save_adapter(tmp_path / "none", model, params, IA3())
    scaled = moved(IA3(), model, params)
    jaxft.save_adapter(tmp_path / "one", model, scaled, IA3())
    with pytest.raises(UserError, match="hold IA3 at layers/0/attention/k_proj/kernel already"):
        jaxft.load_adapter(tmp_path / "one", model, scaled)
