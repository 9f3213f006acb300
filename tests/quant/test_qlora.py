"""QLoRA and LoftQ against peft and bitsandbytes, on the same 4-bit weights."""

import functools
import tempfile

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from four_bit_models import by_transformers, dense, our_logits, ready_made, their_logits
from peft.utils.loftq_utils import _low_rank_decomposition
from reference_training import our_gradients, our_losses, torch_gradients, torch_losses
from tiny_models import with_adapter

import jaxft
from jaxft.errors import UserError
from jaxft.hub.load import OriginalKernels
from jaxft.hub.peft import has_form
from jaxft.methods import LoRA
from jaxft.methods.base import Material
from jaxft.models import segments
from jaxft.models.node import dense as dense_of
from jaxft.models.node import is_node

KIND = "nf4, double"
ADAPTERS = {
    "lora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "modules_to_save": ["norm"]},
}
UP = "layers/{}/mlp/up_proj/kernel"


@functools.cache
def base():
    return jaxft.load_pretrained(ready_made(KIND))


def tuned_by_peft(name):
    """Returns a model of peft on bitsandbytes' weights, both sides of its adapter random."""
    tuned = peft.get_peft_model(
        by_transformers(ready_made(KIND)), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **ADAPTERS[name])
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf, parameter in tuned.named_parameters():
            if "lora_A" in leaf or "lora_B" in leaf:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return tuned.eval()


@functools.cache
def pair(name):
    """Returns peft's model, and ours with its adapter: parameters and method."""
    tuned = tuned_by_peft(name)
    return tuned, *with_adapter(tuned, *base())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_on_four_bits_has_its_logits_here(name):
    tuned, params, _ = pair(name)
    assert np.abs(our_logits(base()[0], params) - their_logits(tuned)).max() <= 1e-4


@pytest.mark.parametrize("name", ADAPTERS)
def test_our_adapter_on_four_bits_has_our_logits_in_peft(name, tmp_path):
    _, params, method = pair(name)
    model = base()[0]
    params = jax.tree.map(lambda leaf, trains: leaf * 1.5 if trains else leaf, params, method.mask(params))
    jaxft.save_adapter(tmp_path / "ours", model, params, method)
    theirs = peft.PeftModel.from_pretrained(by_transformers(ready_made(KIND)), tmp_path / "ours").eval()
    assert np.abs(our_logits(model, params) - their_logits(theirs)).max() <= 1e-4
    back, _ = jaxft.load_adapter(tmp_path / "ours", *base())
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_are_those_of_peft(name):
    tuned, params, method = pair(name)
    expected_loss, expected = torch_gradients(tuned)
    loss, gradients = our_gradients(base()[0], params, method)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    frozen = jaxft.partition(params, method.mask(params))[1]
    with tempfile.TemporaryDirectory() as folder:
        jaxft.save_adapter(f"{folder}/adapter", base()[0], jaxft.combine(gradients, frozen), method)
        found = safetensors.numpy.load_file(f"{folder}/adapter/adapter_model.safetensors")
    named = {leaf.replace(".modules_to_save", ""): gradient for leaf, gradient in expected.items()}
    named = {leaf.removesuffix(".weight") if "magnitude" in leaf else leaf: gradient for leaf, gradient in named.items()}
    assert found.keys() == named.keys()
    for leaf, gradient in named.items():
        assert np.linalg.norm(gradient) > 0, leaf
        assert np.linalg.norm(found[leaf] - gradient) <= 1e-3 * np.linalg.norm(gradient), leaf


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps_have_the_losses_of_peft(name):
    tuned, (params, method) = tuned_by_peft(name), pair(name)[1:]
    expected = torch_losses(tuned)
    assert expected[-1] < expected[0] - 0.02
    assert np.abs(np.subtract(our_losses(base()[0], params, method), expected)).max() <= 1e-3


def test_merged_is_written_dense_and_computes_the_same(tmp_path):
    _, params, method = pair("dora")
    model = base()[0]
    jaxft.save_pretrained(tmp_path / "merged", model, method.merge(model, params))
    assert np.abs(their_logits(by_transformers(tmp_path / "merged")) - our_logits(model, params)).max() <= 1e-4


def kernel_of(params, name):
    """Returns one kernel, a node or an array, without its layer axis."""
    for leaf in segments.leaves(params, is_leaf=is_node):
        if name in leaf.names:
            index = leaf.names.index(name)
            return jax.tree.map(lambda part, index=index: part[index], leaf.value)
    raise KeyError(name)


