"""Adapters of every task with the task's head, both ways: PEFT's task_type, its modules_to_save, and Conv1D kernels."""

import copy
import json
import re

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from method_checks import IDS, base, logits
from peft_checks import TOLERANCE, check_ours, check_theirs, config_of, load_in_peft, tensors, their_logits, tuned_by_peft
from reference_training import check_gradients
from tiny_models import largest_difference, load, make_reference, same_bits, with_adapter

import jaxft
from jaxft.errors import UserError
from jaxft.methods import IA3, LoRA, NormTuning, Partial, Prefix, Prompt, VeRA

CLASSES, TAGS, SPANS = "sequence_classification", "token_classification", "question_answering"
THEIRS = {
    f"bert {CLASSES}": peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"]),
    f"bert {TAGS}": peft.LNTuningConfig(task_type="TOKEN_CLS", target_modules=["attention.output.LayerNorm"]),
    f"bert {SPANS}": peft.IA3Config(task_type="QUESTION_ANS", target_modules=["key", "intermediate.dense"], feedforward_modules=[]),
    "bert masked_lm": peft.LoraConfig(r=2, target_modules=["query", "intermediate.dense"], bias="lora_only"),
    f"roberta {CLASSES}": peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules=["query", "attention.output.dense"]),
    f"distilbert {CLASSES}": peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_lin"]),
    f"electra {CLASSES}": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"]),  # the head's dense layer is none
    f"camembert {CLASSES}": peft.IA3Config(task_type="SEQ_CLS", target_modules=["query", "dense"], feedforward_modules=["dense"]),
    f"xlm-roberta {CLASSES}": peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "dense"]),
    f"electra {TAGS}": peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["key", "output.dense"]),
    f"gpt2 {CLASSES}": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    f"gpt2 {TAGS}": peft.IA3Config(
        task_type="TOKEN_CLS", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    f"llama {CLASSES}": peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"]),
}
OURS = {
    f"bert {CLASSES}": (LoRA(rank=2, targets=("query", "value"), modules_to_save=("pooler", "classifier")), ["classifier", "pooler"]),
    f"bert {TAGS}": (VeRA(rank=4, targets=("attention/query",)) + Partial(targets=("classifier",)), ["classifier"]),
    f"bert {SPANS}": (NormTuning() + Partial(targets=("qa_outputs",)), ["qa_outputs"]),
    f"roberta {CLASSES}": (IA3(("key", "value"), ()) + Partial(targets=("classifier",)), ["classifier"]),
    f"distilbert {CLASSES}": (IA3(("key",), ()) + Partial(targets=("pooler", "classifier")), ["classifier", "pre_classifier"]),
    f"gpt2 {CLASSES}": (LoRA(rank=2, targets=("c_attn",), modules_to_save=("score",)), ["score"]),
    f"gpt2 {TAGS}": (VeRA(rank=4, targets=("c_attn", "c_fc")) + Partial(targets=("classifier",)), ["classifier"]),
    f"llama {CLASSES}": (Prompt(virtual_tokens=3) + Partial(targets=("score",)), ["score"]),
}
KINDS = {CLASSES: "SEQ_CLS", TAGS: "TOKEN_CLS", SPANS: "QUESTION_ANS"}


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_of_peft_give_its_outputs_and_its_bytes(name, tmp_path):
    check_theirs(tuned_by_peft(THEIRS[name], "", family=name), tmp_path, name)
    model, params = base(name)
    tuned, method = jaxft.load_adapter(tmp_path / "again", model, params)
    assert config_of(tmp_path / "again")["task_type"] == config_of(tmp_path / "theirs")["task_type"]
    trains = method.mask(tuned)
    if model.head:
        assert all(jax.tree.leaves([trains[part] for part in model.head if part != "pooler" or "distilbert" in name]))


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_outputs(name, tmp_path):
    method, saved = OURS[name]
    check_ours(method, tmp_path, name)
    config = config_of(tmp_path / "ours")
    assert (config["task_type"], sorted(config["modules_to_save"])) == (KINDS[name.split()[1]], saved)


