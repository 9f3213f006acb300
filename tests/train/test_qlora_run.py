"""qlora_llama2 as it comes, with moments in 8 bits: LoftQ's start, training, a stop, and both exports in the reference libraries."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import stopped_runs
import torch
import transformers
from four_bit_models import KINDS, by_transformers

import experiments
import jaxft
from jaxft import overrides
from jaxft.models.node import is_quantized
from jaxft.train import run
from jaxft.train.moments import is_8bit
from jaxft.train.setup import set_up

STEPS = 6
IDS = np.random.default_rng(1).integers(5, 300, (2, 17))

pytestmark = pytest.mark.usefixtures("as_launched")


@pytest.fixture(scope="module")
def model(material, tmp_path_factory):
    """A tiny Llama whose rows are whole blocks, as bitsandbytes needs them, with the material's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(material, model):
    """qlora_llama2 on tiny material: a rank at which some moments are large enough for 8 bits, and alpha other than the rank."""
    flags = {
        **{"model.source": model, "data.train": material / "rows.jsonl", "data.test": "", "data.split": "0.8,0.1,0.1"},
        **{"data.system": "", "data.prompt": "", "data.completion": "", "data.max_length": 64, "data.cache": "false"},
        **{"train.steps": STEPS, "train.batch_size": 4, "train.checkpoint_every": 2, "eval.generate": "false"},
        **{"optimizer.moments": "int8", "optimizer.learning_rate": 1e-2, "method.rank": 32, "method.alpha": 24.0},
    }
    return overrides.parse_flags(experiments.load("qlora_llama2"), [f"--config.{name}={value}" for name, value in flags.items()])


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory, as_launched):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run")
    run.train(recipe, folder)
    return folder


def test_it_holds_its_base_in_4_bits_and_its_moments_in_8(recipe, trained):
    setup = set_up(recipe)
    kernels = [leaf for leaf in jax.tree.leaves(setup.frozen, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == 7  # of all layers together: four of attention, three of the feed-forward part
    held = [leaf for leaf in jax.tree.leaves(setup.state.optimizer, is_leaf=is_8bit) if is_8bit(leaf)]
    assert {leaf.codes.shape for leaf in held} == {(2, 32, 128), (2, 128, 32)}
    assert all(leaf.codes.dtype == np.uint8 for leaf in held)


def test_it_learns(trained):
    measured = json.loads((trained / "summary.json").read_text())["eval"]
    assert measured["after"]["loss"] < measured["before"]["loss"] - 0.1


def test_stopped_and_started_again_it_ends_with_the_same_bytes(recipe, trained, tmp_path, monkeypatch):
    stopped_runs.stop_at(monkeypatch, 3)
    run.train(recipe, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    run.train(recipe, tmp_path)
    adapter = "export/peft/adapter_model.safetensors"
    assert (tmp_path / adapter).read_bytes() == (trained / adapter).read_bytes()


def test_in_bfloat16_it_learns_the_same(recipe, trained, tmp_path):
    rounded = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="bfloat16"))
    run.train(rounded, tmp_path)
    expected, found = ([line["loss"] for line in map(json.loads, lines_of(folder)) if "loss" in line] for folder in (trained, tmp_path))
    assert expected != found
    np.testing.assert_allclose(found, expected, rtol=0.02)  # 8 bits of mantissa through two layers
    adapter = safetensors.numpy.load_file(tmp_path / "export" / "peft" / "adapter_model.safetensors")
    assert {leaf.dtype for leaf in adapter.values()} == {np.dtype("float32")}
    run.export(rounded, tmp_path, "hf", tmp_path / "merged")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_its_adapter_in_peft_its_merged_folder_in_transformers_and_ours_agree(recipe, trained, model, tmp_path):
    run.export(recipe, trained, "hf", tmp_path / "merged")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, **KINDS["nf4, double"])
    base = by_transformers(model, quantization_config=four_bits)
    merged = by_transformers(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    tokens = torch.tensor(IDS)
    ours, params = jaxft.load_pretrained(model, quantization=jaxft.Format())
    params, _ = jaxft.load_adapter(trained / "export" / "peft", ours, params)
    expected = np.asarray(ours.apply({"params": params}, IDS).logits)
    with torch.no_grad():
        plain = base(tokens).logits
        tuned = peft.PeftModel.from_pretrained(base, trained / "export" / "peft").eval()(tokens).logits
        assert (tuned - plain).abs().max() > 1e-2
        assert np.abs(tuned.numpy() - expected).max() <= 1e-4
        assert np.abs(merged(tokens).logits.numpy() - expected).max() <= 1e-4
