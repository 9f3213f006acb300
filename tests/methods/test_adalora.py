"""AdaLoRA against peft: logits, gradients with the regularizer, the budget step by step, and files both ways."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import torch
from tiny_models import VOCABULARY, largest_difference, make_pair, make_reference, moved, same_bits, with_adapter

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA
from jaxft.models import segments

TOLERANCE = 1e-4  # the bound everywhere
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11)).astype(np.int32)
TOTAL, RATE = 9, 0.05
SETTINGS = {
    "init_r": 5,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.7,
    "orth_reg_weight": 0.3,
    "lora_alpha": 7,
    "total_step": TOTAL,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def make_tuned(reference, **settings):
    """Returns a model of peft, its adapter random."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(reference, peft.AdaLoraConfig(**(SETTINGS | settings)))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return tuned


def our_loss(model, method, trainable, frozen):
    """The mean loss over all tokens, as transformers has it, and the regularizer."""
    params = jaxft.combine(trainable, frozen)
    logits = model.apply({"params": params}, IDS).logits
    mean = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()
    return mean + method.penalty(params)


@functools.cache
def trained():
    """Trains nine steps on both sides, and returns a pair a step of (loss, gradients, leaves), the leaves by names, and both ends."""
    reference, model, base = make_pair("llama")
    tuned = make_tuned(reference)
    params, method = with_adapter(tuned, model, base)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    ours = method.optimizer(optax.sgd(RATE), TOTAL)
    state = ours.init(trainable)

    @jax.jit
    def step(trainable, state):
        loss, gradients = jax.value_and_grad(lambda leaves: our_loss(model, method, leaves, frozen))(trainable)
        updates, state = ours.update(gradients, state, trainable)
        return loss, gradients, optax.apply_updates(trainable, updates), state

    leaves = {name: leaf for name, leaf in tuned.named_parameters() if leaf.requires_grad}
    theirs, rows = torch.optim.SGD(leaves.values(), lr=RATE), []
    ids = torch.tensor(IDS).long()
    for number in range(1, TOTAL + 1):
        loss, gradients, trainable, state = step(trainable, state)
        theirs.zero_grad()
        their_loss = tuned(ids, labels=ids).loss
        their_loss.backward()
        theirs.step()
        expected = {name: leaf.grad.numpy().copy() for name, leaf in leaves.items()}
        tuned.base_model.update_and_allocate(number)
        after = {name: leaf.detach().numpy().copy() for name, leaf in leaves.items()}
        rows.append(((float(loss), by_name(gradients), by_name(trainable)), (float(their_loss.detach()), expected, after)))
    return rows, (model, base, jaxft.combine(trainable, frozen), method, params), tuned


def by_name(tree):
    """Returns leaves under peft's names, in its layout."""
    found = {}
    stack = tree["layers"]["0-2"]
    for part, name in (("attention", "q_proj"), ("attention", "v_proj"), ("mlp", "down_proj")):
        kernel = stack[part][name]["kernel"]
        for layer in range(3):
            module = f"base_model.model.model.layers.{layer}.{'self_attn' if part == 'attention' else part}.{name}"
            found[f"{module}.lora_A.default"] = np.asarray(kernel.lora_a[layer]).T
            found[f"{module}.lora_B.default"] = np.asarray(kernel.lora_b[layer]).T
            found[f"{module}.lora_E.default"] = np.asarray(kernel.lora_e[layer])[:, None]
    return found


def test_losses_with_the_regularizer_are_those_of_peft():
    for (loss, *_), (expected, *_) in trained()[0]:
        assert abs(loss - expected) <= TOLERANCE


