"""LoRA's options between jaxft and peft: DoRA, starts, embeddings, biases, whole modules; logits, gradients, files both ways."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from tiny_models import VOCABULARY, largest_difference, make_pair, make_reference, moved

import jaxft
from jaxft.methods import LoRA

TOLERANCE = 1e-4  # the bound on logits everywhere
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11)).astype(np.int32)
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED, TIED = {"attention_bias": True}, {"tie_word_embeddings": True}
THEIRS = {  # family, its settings, peft's settings
    "dora": ("llama", BIASED, {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": EVERY, "lora_dropout": 0.25}),
    "dora of embedding and head": (
        "qwen2",
        {},
        {"r": 3, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    ),
    "tied embedding": ("llama", TIED, {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"], "lora_dropout": 0.1}),
    "modules": (
        "llama",
        BIASED,
        {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "layers.1.self_attn.k_proj"]},
    ),
    "all biases": ("qwen2", {}, {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases of targets, a large rank": (
        "llama",
        BIASED,
        {"r": 40, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"], "bias": "lora_only", "layers_to_transform": [0, 2]},
    ),
    "lora biases": (
        "llama",
        BIASED,
        {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"], "lora_bias": True, "lora_dropout": 0.1},
    ),
}
STARTS = {
    "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": EVERY},
    "olora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora", "target_modules": EVERY, "use_rslora": True},
    "pissa and dora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": ["k_proj", "down_proj"], "use_dora": True},
}
OURS = {
    "dora": ("llama", BIASED, LoRA(rank=3, alpha=7.0, dora=True, dropout=0.1, targets=("layers", "lm_head"))),
    "tied embedding": ("llama", TIED, LoRA(rank=3, alpha=2.0, targets=("embed", "q_proj"))),
    "modules and biases": (
        "llama",
        BIASED,
        LoRA(rank=3, alpha=7.0, start="gaussian", layers=(1,), bias="all", modules_to_save=("norm", "lm_head", "embed")),
    ),
    "lora biases": ("llama", BIASED, LoRA(rank=3, alpha=7.0, lora_bias=True, bias="lora_only", targets=("attention", "lm_head"))),
    "pissa": ("llama", BIASED, LoRA(rank=3, alpha=7.0, start="pissa", rank_pattern=(("k_proj", 2),), alpha_pattern=(("mlp", 5.0),))),
    "fast pissa": ("llama", BIASED, LoRA(rank=3, alpha=7.0, start="pissa_niter_2", dora=True, targets=("layers", "lm_head"))),
    "olora": ("llama", BIASED, LoRA(rank=3, alpha=7.0, start="olora", rslora=True, rank_pattern=(("k_proj", 2),))),
}


def make_tuned(reference, **settings):
    """Returns a model of peft whose every trainable parameter is moved at random."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuned.eval()


def torch_results(tuned):
    """Returns logits, and the gradients of the logits' weighted sum by their names in the adapter's file."""
    logits = tuned(torch.tensor(IDS)).logits
    (logits * torch.tensor(weights(logits.shape))).sum().backward()
    gradients = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector").replace("modules_to_save.", "")
            gradients[name] = parameter.grad.numpy()
    return logits.detach().numpy(), gradients