def started(method, params, folder=None):
    return method.begin(jax.random.key(0), base()[0], params, Material(None, OriginalKernels(folder or dense())))


def reference_loftq(weight, rank, turns):
    """LoftQ of a torch weight (out, in): bitsandbytes quantizes, peft decomposes; returns the base and the product."""
    product = torch.zeros_like(weight)
    for _ in range(turns):
        codes, state = bitsandbytes.functional.quantize_4bit(weight - product, blocksize=64, quant_type="nf4", compress_statistics=True)
        base = bitsandbytes.functional.dequantize_4bit(codes, state)
        found = _low_rank_decomposition(weight - base, reduced_rank=rank)
        product = found["L"] @ found["R"]
    return base.numpy(), product.numpy()


@pytest.mark.parametrize(("start", "turns"), [("loftq", 1), ("loftq_niter_3", 3)])
def test_loftq_is_that_of_bitsandbytes_and_peft(start, turns):
    _, params = base()
    method = LoRA(rank=6, alpha=9.0, start=start, targets=("up_proj",), alpha_pattern=(("layers/1", 2.0),))
    tuned = started(method, params)
    for layer in (0, 1):
        name = UP.format(layer)
        whole, found = OriginalKernels(dense())(name), kernel_of(tuned, name)
        expected_base, expected_product = reference_loftq(torch.tensor(np.ascontiguousarray(whole.T)), 6, turns)
        product = found.scale * (found.lora_a @ found.lora_b)
        if turns == 1:
            assert np.array_equal(found.base.dense(), expected_base.T)
        # a product that differs by rounding puts the value at a border into the next code
        assert np.mean(np.abs(found.base.dense() - expected_base.T) > 1e-6) <= 1e-3
        assert np.linalg.norm(product - expected_product.T) <= 1e-3 * np.linalg.norm(product)
        plain = np.linalg.norm(dense_of(kernel_of(params, name)) - whole)
        assert np.linalg.norm(found.dense() - whole) < 0.9 * plain


def test_more_turns_come_nearer_and_the_model_starts_nearer_to_the_original():
    model, params = base()
    errors = []
    for start in ("loftq", "loftq_niter_5"):
        tuned = started(LoRA(rank=8, alpha=8.0, start=start, targets=("up_proj",)), params)
        errors.append(np.linalg.norm(kernel_of(tuned, UP.format(0)).dense() - OriginalKernels(dense())(UP.format(0))))
    assert errors[1] < errors[0]
    original = our_logits(*jaxft.load_pretrained(dense()))
    tuned = started(LoRA(rank=16, alpha=16.0, start="loftq"), params)
    assert np.abs(our_logits(model, tuned) - original).mean() < 0.8 * np.abs(our_logits(model, params) - original).mean()


def test_loftq_of_one_turn_is_an_adapter_of_the_quantized_model_and_of_more_is_not(tmp_path):
    model, params = base()
    one, more = (LoRA(rank=4, start=start, targets=("up_proj",)) for start in ("loftq", "loftq_niter_2"))
    tuned = started(one, params)
    jaxft.save_adapter(tmp_path / "one", model, tuned, one)
    back, _ = jaxft.load_adapter(tmp_path / "one", model, params)
    assert np.array_equal(our_logits(model, back), our_logits(model, tuned))
    other = started(more, params)
    assert not has_form(model, other, more)
    with pytest.raises(UserError, match="quantized the base again"):
        jaxft.save_adapter(tmp_path / "more", model, other, more)


def test_loftq_takes_a_quantized_base_whose_original_is_there():
    model, params = base()
    method = LoRA(start="loftq")
    with pytest.raises(UserError, match=r"takes the kernels as they were before.*init_from_kernels"):
        method.init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match=r"isn't quantized. Set config.model.quantization"):
        started(method, jaxft.load_pretrained(dense())[1])
    with pytest.raises(UserError, match=r"in nf4 alone, and what quantization lost of it is wanted"):
        started(method, params, ready_made(KIND))
    for start in ("loftq_niter_0", "loftq_2"):
        with pytest.raises(UserError, match="There are: .*loftq_niter_5"):
            LoRA(start=start)


def test_dora_starts_with_the_lengths_of_the_dequantized_columns():
    model, params = base()
    found = kernel_of(LoRA(rank=2, dora=True).init(jax.random.key(0), model, params), UP.format(1))
    np.testing.assert_allclose(found.magnitude, jnp.linalg.norm(found.base.dense(), axis=0), rtol=1e-6)
