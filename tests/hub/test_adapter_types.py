"""Adapters that are stored in half types: what trains is float32, and so is what is written again; no bit of a number is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
from method_checks import base, pair
from tiny_models import moved

import jaxft
from jaxft.methods import IA3, AdaLoRA, Bottleneck, LoRA, NormTuning, Partial, Prefix, SparseMask, VeRA

METHODS = {
    "lora": LoRA(rank=2, dora=True, targets=("q_proj", "lm_head"), modules_to_save=("norm",)),
    "adalora": AdaLoRA(target_rank=2, init_rank=3, targets=("q_proj",)),
    "ia3 beside whole modules": IA3() + Partial(targets=("lm_head",)),
    "norms": NormTuning(),
    "sparse": SparseMask(rank=1, targets=("q_proj",)),
    "vera": VeRA(rank=4, targets=("q_proj",)),
    "prefix": Prefix(3),
    "bottleneck": Bottleneck(),
}


def written(method, folder, dtype):
    """Returns an adapter's tensors once they are rounded to `dtype` in its file."""
    model, params = base()
    jaxft.save_adapter(folder, model, moved(method, model, params), method)
    (file,) = folder.glob("*.safetensors")
    tensors = {name: value.astype(dtype) if value.dtype == np.float32 else value for name, value in tensors_of(folder).items()}
    safetensors.numpy.save_file(tensors, file)
    return tensors


def tensors_of(folder):
    (file,) = folder.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", METHODS)
def test_half_types_become_float32_without_loss(name, dtype, tmp_path):
    model, params = base()
    stored = written(METHODS[name], tmp_path / "half", jnp.dtype(dtype))
    params, method = jaxft.load_adapter(tmp_path / "half", model, params)
    trainable, _ = jaxft.partition(params, method.mask(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {np.dtype(np.float32)}
    jaxft.save_adapter(tmp_path / "again", model, params, method)
    again = tensors_of(tmp_path / "again")
    assert {value.dtype for value in again.values()} <= {np.dtype(np.float32), np.dtype(np.int32)}
    assert stored.keys() == again.keys()
    for key in stored.keys() - {"base_model.model.lm_head.base_layer.weight"}:  # the base's, which has more digits than their copy of it
        value = stored[key]
        assert np.array_equal(value.astype(again[key].dtype), again[key]), key


def test_peft_reads_them_as_float32_too(tmp_path):
    written(METHODS["lora"], tmp_path / "half", jnp.bfloat16)
    tuned = peft.PeftModel.from_pretrained(pair()[0], tmp_path / "half")
    assert {str(parameter.dtype) for name, parameter in tuned.named_parameters() if "lora_" in name} == {"torch.float32"}
    tuned.unload()


def test_what_float32_cannot_hold_is_rounded_once(tmp_path):
    model, params = base()
    method = METHODS["norms"]
    stored = written(method, tmp_path / "double", np.float64)
    third = {key: np.full_like(value, 1 / 3) for key, value in stored.items()}
    safetensors.numpy.save_file(third, tmp_path / "double" / "adapter_model.safetensors")
    params, method = jaxft.load_adapter(tmp_path / "double", model, params)
    trainable, _ = jaxft.partition(params, method.mask(params))
    assert {float(number) for leaf in jax.tree.leaves(trainable) for number in np.ravel(leaf)} == {float(np.float32(1 / 3))}
