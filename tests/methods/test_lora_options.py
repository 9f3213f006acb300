"""LoRA's options on a tiny model: what each starts as, what trains, what it merges to, and how it trains beside peft."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft.optimizers
import pytest
import torch
from evaluation_batches import evaluation_batches
from lenient_optax import make_optimizer
from tiny_models import VOCABULARY, largest_difference, make_examples, make_pair, moved, same_bits, with_adapter
from torch_loss import torch_loss

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA, lora_start
from jaxft.methods.lora import LoRAKernel
from jaxft.methods.lora_combination import combine_adapters
from jaxft.models import node, segments
from jaxft.models.dropout import kept
from jaxft.tasks import SFT
from jaxft.train import optimizer
from jaxft.train.state import new_state
from jaxft.train.step import make_step

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11)).astype(np.int32)
STEPS, RATE, RATIO, DECAY = 20, 3e-3, 4.0, 0.05
METHODS = {
    "dora": LoRA(rank=3, alpha=7.0, dora=True, targets=("layers", "lm_head", "embed"), layers=()),
    "pissa": LoRA(rank=3, alpha=7.0, start="pissa", rank_pattern=(("k_proj", 2),)),
    "fast pissa with dora": LoRA(rank=3, alpha=7.0, start="pissa_niter_3", dora=True),
    "olora": LoRA(rank=3, alpha=7.0, start="olora", rslora=True),
    "gaussian": LoRA(rank=16, alpha=7.0, start="gaussian", layers=(0, 2)),
    "lora biases": LoRA(rank=3, alpha=7.0, targets=("attention",), lora_bias=True),
    "modules": LoRA(rank=3, alpha=7.0, targets=("q_proj",), bias="all", modules_to_save=("lm_head", "norm")),
}


@functools.cache
def base(**settings):
    _, model, params = make_pair("llama", **({"attention_bias": True} | settings))
    return model, params


@functools.cache
def program(model):
    return jax.jit(lambda params: model.apply({"params": params}, IDS).logits)


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base_and_merged_is_unmerged(name):
    model, params = base()
    method, run = METHODS[name], program(model)
    plain = run(params)
    bound = 1e-5 * float(jnp.abs(plain).max())  # float32, logits of order 10
    assert largest_difference(run(method.init(jax.random.key(0), model, params)), plain) <= bound
    tuned = moved(method, model, params, size=0.1)
    before = jax.tree.map(np.array, tuned)
    found, merged = run(tuned), method.merge(model, tuned)
    assert largest_difference(found, plain) > 0.1  # it is a difference that shows
    assert largest_difference(found, run(merged)) <= 1e-5 * float(jnp.abs(found).max())
    assert same_bits(tuned, before)
    assert jax.tree.structure(segments.regroup(merged, lambda _: 0)) == jax.tree.structure(params)


def trains(method, **settings):
    model, params = base(**settings)
    tuned = method.init(jax.random.key(0), model, params)
    return {name for leaf in segments.leaves(jaxft.partition(tuned, method.mask(tuned))[0]) for name in leaf.names}


def test_what_trains_is_what_the_options_say():
    biases = {f"layers/{layer}/attention/{name}_proj/bias" for layer in range(3) for name in "qkvo"}
    low = {f"layers/1/attention/q_proj/kernel/{field}" for field in ("lora_a", "lora_b")}
    one = LoRA(rank=2, targets=("q_proj",), layers=(1,))
    assert trains(one) == low
    assert trains(dataclasses.replace(one, dora=True)) == low | {"layers/1/attention/q_proj/kernel/magnitude"}
    assert trains(dataclasses.replace(one, bias="lora_only")) == low | {"layers/1/attention/q_proj/bias"}
    assert trains(dataclasses.replace(one, bias="all")) == low | biases
    whole = dataclasses.replace(one, modules_to_save=("norm", "layers/2/mlp/up_proj"))
    assert trains(whole) == low | {"norm/scale", "layers/2/mlp/up_proj/kernel"}
    assert trains(LoRA(rank=2, targets=("embed",)), tie_word_embeddings=True) == {f"embed/embedding/lora_{side}" for side in "ab"}


def test_a_bias_beside_lora_b_acts_without_one_in_the_layer_and_merges_only_into_one():
    model, params = base()
    method = LoRA(rank=2, targets=("up_proj",), lora_bias=True)
    tuned = moved(method, model, params)
    kernel = tuned["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    one = jax.tree.map(lambda part: part[1], kernel)
    x = jax.random.normal(jax.random.key(0), (5, 32))
    expected = x @ one.dense() + one.scale * one.lora_bias
    assert largest_difference(node.linear(x, one, None), expected) <= 1e-5
    assert largest_difference(node.linear(x, node.prepared(one), None), expected) <= 1e-5
    with pytest.raises(UserError, match=r"mlp/up_proj/kernel can't be merged: this layer of the base has no bias"):
        method.merge(model, tuned)
    with pytest.raises(UserError, match="has a lora_bias, which can't be added"):
        combine_adapters(model, params, [(tuned, method)], [1.0])
    decays = optimizer.decay_mask({"kernel": one})["kernel"]
    assert decays.lora_b
    assert not decays.lora_bias


def test_a_tied_head_keeps_the_embedding_as_it_was():
    model, params = base(tie_word_embeddings=True)
    method = LoRA(rank=2, targets=("embed",))
    tuned = moved(method, model, params)
    hidden = jnp.ones((3, 32), jnp.float32)
    heads = [model.apply({"params": tree}, hidden, method="logits") for tree in (params, tuned)]
    assert np.array_equal(*heads)
    assert largest_difference(program(model)(params), program(model)(tuned)) > 0.1
    with pytest.raises(UserError, match="the same table"):
        method.merge(model, tuned)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_what_is_taken_out_of_the_base_and_what_is_left_are_the_base(start):
    model, params = base()
    kernel = LoRA(rank=4, alpha=6.0, start=start).init(jax.random.key(0), model, params)["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    original = params["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    assert largest_difference(kernel.base + 1.5 * kernel.start_a @ kernel.start_b, original) <= 1e-5
    assert same_bits((kernel.start_a, kernel.start_b), (kernel.lora_a, kernel.lora_b))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kernel)]
    assert len(set(buffers)) == len(buffers)  # a step donates what trains, and the start has to stay


def test_the_fast_pissa_finds_the_singular_values_of_the_whole_one():
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((size, 12)))[0] for size in (40, 24))
    kernel = jnp.asarray(left * 0.5 ** np.arange(12) @ right.T, jnp.float32)  # each value half the one before
    whole, fast = (lora_start.from_kernel(name, jax.random.key(0), kernel, 4, 2.0) for name in ("pissa", "pissa_niter_8"))
    assert largest_difference(whole.lora_a @ whole.lora_b, fast.lora_a @ fast.lora_b) <= 1e-5
    best = np.asarray(left[:, :4] * 0.5 ** np.arange(4) @ right[:, :4].T)
    assert largest_difference(2.0 * whole.lora_a @ whole.lora_b, best) <= 1e-5


def test_a_bfloat16_base_stays_so_and_trainable_leaves_are_float32():
    model, params = base()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    method = LoRA(rank=2, dora=True, start="pissa")
    tuned = method.init(jax.random.key(0), model, half)
    trainable, _ = jaxft.partition(tuned, method.mask(tuned))
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    kernel = tuned["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    assert kernel.base.dtype == jnp.bfloat16
    assert method.merge(model, tuned)["layers"]["0-2"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


def test_dora_with_dropout_is_that_of_peft():
    random = np.random.default_rng(0)
    shapes = {"x": (7, 16), "base": (16, 6), "a": (16, 4), "b": (4, 6), "bias": (6,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    magnitude = random.uniform(1.0, 2.0, 6).astype(np.float32)
    rate, key = np.float32(0.4), jax.random.key(3)
    kernel = LoRAKernel(arrays["base"], arrays["a"], arrays["b"], np.float32(0.5), rate, magnitude)
    ours = kernel.linear(jnp.asarray(arrays["x"]), jnp.asarray(arrays["bias"]), key)
    keep = np.asarray(kept(key, 1.0 - rate, arrays["x"].shape))
    linear = torch.nn.Linear(16, 6)
    linear.weight.data, linear.bias.data = torch.tensor(arrays["base"].T), torch.tensor(arrays["bias"])
    tuned = peft.tuners.lora.Linear(
        linear, "default", peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, lora_dropout=0.4), r=4, lora_alpha=2
    )
    tuned.lora_A["default"].weight.data = torch.tensor(arrays["a"].T)
    tuned.lora_B["default"].weight.data = torch.tensor(arrays["b"].T)
    tuned.lora_magnitude_vector["default"].weight.data = torch.tensor(magnitude)
    tuned.lora_dropout["default"] = _Mask(torch.tensor(keep / (1 - rate)))
    expected = tuned.train()(torch.tensor(arrays["x"])).detach().numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


class _Mask(torch.nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@functools.cache
def trained():
    """Trains twenty steps of DoRA with LoRA+'s rates, in packed rows, two of them a step, with remat: losses, theirs, and both ends."""
    reference, model, params = make_pair("llama")
    model = model.clone(remat="dots")
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    tuned = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, use_dora=True, target_modules=targets))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    params, method = with_adapter(tuned.eval(), model, params)
    method = dataclasses.replace(method, lora_plus_ratio=RATIO)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    config = OptimizerConfig(schedule="constant", warmup=0, learning_rate=RATE, weight_decay=DECAY, clip_norm=1.0)
    ours = method.optimizer(make_optimizer(config, STEPS), STEPS)
    examples = make_examples([21, 9, 14, 30], answer=6)
    (rows,) = evaluation_batches(examples, DataConfig(max_length=64), 2, False)
    batch = {key: array[:, None] for key, array in rows.items()}  # two micro-batches of a row
    state, step = new_state(trainable, ours), jax.jit(make_step(model, SFT(), ours, seed=0))
    theirs = peft.optimizers.create_loraplus_optimizer(
        tuned, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    losses, expected = [], []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        theirs.zero_grad()
        loss = torch_loss(tuned, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([leaf for leaf in tuned.parameters() if leaf.requires_grad], 1.0)
        theirs.step()
        expected.append(float(loss.detach()))
    return losses, expected, (trainable, frozen, params, method), state


def test_twenty_steps_of_dora_at_lora_plus_rates_have_the_losses_of_peft():
    losses, expected, _, _ = trained()
    assert expected[-1] < expected[0] - 0.5  # it learns
    assert np.abs(np.subtract(losses, expected)).max() <= 1e-4  # the bound everywhere


def test_every_trainable_leaf_has_moved_and_the_optimizer_is_of_their_size():
    _, _, (trainable, frozen, params, method), state = trained()
    assert same_bits(frozen, jaxft.partition(params, method.mask(params))[1])
    pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(state.trainable), strict=True)
    assert all(not np.array_equal(before, after) for before, after in pairs)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim) == 2 * size


