"""What a configuration says of quantization, and how a base in few bits is named to peft."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import jaxft
from jaxft.config import ModelConfig
from jaxft.errors import UserError
from jaxft.methods import BitFit, LoRA, Prefix
from jaxft.quant import to_bitsandbytes
from jaxft.train.report import adapter_command
from jaxft.train.setup import quantization


def test_fields_make_a_format():
    config = ModelConfig(quantization="fp4", double_quantization=False, block_size=128)
    assert quantization(config) == jaxft.Format("fp4", 128, False)
    assert quantization(ModelConfig()) is None


@pytest.mark.parametrize("change", [{"block_size": 128}, {"double_quantization": False}, {"quantized": ("mlp",)}], ids=str)
def test_what_has_no_effect_is_refused(change):
    with pytest.raises(UserError, match=f"model.{next(iter(change))} has no effect without model.quantization"):
        quantization(dataclasses.replace(ModelConfig(), **change))


MODEL = types.SimpleNamespace(task="causal_lm", head=(), config=types.SimpleNamespace(labels=()))


def test_of_an_encoders_prefix_peft_is_not_said_to_run_it():
    encoder, config = (
        types.SimpleNamespace(task="masked_lm", head=(), pooling="first", config=MODEL.config),
        ModelConfig(source="owner/name"),
    )
    for method in (Prefix(), Prefix() + BitFit()):
        found = adapter_command(pathlib.Path("adapter"), config, "peft", encoder, method)
        assert "PEFT reads it and can't run it" in found
        assert "PeftModel" not in found
    assert "PeftModel" in adapter_command(pathlib.Path("adapter"), config, "peft", encoder, LoRA())


def test_a_home_folder_is_written_out_in_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = adapter_command(pathlib.Path("adapter"), ModelConfig(source="~/base", dtype="float32"), "peft", MODEL)
    assert f'from_pretrained("{tmp_path}/base"' in found


FORMATS = ("peft", "adapterhub")


def said(format="peft", **settings):
    return adapter_command(pathlib.Path("adapter"), ModelConfig(source="owner/name", dtype="float32", **settings), format, MODEL)


@pytest.mark.parametrize("format", FORMATS)
def test_transformers_makes_the_base_where_it_makes_the_same(format):
    found = said(format, quantization="nf4")
    assert "import AutoModelForCausalLM, BitsAndBytesConfig\n" in found
    assert 'from_pretrained("owner/name", quantization_config=BitsAndBytesConfig(load_in_4bit=True' in found
    assert "jaxft.save_pretrained" not in found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_base_is_that_of_the_revision(format, quantization):
    assert 'from_pretrained("owner/name", revision="v2"' in said(format, quantization=quantization, revision="v2")
    assert "revision" not in said(format, quantization=quantization)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_printed_makes_the_base_that_was_trained_on(tmp_path, compute):
    """From files in float16: a base in 4 bits hangs on the type that its weights had when they were quantized."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(tmp_path)
    found = adapter_command(pathlib.Path("adapter"), ModelConfig(source=str(tmp_path), dtype=compute, quantization="nf4"), "peft", MODEL)
    code = [line.strip() for line in found[found.index("    import") :].splitlines()]
    names: dict = {}
    exec("\n".join(line for line in code if "PeftModel.from_pretrained" not in line), names)
    _, params = jaxft.load_pretrained(str(tmp_path), dtype=compute, quantization=jaxft.Format())
    ours = to_bitsandbytes(params["layers"]["0-0"]["mlp"]["up_proj"]["kernel"], 0)
    theirs = names["base"].model.layers[0].mlp.up_proj.weight
    assert np.array_equal(theirs.data.numpy().reshape(-1), ours["packed"].reshape(-1))
    assert np.array_equal(theirs.quant_state.absmax.numpy(), ours["absmax"])


@pytest.mark.parametrize("change", [{"block_size": 32}, {"quantized": ("mlp",)}, {"source": "bundled:smollm2-135m-instruct"}], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_jaxft_writes_the_base_where_it_does_not(format, change):
    config = dataclasses.replace(ModelConfig(source="owner/name", dtype="float32", quantization="nf4"), **change)
    found = adapter_command(pathlib.Path("adapter"), config, format, MODEL)
    code = found[found.index("    import") :]
    compile("\n".join(line[4:] for line in code.splitlines()), "printed", "exec")
    assert f'jaxft.load_pretrained("{config.source}", dtype="float32"' in code
    assert f'jaxft.Format("nf4", {config.block_size}, True), quantized={config.quantized!r})' in code
    assert f'AutoModelForCausalLM.from_pretrained("base"{", dtype=torch.float32" if format == "adapterhub" else ""})' in code
    assert "gguf_file" not in code


@pytest.mark.parametrize("source", ["encoder", "causal"])
def test_the_base_of_another_task_is_written_with_its_head(tmp_path, source, monkeypatch):
    """transformers, asked for 4 bits, would quantize the pooler and a head with a bias."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = {"encoder": (transformers.BertConfig, transformers.BertModel), "causal": (transformers.LlamaConfig, transformers.LlamaModel)}
    config, model = kind[source]
    model(config(**sizes)).save_pretrained(tmp_path / "source")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "source" / "tokenizer.json"))
    settings = {"labels": ("bad", "good"), "problem_type": "single_label_classification"}
    trained, _ = jaxft.load_pretrained(tmp_path / "source", task="sequence_classification", quantization=jaxft.Format(), **settings)
    given = ModelConfig(source=str(tmp_path / "source"), dtype="float32", quantization="nf4")
    found = adapter_command(pathlib.Path("adapter"), given, "peft", trained)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = [line.strip() for line in found[found.index("    import") :].splitlines()]
    exec("\n".join(line for line in code if "PeftModel.from_pretrained" not in line), names)
    assert names["base"].config.id2label == {0: "bad", 1: "good"}
    quantized = {name for name, module in names["base"].named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantized
    assert all("layer" in name for name in quantized)
    assert names["base"].config.quantization_config.bnb_4bit_compute_dtype == torch.float32


def test_an_adapter_of_adapterhub_has_the_type_of_its_four_bit_base():
    found = adapter_command(
        pathlib.Path("adapter"), ModelConfig(source="owner/name", dtype="bfloat16", quantization="nf4"), "adapterhub", MODEL
    )
    code = [line.strip() for line in found[found.index("    import") :].splitlines()]
    compile("\n".join(code), "printed", "exec")
    assert "import torch" in code
    assert "dtype=torch.bfloat16)" in found
    assert code[-1] == "base.adapter_to(name, dtype=base.dtype)"
    assert "torch" not in said("adapterhub")


@pytest.mark.parametrize("format", FORMATS)
def test_a_form_that_transformers_has_not_is_said(format):
    assert "transformers holds no kernels in int8" in said(format, quantization="int8")
    assert "this is the base whole" not in said(format)
