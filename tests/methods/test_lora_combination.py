"""Combined LoRA adapters against peft's add_weighted_adapter."""

import functools
import tempfile

import jax
import numpy as np
import peft
import pytest
import torch
from tiny_models import largest_difference, make_pair, moved

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, LoRA, NormTuning
from jaxft.methods.lora import LoRAKernel
from jaxft.methods.lora_combination import combine_adapters
from jaxft.models import segments
from jaxft.models.node import is_node

NAMES = ["first", "second"]  # peft drops tensors of layer 1 where an adapter is called 1
WEIGHTS = (0.7, -1.3)
SETTINGS = ({"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3, "use_rslora": True})
PLACES = {"layers/1/attention/q_proj": "layers.1.self_attn.q_proj", "layers/2/mlp/up_proj": "layers.2.mlp.up_proj"}


@functools.cache
def adapters():
    """Two adapters of one base, in peft and here."""
    reference, model, base = make_pair("llama")
    torch.manual_seed(1)
    targets = (["q_proj", "up_proj"], ["q_proj", "v_proj"])
    tuned = None
    for adapter, settings, names in zip(NAMES, SETTINGS, targets, strict=True):
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=names, **settings)
        if tuned is None:
            tuned = peft.get_peft_model(reference, config, adapter_name=adapter)
        else:
            tuned.add_adapter(adapter, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        ours = [jaxft.load_adapter(f"{folder}/{name}", model, base) for name in NAMES]
    return tuned, model, base, ours


def products(params):
    """Returns scale * lora_a @ lora_b of every kernel, by the names of their modules."""
    found = {}
    for leaf in segments.leaves(params, is_leaf=is_node):
        if isinstance(leaf.value, LoRAKernel):
            for index, name in enumerate(leaf.names):
                found[name.removesuffix("/kernel")] = leaf.value.scale[index] * leaf.value.lora_a[index] @ leaf.value.lora_b[index]
    return found


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 3}),
        ("ties", {"density": 0.6}),
        ("ties", {"density": 0.4, "sign": "frequency"}),
        ("ties_svd", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.3}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
    ],
    ids=str,
)
def test_it_is_what_peft_makes(how, settings):
    tuned, model, base, ours = adapters()
    params, method = combine_adapters(model, base, ours, WEIGHTS, how, **settings, rng=jax.random.key(0))
    names = {"density": "density", "sign": "majority_sign_method", "rank": "svd_rank"}
    tuned.add_weighted_adapter(NAMES, list(WEIGHTS), "both", how, **{names[key]: value for key, value in settings.items()})
    found = products(params)
    try:
        modules = {name: module for name, module in tuned.named_modules() if "both" in getattr(module, "lora_A", {})}
        assert len(modules) == len(found)
        for ours_name, theirs_name in PLACES.items():
            module = next(module for name, module in modules.items() if name.endswith(theirs_name))
            assert largest_difference(found[ours_name], module.get_delta_weight("both").detach().numpy().T) <= 1e-5
            assert module.lora_A["both"].weight.shape[0] == method.rank
    finally:
        tuned.delete_adapter("both")


def test_cat_is_the_exact_sum_and_can_be_saved(tmp_path):
    _, model, base, ours = adapters()
    params, method = combine_adapters(model, base, ours, WEIGHTS, "cat")
    parts = [products(adapter) for adapter, _ in ours]
    for name, product in products(params).items():
        assert largest_difference(product, sum(w * part[name] for w, part in zip(WEIGHTS, parts, strict=True) if name in part)) <= 1e-5
    jaxft.save_adapter(tmp_path / "both", model, params, method)
    back, _ = jaxft.load_adapter(tmp_path / "both", model, base)
    assert largest_difference(products(back), products(params)) == 0


def test_dare_drops_by_its_key_and_keeps_the_mean():
    _, model, base, ours = adapters()
    draw = functools.partial(combine_adapters, model, base, ours[:1], (1.0,), "dare_linear_svd", density=0.5)
    one, again, other = (products(draw(rng=jax.random.key(seed))[0])["layers/1/attention/q_proj"] for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "lineer"}, "Did you mean 'linear'"),
        ({"weights": (1.0,)}, "2 adapters and 1 weights"),
        ({"how": "dare_ties"}, "give it rng"),
        ({"density": 2.0}, "density is a share"),
        ({"density": 0.5}, "density is for what prunes: 'linear' leaves every value"),
        ({"weights": (float("nan"), 1.0)}, r"finite numbers, not \[nan, 1.0\]"),
        ({"weights": (1.0, float("inf"))}, "finite numbers"),
        ({"how": "cat", "rank": 3}, "rank is 3, which is for svd alone"),
        ({"how": "linear", "rank": 3}, "that of 'linear' follows from the adapters'"),
        ({"how": "svd", "rank": -1}, "1 or more"),
        ({"how": "svd", "rank": 17}, "rank is 17; layers/0/attention/v_proj/kernel is of 16 on its smaller side"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(arguments, message):
    _, model, base, ours = adapters()
    with pytest.raises(UserError, match=message):
        combine_adapters(model, base, ours, **({"weights": WEIGHTS} | arguments))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=4, targets=("q_proj",), modules_to_save=("norm",)), "Adapter 1: norm/scale isn't what the base has"),
        (LoRA(rank=4, targets=("q_proj",)) + NormTuning(targets=("norm",)), "Adapter 1: norm/scale isn't what the base has"),
        (IA3(targets=("q_proj",), feedforward=()) + LoRA(rank=4, targets=("q_proj",)), "Adapter 1: layers/0/attention/q_proj/kernel"),
        (AdaLoRA(targets=("q_proj",)) + LoRA(rank=4, targets=("o_proj",)), "Adapter 1: layers/0/attention/q_proj/kernel"),
    ],
    ids=lambda found: getattr(found, "title", ""),
)
def test_an_adapter_that_trained_more_than_its_lora_is_refused(method, message):
    _, model, base, ours = adapters()
    with pytest.raises(UserError, match=message):
        combine_adapters(model, base, [ours[0], (moved(method, model, base), method)], WEIGHTS)


def test_a_dora_and_other_ranks_are_refused():
    _, model, base, ours = adapters()
    method = LoRA(rank=3, targets=("q_proj",), dora=True)
    with pytest.raises(UserError, match="is a DoRA"):
        combine_adapters(model, base, [(moved(method, model, base), method)], (1.0,))
    method = LoRA(rank=3, targets=("q_proj",))
    with pytest.raises(UserError, match="adapters of one rank"):
        combine_adapters(model, base, [ours[0], (moved(method, model, base), method)], WEIGHTS)