def weights(shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def our_results(model, params, method):
    """Returns logits, and the gradients of their weighted sum, in the trainable leaves' places."""
    trainable, frozen = jaxft.partition(params, method.mask(params))

    def weighted(trainable):
        logits = model.apply({"params": jaxft.combine(trainable, frozen)}, IDS).logits
        return jnp.sum(logits * weights(logits.shape)), logits

    gradients, logits = jax.jit(jax.grad(weighted, has_aux=True))(trainable)
    return np.asarray(logits), jaxft.combine(gradients, frozen)


def tensors(folder):
    """Returns an adapter's tensors, the base's own among them where embeddings or the head are a target."""
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def load_in_peft(reference, folder):
    """peft only warns of keys and weights that it doesn't expect; here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # that a tied embedding is a target, which is so
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but")  # of layers that have no bias, which is meant
        return peft.PeftModel.from_pretrained(reference, folder).eval()


def torch_logits(tuned):
    with torch.no_grad():
        return tuned(torch.tensor(IDS)).logits.numpy()


@functools.cache
def logits_program(model):
    return jax.jit(lambda params: model.apply({"params": params}, IDS).logits)


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_of_peft_compute_and_train_as_there_and_go_back_as_they_came(name, tmp_path):
    family, shape, settings = THEIRS[name]
    reference, model, base = make_pair(family, **shape)
    tuned = make_tuned(reference, **settings)
    tuned.save_pretrained(tmp_path / "theirs")
    params, method = jaxft.load_adapter(tmp_path / "theirs", model, base)
    expected, gradients = torch_results(tuned)
    found, ours = our_results(model, params, method)
    assert largest_difference(found, expected) <= TOLERANCE
    jaxft.save_adapter(tmp_path / "gradients", model, ours, method)
    named = tensors(tmp_path / "gradients")
    named = {name: value for name, value in tensors(tmp_path / "gradients").items() if not name.endswith("base_layer.weight")}
    for leaf, gradient in gradients.items():
        relative = np.linalg.norm(named[leaf] - gradient) / np.linalg.norm(gradient)
        assert relative <= 1e-4, (leaf, relative)  # the bound everywhere
    jaxft.save_adapter(tmp_path / "again", model, params, method, base_model="owner/base")
    first, again = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}
    loaded = load_in_peft(make_reference(family, **shape), tmp_path / "again")
    assert largest_difference(torch_logits(loaded), expected) <= TOLERANCE


@pytest.mark.parametrize("name", STARTS)
def test_adapters_that_took_a_part_of_the_base_are_read_as_peft_reads_them(name, tmp_path):
    reference, model, base = make_pair("llama", **BIASED)
    tuned = make_tuned(reference, **STARTS[name])
    tuned.save_pretrained(tmp_path / "theirs")
    params, _ = jaxft.load_adapter(tmp_path / "theirs", model, base)
    assert largest_difference(logits_program(model)(params), torch_logits(tuned)) <= TOLERANCE


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_logits_on_the_original_base(name, tmp_path):
    family, shape, method = OURS[name]
    reference, model, base = make_pair(family, **shape)
    params = moved(method, model, base, size=0.1)
    jaxft.save_adapter(tmp_path / "ours", model, params, method, base_model="owner/base")
    tuned = load_in_peft(reference, tmp_path / "ours")
    found = logits_program(model)(params)
    assert largest_difference(found, torch_logits(tuned)) <= TOLERANCE
    assert largest_difference(found, logits_program(model)(base)) > 0.1  # it is a difference that shows
    back, _ = jaxft.load_adapter(tmp_path / "ours", model, base)
    assert largest_difference(found, logits_program(model)(back)) <= TOLERANCE


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_is_that_of_peft(name):
    reference, model, base = make_pair("llama")
    settings = STARTS[name]
    tuned = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    method = LoRA(rank=4, alpha=6.0, start=name, rslora=settings.get("use_rslora", False))
    params = method.init(jax.random.key(0), model, base)
    for name, part in (("q_proj", "attention"), ("down_proj", "mlp")):
        kernel = params["layers"]["0-2"][part][name]["kernel"]
        theirs = tuned.get_submodule(f"base_model.model.model.layers.1.{'self_attn' if part == 'attention' else part}.{name}")
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        # singular vectors have either sign: the product has one
        assert largest_difference(kernel.lora_a[1] @ kernel.lora_b[1], product.detach().numpy().T) <= 1e-5
        assert largest_difference(kernel.base[1], theirs.base_layer.weight.detach().numpy().T) <= 1e-5
