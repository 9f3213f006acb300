"""Sums of methods as the adapters of their parts: each file is whole, whatever stands around the same kernels."""

import types

import jax
import numpy as np
import pytest
from method_checks import base
from peft_checks import load_in_peft
from tiny_models import moved

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, Bottleneck, LoRA, Prefix, SparseMask, VeRA
from jaxft.train.run import own_exports

LORA = LoRA(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
VERA = VeRA(rank=4, targets=("v_proj", "down_proj"))
PREFIX = Prefix(virtual_tokens=3)
SUMS = {
    "a lora within": LORA + IA3() + PREFIX,
    "a lora around": IA3() + PREFIX + LORA,
    "vera around": LORA + VERA + PREFIX,
    "four around one kernel": SparseMask(rank=1, targets=("down_proj",))
    + AdaLoRA(init_rank=3, target_rank=2, targets=("down_proj",))
    + VERA
    + IA3()
    + PREFIX,
    "one method twice": LORA + LoRA(rank=3, targets=("k_proj",), bias="lora_only") + VERA + VeRA(rank=5, targets=("up_proj",)) + PREFIX,
    "bottlenecks": Bottleneck(sites=("attention_output",), size=2) + LORA + Bottleneck(sites=("mlp_output",), size=3),
}


def exported(method, params):
    """What a run of `method` ends with."""
    model = base("qwen2")[0]
    setup = types.SimpleNamespace(experiment=types.SimpleNamespace(method=method), model=model, params=lambda state: params)
    return own_exports(setup, None)


@pytest.mark.parametrize("name", SUMS)
def test_its_parts_come_back_one_after_the_other_bit_for_bit(name, tmp_path):
    method = SUMS[name]
    model, params = base("qwen2")
    tuned, back = moved(method, model, params), params
    for folder, _, part in exported(method, tuned):
        jaxft.save_adapter(tmp_path / folder, model, tuned, part)
        back, _ = jaxft.load_adapter(tmp_path / folder, model, back)
        if not isinstance(part, Bottleneck):
            load_in_peft(tmp_path / folder, "qwen2")  # raises for keys that peft has no place for, and for those it lacks
    assert jax.tree.structure(back) == jax.tree.structure(tuned)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tuned))


def test_an_adapter_on_one_of_its_own_kind_is_refused(tmp_path):
    method = AdaLoRA(init_rank=3, target_rank=2, targets=("q_proj",))
    model, params = base("qwen2")
    tuned = moved(method, model, params)
    jaxft.save_adapter(tmp_path / "adapter", model, tuned, method)
    around = IA3(targets=("q_proj",), feedforward=()).init(jax.random.key(0), model, tuned)
    with pytest.raises(UserError, match="hold AdaLoRA at layers/0/attention/q_proj/kernel already"):
        jaxft.load_adapter(tmp_path / "adapter", model, around)


def test_a_part_that_no_file_holds_is_refused_before_training():
    method = PREFIX + SparseMask(density=0.99, targets=("up_proj",))
    with pytest.raises(UserError, match=r"could be written nowhere: it can't be merged, and PEFT's files can't hold SparseMask\("):
        exported(method, moved(method, *base("qwen2")))