def test_an_adapter_without_the_head_is_of_no_task(tmp_path):
    """PEFT would train a head with one of the task, and miss it in the file."""
    name, method = f"bert {CLASSES}", LoRA(rank=2, targets=("query",))
    check_ours(method, tmp_path, name)
    assert config_of(tmp_path / "ours")["task_type"] is None


@pytest.mark.parametrize("name", [f"bert {CLASSES}", f"gpt2 {CLASSES}"])
def test_gradients_of_adapter_and_head_are_those_of_peft(name, tmp_path):
    model, params = base(name)
    theirs = tuned_by_peft(THEIRS[name], "", family=name)
    tuned, method = with_adapter(theirs, model, params)
    trainable, frozen = jaxft.partition(tuned, method.mask(tuned))

    def loss(trainable):
        out = model.apply({"params": jaxft.combine(trainable, frozen)}, IDS).logits
        return jax.numpy.sum(jax.numpy.sin(out) * out)

    out = theirs(torch.tensor(IDS)).logits
    (out.sin() * out).sum().backward()
    gradients = jaxft.combine(jax.jit(jax.grad(loss))(trainable), frozen)
    jaxft.save_adapter(tmp_path / "gradients", model, gradients, method)
    found = tensors(tmp_path / "gradients")
    expected = {
        re.sub(r"modules_to_save\.default\.|\.default(?=\.)", "", key): leaf.grad.numpy()
        for key, leaf in theirs.named_parameters()
        if leaf.requires_grad
    }
    assert found.keys() == expected.keys()
    check_gradients(found, expected)


def test_an_adapter_of_another_task_is_refused(tmp_path):
    tuned_by_peft(THEIRS[f"bert {CLASSES}"], "", family=f"bert {CLASSES}").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="task_type is 'SEQ_CLS'; this model is loaded for token_classification"):
        jaxft.load_adapter(tmp_path, *base(f"bert {TAGS}"))


def test_only_the_names_of_heads_may_be_missing(tmp_path):
    tuned_by_peft(THEIRS[f"bert {CLASSES}"], "", family=f"bert {CLASSES}").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["classifier", "scores"]}))
    with pytest.raises(UserError, match="no module is called 'scores'"):
        jaxft.load_adapter(tmp_path, *base(f"bert {CLASSES}"))


@pytest.mark.parametrize("name", [f"gpt2 {CLASSES}", f"llama {CLASSES}"])
def test_a_prefix_comes_with_its_head(name, tmp_path):
    """peft knows transformers 5.24's argument by its old name alone: its keys and values are passed by hand."""
    heads = base(name)[0].config.num_key_value_heads
    shape = {
        "num_virtual_tokens": 3,
        "token_dim": 8 * heads,
        "num_layers": 3,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }
    theirs = tuned_by_peft(peft.PrefixTuningConfig(task_type="SEQ_CLS", **shape), "", family=name, size=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    tuned, method = jaxft.load_adapter(tmp_path / "theirs", *base(name))
    assert method == Prefix(virtual_tokens=3) + Partial(targets=("score",))
    with torch.no_grad():
        mask = torch.ones(len(IDS), 3 + IDS.shape[1], dtype=torch.long)
        expected = theirs.base_model(torch.tensor(IDS), attention_mask=mask, cache=theirs.get_prompt(len(IDS))).logits.numpy()
    assert largest_difference(logits(tuned, name), expected) <= TOLERANCE
    assert largest_difference(logits(tuned, name), logits(base(name)[1], name)) > 0.01
    jaxft.save_adapter(tmp_path / "ours", base(name)[0], tuned, method)
    ours, again = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert {key: value.tobytes() for key, value in ours.items()} == {key: value.tobytes() for key, value in again.items()}
    load_in_peft(tmp_path / "ours", name)


def test_a_bias_of_two_names_is_written_by_both_as_peft_does(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all")
    check_theirs(tuned_by_peft(config, "", family="bert masked_lm"), tmp_path, "bert masked_lm")
    tuned_by_peft(config, "", family="roberta masked_lm").save_pretrained(tmp_path / "roberta")  # IDS hold its padding
    model, params = base("roberta masked_lm")
    jaxft.save_adapter(tmp_path / "written", model, *jaxft.load_adapter(tmp_path / "roberta", model, params))
    first, again = tensors(tmp_path / "roberta"), tensors(tmp_path / "written")
    second = "base_model.model.lm_head.decoder.bias"
    assert second in first
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}
    safetensors.numpy.save_file(first | {second: first[second] + 1}, tmp_path / "roberta/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.decoder\.bias isn't this model's lm_head.bias"):
        jaxft.load_adapter(tmp_path / "roberta", model, params)


@pytest.mark.parametrize(
    ("family", "places"), [(f"bert {CLASSES}", ["bias"]), (f"roberta {CLASSES}", ["default.dense.bias", "default.out_proj.bias"])]
)
def test_biases_of_modules_that_a_trained_head_replaced_are_left_out(family, places, tmp_path):
    """peft writes them beside the head, which computes without them."""
    theirs = tuned_by_peft(peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="all"), "", family=family)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = base(family)
    tuned, method = jaxft.load_adapter(tmp_path / "theirs", model, params)
    assert largest_difference(logits(tuned, family), their_logits(theirs)) <= TOLERANCE
    jaxft.save_adapter(tmp_path / "ours", model, tuned, method)
    first, again = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    left = {key for key in first if ".original_module." in key or ".modules_to_save." in key}
    assert len(left) == 2 * len(places)
    assert {key: value.tobytes() for key, value in again.items()} == {
        key: value.tobytes() for key, value in first.items() if key not in left
    }
    assert first.keys() - again.keys() == left
    assert largest_difference(their_logits(load_in_peft(tmp_path / "ours", family)), their_logits(theirs)) <= TOLERANCE
    stray = {"base_model.model.bert.encoder.layer.0.original_module.bias": np.ones(2, np.float32)}
    safetensors.numpy.save_file(first | stray, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"no place for: .*layer\.0\.original_module\.bias"):
        jaxft.load_adapter(tmp_path / "theirs", model, params)


