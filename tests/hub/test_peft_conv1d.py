"""Adapters of GPT-2 between jaxft and peft, both ways: transformers holds its kernels in Conv1D, (in, out), and its head is a table."""

import jax
import numpy as np
import peft
import pytest
from method_checks import base, logits
from peft_checks import TOLERANCE, check_ours, check_theirs, check_training, config_of, tensors, their_logits, tuned_by_peft

import jaxft
from jaxft.errors import UserError
from jaxft.hub.peft import has_form
from jaxft.methods import IA3, AdaLoRA, LoRA, NormTuning, Partial, SparseMask, VeRA

FAMILY = "gpt2"
PEFT = {  # what trains by its name, and the configuration; without target_modules peft takes those it has for GPT-2
    "lora": ("lora_", peft.LoraConfig, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "lora_only"}),
    "dora": ("lora_", peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "adalora": ("lora_", peft.AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 10}),
    "adalora, biases": ("", peft.AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 10, "bias": "lora_only"}),
    "ia3": ("ia3_", peft.IA3Config, {}),
    "vera": ("vera_lambda", peft.VeraConfig, {"r": 6, "target_modules": "all-linear"}),
    "norms": ("ln_tuning", peft.LNTuningConfig, {}),
}
OURS = {
    "lora": LoRA(rank=4, bias="all", modules_to_save=("position_embed", "ln_f")),
    "tables": LoRA(rank=3, alpha=6.0, targets=("embed", "position_embed")),
    "dora": LoRA(rank=3, alpha=6.0, dora=True, targets=("mlp/c_proj",), rank_pattern=(("layers/2", 2),)),
    "adalora": AdaLoRA(init_rank=3, target_rank=2, bias="all"),
    "ia3 and a norm": IA3() + Partial(targets=("ln_f",)),
    "vera": VeRA(rank=6, bias="all"),
    "norms": NormTuning(),
}


def tuned(name):
    prefix, kind, settings = PEFT[name]
    return tuned_by_peft(kind(task_type="CAUSAL_LM", **settings), prefix, 0.1, FAMILY)


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    check_theirs(tuned(name), tmp_path, FAMILY)
    theirs, ours = (config_of(tmp_path / folder) for folder in ("theirs", "again"))
    assert ours.get("fan_in_fan_out") == theirs.get("fan_in_fan_out")


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_logits(name, tmp_path):
    check_ours(OURS[name], tmp_path, FAMILY, 0.05)


def test_a_table_of_another_name_than_peft_knows_goes_without_its_base(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["wte", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = tuned_by_peft(config, "lora_", 0.1, FAMILY)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = base(FAMILY)
    loaded, method = jaxft.load_adapter(tmp_path / "theirs", model, params)
    assert np.abs(logits(loaded, FAMILY) - their_logits(theirs)).max() <= TOLERANCE
    jaxft.save_adapter(tmp_path / "again", model, loaded, method)
    first, again = ({key: value.tobytes() for key, value in tensors(tmp_path / name).items()} for name in ("theirs", "again"))
    assert first == again


def test_gradients_are_those_of_peft():
    check_training(tuned("lora"), FAMILY, steps=False)


def test_modules_of_one_name_in_both_sub_layers_are_told_apart(tmp_path):
    model, params = base(FAMILY)
    jaxft.save_adapter(tmp_path / "ia3", model, IA3().init(jax.random.key(0), model, params), IA3())
    config = config_of(tmp_path / "ia3")
    assert (config["target_modules"], config["feedforward_modules"]) == (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])


def test_shira_which_peft_has_for_linear_layers_alone_is_refused(tmp_path):
    model, params = base(FAMILY)
    method = SparseMask(rank=1)
    params = method.init(jax.random.key(0), model, params)
    assert not has_form(model, params, method)
    with pytest.raises(UserError, match=r"no SHiRA for transformer.h.0.attn.c_attn: there it is a Conv1D.*Write the whole model"):
        jaxft.save_adapter(tmp_path / "sparse", model, params, method)