def test_lora_plus_leaves_other_methods_rates_alone():
    model, params = base()
    method = LoRA(rank=2, targets=("q_proj",), lora_plus_ratio=3.0)
    tuned = method.init(jax.random.key(0), model, params)
    optimizer = method.optimizer(optax.sgd(1.0), 10)
    ones = jax.tree.map(jnp.ones_like, tuned)
    updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
    kernel = updates["layers"]["0-2"]["attention"]["q_proj"]
    assert (float(kernel["kernel"].lora_a.max()), float(kernel["kernel"].lora_b.max()), float(kernel["bias"].max())) == (-1.0, -3.0, -1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (3,)}, "there is no layer 3; the model's are numbered 0 to 2"),
        ({"layers": (1,), "targets": ("lm_head",)}, "no target of lm_head lies in the layers"),
        ({"modules_to_save": ("heads",)}, "method.modules_to_save: the pattern 'heads' matches nothing"),
        ({"modules_to_save": ("q_proj",)}, "it gets a LoRA, or trains whole"),
        ({"start": "pissa", "targets": ("embed",)}, "embeddings start at 'default'"),
        ({"lora_bias": True, "targets": ("embed",)}, "lora_bias is for linear layers"),
    ],
    ids=str,
)
def test_what_the_model_lacks_is_named(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        LoRA(**settings).init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "pisa"}, "there is no 'pisa'. Did you mean 'pissa'"),
        ({"bias": "some"}, "There is no method.bias 'some'"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio is above 0"),
        ({"lora_bias": True, "dora": True}, "lora_bias goes with start 'default' and without method.dora"),
        ({"lora_bias": True, "start": "gaussian"}, "lora_bias goes with start 'default'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


def test_a_tied_embedding_cannot_train_whole():
    model, params = base(tie_word_embeddings=True)
    with pytest.raises(UserError, match="is the output head too"):
        LoRA(modules_to_save=("embed",)).init(jax.random.key(0), model, params)
