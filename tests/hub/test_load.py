"""Import of safetensors folders against transformers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import GPT2, MODELS, TOLERANCE, difference, make_model

import jaxft
from jaxft.errors import UserError


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, folder):
    family, settings = MODELS[name]
    reference = make_model(family, **settings)
    reference.save_pretrained(folder)
    model, params = jaxft.load_pretrained(folder)
    for side in ("left", "right"):
        assert difference(model, params, reference, side) <= TOLERANCE


def test_parameters_have_the_structure_of_a_new_model(folder):
    make_model("llama", attention_bias=True).save_pretrained(folder)
    model, params = jaxft.load_pretrained(folder)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.shape == like.shape and leaf.dtype == like.dtype, params, fresh))
    assert list(params["layers"]) == ["0-2"]


def test_sharded_files_give_the_same_parameters(folder, tmp_path):
    reference = make_model("llama")
    reference.save_pretrained(folder)
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    _, whole = jaxft.load_pretrained(folder)
    _, sharded = jaxft.load_pretrained(tmp_path / "sharded")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, sharded))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(stored, folder):
    make_model("qwen2", dtype=stored).save_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model, params = jaxft.load_pretrained(folder)
    assert difference(model, params, reference) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_in_the_type_asked_for(dtype, folder):
    make_model("llama").save_pretrained(folder)
    model, params = jaxft.load_pretrained(folder, dtype=dtype)
    _, wide = jaxft.load_pretrained(folder)
    assert model.dtype == dtype
    assert jax.tree.all(jax.tree.map(lambda half, full: half.dtype == dtype and np.array_equal(half, full.astype(dtype)), params, wide))


def test_auto_is_float32_on_cpu(folder):
    make_model("llama").save_pretrained(folder)
    assert jaxft.load_pretrained(folder, dtype="auto")[0].dtype == jnp.float32


def test_a_tied_model_may_store_its_head_too(folder):
    make_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    _edit(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    _, params = jaxft.load_pretrained(folder)
    assert "lm_head" not in params


def test_old_rotary_buffers_are_passed_over(folder):
    make_model("llama").save_pretrained(folder)
    _edit(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    jaxft.load_pretrained(folder)


def test_a_gpt2_may_be_stored_without_the_prefix_of_its_body_and_with_its_old_masks(folder):
    """As openai-community/gpt2 is: the tensors of GPT2Model, with the causal mask of each layer."""
    reference = make_model("gpt2", **GPT2)
    reference.save_pretrained(folder)
    _edit(folder, lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()})
    masks = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "h.1.attn.masked_bias": np.ones(1, np.float32)}
    _edit(folder, lambda tensors: tensors | masks)
    model, params = jaxft.load_pretrained(folder)
    assert difference(model, params, reference) <= TOLERANCE
    _edit(folder, lambda tensors: tensors | {"h.0.attn.more": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"no place for: h\.0\.attn\.more"):
        jaxft.load_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "has add_cross_attention"),
        ({"activation_function": "gelu_nwe"}, "no activation .* 'gelu_nwe'. Did you mean 'gelu_new'"),
        ({"n_head": 3}, "n_embd 32 isn't a multiple of n_head 3"),
    ],
)
def test_what_a_gpt2_cannot_be_is_refused(fields, message, folder):
    make_model("gpt2", **GPT2).save_pretrained(folder)
    _config(folder, **fields)
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(folder)


def _edit(folder, change):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def _config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _without(name):
    return lambda folder: _edit(folder, lambda tensors: {key: value for key, value in tensors.items() if key != name})


def _plus(name, value):
    return lambda folder: _edit(folder, lambda tensors: tensors | {name: value})


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


def _bad_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')


def _escaping_index(folder):
    _index(folder, "../x.safetensors")


def _index(folder, file):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


_QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}  # whose configuration transformers doesn't check
BROKEN = {
    "missing": (_without("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "left over": (_plus("model.extra.weight", np.ones(2, np.float32)), r"no place for: model\.extra\.weight"),
    "shape": (_plus("model.norm.weight", np.ones(3, np.float32)), r"model\.norm\.weight \(3,\) for \(32,\)"),
    "untied": (lambda folder: _config(folder, tie_word_embeddings=True), "untied model"),
    "no head": (_without("lm_head.weight"), r"lacks lm_head\.weight"),
    "integers": (_plus("model.norm.weight", np.ones(32, np.uint8)), r"stored as U8"),
    "truncated": (_truncate, "no whole safetensors file"),
    "foreign": (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 99), "no whole safetensors file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "no whole safetensors file"),
    "pickle": (_pickled, "pickle files.*convert"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "adapter": (_adapter, "is an adapter.*owner/base"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "can't be read as JSON"),
    "architecture": (lambda folder: _config(folder, architectures=["LlamaForCausalLMs"]), "no architecture 'LlamaForCausalLMs'.*Did"),
    "no architecture": (lambda folder: _config(folder, architectures=None), "no architecture under"),
    "config values": (lambda folder: _config(folder, hidden_size="many"), "isn't a configuration"),
    "heads": (lambda folder: _config(folder, num_key_value_heads=3), "num_attention_heads 4 isn't a multiple of num_key_value_heads 3"),
    "head size": (lambda folder: _config(folder, model_type="qwen2", num_attention_heads=6, head_dim=None, **_QWEN2), "or say head_dim"),
    "quantized": (lambda folder: _config(folder, quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
    "shard missing": (_bad_index, r"There is no .*gone\.safetensors"),
    "shard outside": (_escaping_index, "outside of its folder"),
    "shard of no name": (lambda folder: _index(folder, 5), "outside of its folder, or none"),
    "shard above": (lambda folder: _index(folder, ".."), "outside of its folder, or none"),
    "architecture of no name": (lambda folder: _config(folder, architectures=[1]), r"names \[1\] under"),
    "no layers": (lambda folder: _config(folder, num_hidden_layers=0), "num_hidden_layers is a whole number from 1 on, not 0"),
    "no positions": (lambda folder: _config(folder, max_position_embeddings=0), "max_position_embeddings is a whole number from 1 on"),
    "rotary base": (lambda folder: _config(folder, rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "rope_theta .* above 0"),
    "rotary factor": (
        lambda folder: _config(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
        "factor of the rotary embedding is a number above 0|isn't a configuration that transformers reads",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_gives_one_clear_message(fault, folder):
    make_model("llama").save_pretrained(folder)
    breaks, message = BROKEN[fault]
    breaks(folder)
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(folder)


def test_an_index_that_names_a_tensor_elsewhere_is_refused(folder):
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(file for file in files if file != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="says that .* holds 'model.norm.weight'"):
        jaxft.load_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"task": "causal"}, "no task 'causal'.*causal_lm"), ({"dtype": "float23"}, "no dtype 'float23'. Did you mean 'float32'")],
)
def test_unknown_options_are_refused_before_anything_is_read(options, message, folder):
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(folder, **options)


def test_remote_code_is_never_run(folder, tmp_path):
    make_model("llama").save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    jaxft.load_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_folder_may_go_once_it_is_loaded(folder):
    make_model("llama").save_pretrained(folder)
    model, params = jaxft.load_pretrained(folder)
    before = np.asarray(model.apply({"params": params}, np.ones((1, 3), np.int32)).logits)
    shutil.rmtree(folder)
    assert np.array_equal(before, model.apply({"params": params}, np.ones((1, 3), np.int32)).logits)
