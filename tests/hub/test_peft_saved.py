"""PEFT's modules_to_save beside every kind of adapter that can have them, both ways."""

import peft
import pytest
from method_checks import base
from peft_checks import check_ours, check_theirs, config_of, tuned_by_peft
from tiny_models import moved

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, BitFit, LoRA, NormTuning, Partial, Prefix, SparseMask, VeRA

MODULES = ["lm_head", "layers.1.self_attn.k_proj"]  # the second with a bias
THEIRS = {
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=MODULES
    ),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=MODULES),
    "adalora": peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], modules_to_save=MODULES
    ),
    "shira": peft.ShiraConfig(task_type="CAUSAL_LM", r=1, random_seed=0, target_modules=["q_proj"], modules_to_save=MODULES),
    "norms": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"], modules_to_save=MODULES),
}
OURS = {
    "ia3": IA3() + Partial(targets=("lm_head", "layers/1/attention/q_proj")),
    "ia3, behind": Partial(targets=("lm_head", "layers/1/attention/q_proj")) + IA3(),
    "vera": VeRA(rank=4, targets=("q_proj",)) + Partial(targets=("embed", "norm")),
    "norms": NormTuning(targets=("norm",)) + Partial(targets=("layers/0/attention/q_proj",)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_of_peft_give_its_logits_and_its_bytes(name, tmp_path):
    check_theirs(tuned_by_peft(THEIRS[name], "", family="qwen2"), tmp_path, "qwen2")
    assert jaxft.load_adapter(tmp_path / "again", *base("qwen2"))[1].methods[1].targets
    assert sorted(config_of(tmp_path / "again")["modules_to_save"]) == sorted(
        {"layers.1.self_attn.k_proj": "model.layers.1.self_attn.k_proj"}.get(module, module) for module in THEIRS[name].modules_to_save
    )


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_logits(name, tmp_path):
    check_ours(OURS[name], tmp_path, "qwen2")


def test_an_adalora_without_a_schedule_of_its_own_comes_back_without_one(tmp_path):
    model, params = base("qwen2")
    for method in (AdaLoRA(init_rank=3, target_rank=2, tinit=4, tfinal=2), AdaLoRA(init_rank=3, target_rank=2, total_steps=9)):
        jaxft.save_adapter(tmp_path / "a", model, moved(method, model, params), method)
        assert jaxft.load_adapter(tmp_path / "a", *base("qwen2"))[1].total_steps == method.total_steps


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SparseMask(rank=1, targets=("q_proj",)) + Partial(targets=("layers/1/attention/q_proj/bias",)), "trains whole and has an adapter"),
        (IA3(targets=("layers/0/attention/k_proj",), feedforward=()) + Partial(last=1), r"PEFT has no form for IA3 \+ Partial"),
        (LoRA(targets=("q_proj",), modules_to_save=("q_proj/bias",)), "trains whole and has an adapter"),
        (IA3() + BitFit(), r"PEFT has no form for IA3 \+ BitFit"),
        (LoRA(targets=("q_proj",)) + Partial(targets=("norm",)), r"PEFT has no form for LoRA \+ Partial"),
        (Prefix(virtual_tokens=2) + Partial(last=1), r"PEFT has no form for Prefix \+ Partial"),
    ],
    ids=lambda found: getattr(found, "title", ""),
)
def test_a_sum_that_the_file_can_not_hold_is_refused(method, message, tmp_path):
    model, params = base("qwen2")
    with pytest.raises(UserError, match=message):
        jaxft.save_adapter(tmp_path / "a", model, moved(method, model, params), method)
    assert not (tmp_path / "a").exists()


def test_a_name_that_is_no_modules_is_refused(tmp_path):
    tuned_by_peft(THEIRS["ia3"], "", family="qwen2").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lm_head"', '"score"'))
    with pytest.raises(UserError, match="modules_to_save: no module is called 'score'"):
        jaxft.load_adapter(tmp_path, *base("qwen2"))
