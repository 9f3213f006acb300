"""Virtual tokens between jaxft and peft, both ways: prefix tuning, prompt tuning, P-tuning."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from tiny_models import make_pair, make_reference, moved

import jaxft
from jaxft.errors import UserError

TOLERANCE = 1e-4  # float32 on both sides, logits of order 1 to 10
TOKENS = 5
PEFT = {
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix zero": (peft.PrefixTuningConfig, {"init_weights": "zero"}),
    "projected prefix": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 7}),
    "prompt": (peft.PromptTuningConfig, {}),
    "prompt of the vocabulary": (peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
    "gpt2 prefix": (peft.PrefixTuningConfig, {}),
    "gpt2 prompt": (peft.PromptTuningConfig, {}),
    "gpt2 mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
    "lstm": (peft.PromptEncoderConfig, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6, "encoder_num_layers": 3}),
}
OURS = {
    "prefix": jaxft.methods.Prefix(TOKENS),
    "projected prefix": jaxft.methods.Prefix(TOKENS, projection=True, projection_hidden=9),
    "prompt": jaxft.methods.Prompt(TOKENS),
    "random prompt": jaxft.methods.Prompt(TOKENS, start="random"),
    "mlp": jaxft.methods.PTuning(TOKENS, hidden_size=12),
    "gpt2 projected prefix": jaxft.methods.Prefix(TOKENS, projection=True, projection_hidden=9),
    "gpt2 prompt": jaxft.methods.Prompt(TOKENS),
    "lstm": jaxft.methods.PTuning(TOKENS, encoder="lstm", hidden_size=6, layers=3),
}
FAMILIES = {"prefix": "mistral", "lstm": "qwen2"} | {name: "gpt2" for name in (*PEFT, *OURS) if "gpt2" in name}  # the others: llama
WEIGHTS = "adapter_model.safetensors"


def pair_of(name):
    """Returns the reference, jaxft's model, and parameters; a window of Mistral that ends within the text."""
    family = FAMILIES.get(name, "llama")
    return make_pair(family, **({"sliding_window": 6} if family == "mistral" else {}))


def tuned_by_peft(reference, name):
    torch.manual_seed(3)
    kind, settings = PEFT[name]
    tuned = peft.get_peft_model(reference, kind(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return tuned.eval()


def load_in_peft(reference, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of weights that it doesn't expect
        return peft.PeftModel.from_pretrained(reference, folder).eval()


def difference(model, params, tuned):
    """The largest difference of logits at real tokens, rows of different length padded on the right."""
    ids = np.random.default_rng(0).integers(1, 97, (2, 13)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    ours = jax.jit(lambda params: model.apply({"params": params}, ids, attention_mask=mask).logits)(params)
    with torch.no_grad():
        theirs = tuned(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[:, -13:]
    return float(np.abs(np.asarray(ours) - theirs)[mask == 1].max())


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits_and_are_written_again_as_they_were(name, tmp_path):
    reference, model, base = pair_of(name)
    tuned = tuned_by_peft(reference, name)
    tuned.save_pretrained(tmp_path / "peft")
    params, method = jaxft.load_adapter(tmp_path / "peft", model, base)
    assert difference(model, params, tuned) <= TOLERANCE
    fresh = method.init(jax.random.key(3), model, base)
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    jaxft.save_adapter(tmp_path / "again", model, params, method)
    first, again = (safetensors.numpy.load_file(tmp_path / place / WEIGHTS) for place in ("peft", "again"))
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}
    theirs, ours = (json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("peft", "again"))
    assert ours == theirs


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_logits_and_they_come_back(name, tmp_path):
    reference, model, base = pair_of(name)
    params = moved(OURS[name], model, base)
    jaxft.save_adapter(tmp_path / "ours", model, params, OURS[name])
    assert difference(model, params, load_in_peft(reference, tmp_path / "ours")) <= TOLERANCE
    back, method = jaxft.load_adapter(tmp_path / "ours", model, base)
    site = "prefix" if "prefix" in name else "prompt"
    gives = [jax.jit(lambda node: node.keys_values() if site == "prefix" else node.embeddings())(tree[site]) for tree in (params, back)]
    np.testing.assert_allclose(*(np.asarray(jax.tree.leaves(one)[0]) for one in gives), rtol=1e-6, atol=1e-6)  # fused or not
    jaxft.save_adapter(tmp_path / "again", model, back, method)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    first, again = (json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("ours", "again"))
    assert first == again


def test_keys_of_heads_wider_than_the_hidden_size_allows(tmp_path):
    reference, model, base = make_pair("llama", head_dim=12, num_key_value_heads=1)
    params = moved(jaxft.methods.Prefix(TOKENS), model, base)
    jaxft.save_adapter(tmp_path / "ours", model, params, jaxft.methods.Prefix(TOKENS))
    assert difference(model, params, load_in_peft(reference, tmp_path / "ours")) <= TOLERANCE
    tuned = tuned_by_peft(make_reference("llama", head_dim=12, num_key_value_heads=1), "prefix")
    tuned.save_pretrained(tmp_path / "peft")
    params, _ = jaxft.load_adapter(tmp_path / "peft", model, base)
    assert difference(model, params, tuned) <= TOLERANCE


@pytest.fixture
def prompt(tmp_path):
    _, model, base = make_pair("llama")
    params = moved(OURS["prompt"], model, base)
    jaxft.save_adapter(tmp_path / "prompt", model, params, OURS["prompt"])
    return tmp_path / "prompt", model, base, params


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_virtual_tokens", 4, "doesn't fit"),
        ("num_virtual_tokens", "5", "num_virtual_tokens is '5'; it has to be a whole number, 1 or more"),
        ("token_dim", 64, "another base model"),
        ("num_layers", 9, "another base model"),
        ("modules_to_save", ["lm_head"], "lacks base_model.lm_head.weight"),
        ("task_type", "SEQ_CLS", "task_type"),
        ("prompt_tuning_init", "GUESS", "prompt_tuning_init"),
        ("num_transformer_submodules", 2, "num_transformer_submodules"),
        ("virtual_tokenz", 3, "doesn't know"),
    ],
)
def test_a_configuration_that_jaxft_has_no_place_for_is_refused(key, value, message, prompt):
    folder, model, base, _ = prompt
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(folder, model, base)


def test_the_method_has_to_be_the_one_that_made_the_parameters(prompt, tmp_path):
    _, model, base, params = prompt
    for method in (jaxft.methods.Prompt(TOKENS + 1), jaxft.methods.PTuning(TOKENS)):
        with pytest.raises(UserError, match="Pass the method that made"):
            jaxft.save_adapter(tmp_path / "other", model, params, method)
    with pytest.raises(UserError, match="hold no Prefix"):
        jaxft.save_adapter(tmp_path / "other", model, base, jaxft.methods.Prefix(TOKENS))


def test_parameters_with_a_prompt_take_no_second_one(prompt):
    folder, model, _, params = prompt
    with pytest.raises(UserError, match="have a prompt already"):
        jaxft.load_adapter(folder, model, params)


def test_extra_tensors_are_refused(prompt):
    folder, model, base, _ = prompt
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(tensors | {"extra": np.zeros(2, np.float32)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="no place for: extra"):
        jaxft.load_adapter(folder, model, base)