def test_gradients_are_those_of_peft():
    (_, found, _), (_, expected, _) = trained()[0][0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.linalg.norm(found[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name


def test_every_step_prunes_what_peft_prunes():
    counts = []
    for (_, _, found), (_, _, expected) in trained()[0]:
        zero = {name: value == 0 for name, value in expected.items() if "lora_E" in name}
        counts.append(sum(int(mask.sum()) for mask in zero.values()))
        for name, mask in zero.items():
            assert np.array_equal(found[name] == 0, mask), name
        assert max(np.abs(found[name] - value).max() for name, value in expected.items()) <= TOLERANCE
    kernels = 9
    assert counts[0] == 0
    assert counts[-1] == (SETTINGS["init_r"] - SETTINGS["target_r"]) * kernels
    assert len(set(counts)) > 2  # and fewer in between


def test_a_pruned_adapter_goes_to_peft_and_back(tmp_path):
    _, (model, base, params, method, _), tuned = trained()
    ids = torch.tensor(IDS).long()
    logits = np.asarray(model.apply({"params": params}, IDS).logits)
    with torch.no_grad():
        assert largest_difference(logits, tuned.eval()(ids).logits.numpy()) <= 1e-3  # nine steps apart, see the losses
    jaxft.save_adapter(tmp_path / "ours", model, params, method, base_model="owner/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(make_reference("llama"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert largest_difference(logits, loaded(ids).logits.numpy()) <= TOLERANCE
    loaded.save_pretrained(tmp_path / "theirs")
    back, again = jaxft.load_adapter(tmp_path / "theirs", model, base)
    assert largest_difference(logits, model.apply({"params": back}, IDS).logits) <= TOLERANCE
    assert again == method
    jaxft.save_adapter(tmp_path / "again", model, back, again)
    files = [safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs", "again")]
    first = {key: value.tobytes() for key, value in files[0].items()}
    assert all({key: value.tobytes() for key, value in file.items()} == first for file in files[1:])
    assert len({value.shape for key, value in files[0].items() if key.endswith("q_proj.lora_A")}) > 1  # ranks differ


def test_the_base_is_as_it_was_and_every_leaf_has_moved():
    _, (_, _, params, method, before), _ = trained()
    (now, frozen), (then, same) = (jaxft.partition(tree, method.mask(tree)) for tree in (params, before))
    assert same_bits(frozen, same)
    assert all(not np.array_equal(one, other) for one, other in zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True))


def test_it_starts_as_the_base_and_merged_is_unmerged():
    _, model, base = make_pair("llama")
    method = AdaLoRA(init_rank=5, target_rank=2, alpha=7.0, dropout=0.2, targets=("q_proj", "layers/1/mlp", "lm_head"))
    program = jax.jit(lambda params: model.apply({"params": params}, IDS).logits)
    plain = program(base)
    assert np.array_equal(program(method.init(jax.random.key(0), model, base)), plain)
    tuned = moved(method, model, base)
    before = jax.tree.map(np.array, tuned)
    found = program(tuned)
    assert largest_difference(found, plain) > 0.1
    assert largest_difference(found, program(method.merge(model, tuned))) <= 1e-5 * float(jnp.abs(found).max())
    assert same_bits(tuned, before)
    folded = dataclasses.replace(tuned["lm_head"]["kernel"], lora_e=jnp.zeros(5)).dense()
    assert np.array_equal(folded, base["lm_head"]["kernel"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 13}, "from 1 to init_rank, 12, not 13"),
        ({"beta1": 1.0}, "method.beta1 is between 0 and 1"),
        ({"delta_t": 0}, "method.delta_t is 1 or more"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AdaLoRA(**settings)


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="of 10 steps none is left"):
        AdaLoRA(tinit=6, tfinal=4).optimizer(optax.sgd(1.0), 10)
    with pytest.raises(UserError, match="of 10 steps none is left"):  # the first step's importance is none yet
        AdaLoRA(tfinal=9).optimizer(optax.sgd(1.0), 10)
    AdaLoRA(tfinal=8).optimizer(optax.sgd(1.0), 10)


ONE = AdaLoRA(init_rank=4, target_rank=1, tfinal=1, targets=("q_proj",))
OTHER = AdaLoRA(init_rank=3, target_rank=2, tfinal=2, orthogonality=0.2, targets=("down_proj",))


def steps_on_random_gradients(method):
    """Returns the kernels after four steps; leaves and gradients depend on a leaf's shape alone, by name, and the penalty then."""
    model, base, *_ = trained()[1]
    params = method.init(jax.random.key(0), model, base)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    trainable = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), trainable)
    optimizer = method.optimizer(optax.sgd(0.1), 4)
    state = optimizer.init(trainable)
    update = jax.jit(optimizer.update)
    for step in range(4):
        key = jax.random.key(step)
        gradients = jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), trainable)
        updates, state = update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    found = {name: np.asarray(leaf.value) for leaf in segments.leaves(trainable) for name in leaf.names[:1]}
    return found, float(method.penalty(jaxft.combine(trainable, frozen)))


@pytest.mark.parametrize("around", [OTHER, IA3(targets=("q_proj",), feedforward=()), OTHER + IA3()], ids=lambda method: method.title)
def test_another_method_beside_it_changes_neither_its_budget_nor_its_regularizer(around):
    found, penalty = steps_on_random_gradients(ONE + around)
    parts = [steps_on_random_gradients(method) for method in (ONE, around)]
    assert (found["layers/0/attention/q_proj/kernel/lora_e"] == 0).any()
    assert penalty == pytest.approx(sum(part for _, part in parts), rel=1e-6)
    for name, value in (parts[0][0] | parts[1][0]).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def test_a_file_of_peft_may_have_a_rank_above_the_matrix():
    reference, model, base = make_pair("llama")
    tuned, method = with_adapter(make_tuned(reference, init_r=20), model, base)
    assert (method.init_rank, segments.one_layer(tuned, 0)["attention"]["v_proj"]["kernel"].lora_e.shape) == (20, (20,))
    with pytest.raises(UserError, match="method.init_rank: layers/0/attention/v_proj/kernel is 32 x 16; a rank of 20"):
        method.init(jax.random.key(0), model, base)