def test_all_biases_beside_a_head_are_for_lora_alone(tmp_path):
    family = f"bert {CLASSES}"
    config = peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], bias="all")
    tuned_by_peft(config, "", family=family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bias is 'all' and modules_to_save trains classifier/bias too"):
        jaxft.load_adapter(tmp_path, *base(family))


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
BESIDE = {  # with save_embedding_layers
    "llama": [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.AdaLoraConfig(target_r=2, init_r=3, total_step=9, target_modules=["q_proj"], bias="all"),
        peft.PromptTuningConfig(**PROMPT),
        peft.PrefixTuningConfig(**PROMPT),
    ],
    "bert masked_lm": [
        peft.LoraConfig(r=2, target_modules=["query"]),
        peft.VeraConfig(r=4, target_modules=["query"], bias="all"),
        peft.LNTuningConfig(target_modules=["attention.output.LayerNorm"]),
    ],
    "distilbert masked_lm": [peft.ShiraConfig(r=1, target_modules=["q_lin"]), peft.LoraConfig(r=2, target_modules=["q_lin"], bias="all")],
    f"electra {CLASSES}": [peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="all")],
}


@pytest.mark.parametrize(("family", "config"), [(family, config) for family, configs in BESIDE.items() for config in configs])
def test_the_base_beside_an_adapter_is_read_over(family, config, tmp_path):
    theirs = tuned_by_peft(copy.deepcopy(config), "", family=family)
    theirs.save_pretrained(tmp_path / "alone")
    theirs.save_pretrained(tmp_path / "beside", save_embedding_layers=True)
    assert tensors(tmp_path / "beside").keys() > tensors(tmp_path / "alone").keys()
    (one, method), (other, same) = (jaxft.load_adapter(tmp_path / name, *base(family)) for name in ("alone", "beside"))
    assert method == same
    assert same_bits(one, other)


@pytest.mark.parametrize("method", [IA3(("k_proj",), ()), Prefix(virtual_tokens=3)])
def test_a_table_that_is_the_head_too_is_not_written_beside_an_adapter(method, tmp_path):
    model, params = load(make_reference("llama", tie_word_embeddings=True))
    method += Partial(targets=("embed",))
    with pytest.raises(UserError, match=r"has the embeddings, which are the output head too in this model"):
        jaxft.save_adapter(tmp_path / "adapter", model, method.init(jax.random.key(0), model, params), method)
