"""Tuned norms between jaxft and peft, both ways."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
from method_checks import base
from peft_checks import check_ours, check_theirs, check_training, tuned_by_peft

import jaxft
from jaxft.errors import UserError
from jaxft.methods import NormTuning

PEFT = {
    "every norm": {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    "default": {"target_modules": ["post_attention_layernorm"]},
    "names": {"target_modules": ["norm", "layers.1.input_layernorm"]},
    "expression": {"target_modules": r".*\.layers\.[02]\..*layernorm", "exclude_modules": ["layers.0.input_layernorm"]},
}


def tuned(name, family="llama"):
    return tuned_by_peft(peft.LNTuningConfig(task_type="CAUSAL_LM", **PEFT[name]), "ln_tuning_layers", 0.2, family)


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    check_theirs(tuned(name), tmp_path)


@pytest.mark.parametrize("method", [NormTuning(), NormTuning(targets=("layers/[01]/input_norm", "norm/scale"))], ids=repr)
def test_peft_gives_our_logits(method, tmp_path):
    check_ours(method, tmp_path)


@pytest.mark.slow
def test_training_is_that_of_peft():
    check_training(tuned("every norm"))


BROKEN = {
    "unknown": ({"use_magic": True}, "a key that jaxft doesn't know, 'use_magic'"),
    "modules": ({"modules_to_save": ["lm_head"]}, "it lacks base_model.model.lm_head.weight"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "none": ({"target_modules": []}, "has no target_modules"),
    "linear": ({"target_modules": ["q_proj"]}, "choose none of the model's norms: .*input_layernorm"),
    "more": ({"target_modules": ["input_layernorm"]}, "lacks .*input_layernorm"),
    "type": ({"peft_type": "LN_TUNNING"}, "Did you mean 'LN_TUNING'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_gives_one_clear_message(fault, tmp_path):
    model, params = base()
    method = NormTuning(targets=("post_attention_norm",))
    jaxft.save_adapter(tmp_path / "a", model, method.init(jax.random.key(0), model, params), method)
    change, message = BROKEN[fault]
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(tmp_path / "a", model, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks .*layers.1.post_attention_layernorm"),
        (lambda tensors, name: tensors.update(more=np.ones(1, np.float32)), "no place for: more"),
        (lambda tensors, name: tensors.update({name: np.ones(31, np.float32)}), r"\(31,\) for \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    model, params = base()
    method = NormTuning(targets=("post_attention_norm",))
    jaxft.save_adapter(tmp_path / "a", model, method.init(jax.random.key(0), model, params), method)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors, "base_model.model.model.layers.1.post_attention_layernorm.ln_tuning_layers.weight")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(tmp_path / "a", model, params)
