"""Export of model folders: what transformers makes of them, and what happens to the folder."""

import json
import os
import signal
import subprocess
import sys

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
from jaxft.hub import folder as folders


def _load_reference(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(info.values()), info
    return model.eval()


def _same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


@pytest.fixture
def loaded(tmp_path):
    """A model of jaxft with parameters."""
    make_model("llama").save_pretrained(tmp_path / "source")
    return jaxft.load_pretrained(tmp_path / "source")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_with_the_same_logits(name, folder, tmp_path):
    family, settings = MODELS[name]
    make_model(family, **settings).save_pretrained(tmp_path / "source")
    model, params = jaxft.load_pretrained(tmp_path / "source")
    params = jax.tree.map(lambda leaf: leaf * 1.25, params)
    jaxft.save_pretrained(folder, model, params)
    assert difference(model, params, _load_reference(folder)) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_loading_it_again_gives_the_same_model(name, folder, tmp_path):
    family, settings = MODELS[name]
    make_model(family, **settings).save_pretrained(tmp_path / "source")
    model, params = jaxft.load_pretrained(tmp_path / "source")
    jaxft.save_pretrained(folder, model, params)
    again, loaded = jaxft.load_pretrained(folder)
    assert _same(params, loaded)
    assert {**vars(again.config), "hf": ""} == {**vars(model.config), "hf": ""}


def test_a_gpt2_is_written_with_the_names_of_transformers(folder, tmp_path):
    make_model("gpt2", **GPT2).save_pretrained(tmp_path / "source")
    jaxft.save_pretrained(folder, *jaxft.load_pretrained(tmp_path / "source"))
    ours, theirs = (safetensors.numpy.load_file(place / "model.safetensors") for place in (folder, tmp_path / "source"))
    assert {name: value.tobytes() for name, value in ours.items()} == {name: value.tobytes() for name, value in theirs.items()}


@pytest.mark.parametrize(("kind", "factor"), [("default", None), ("linear", 4.0)])
def test_transformers_before_version_5_finds_the_rotary_base(kind, factor, tmp_path):
    config = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.rope_parameters = {"rope_theta": 54321.0, "rope_type": kind} | ({"factor": factor} if factor else {})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    jaxft.save_pretrained(tmp_path / "ours", *jaxft.load_pretrained(str(tmp_path / "theirs")))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "rope_parameters" not in written  # a key of version 5, which reads the older ones too
    assert written["rope_theta"] == 54321.0
    assert written["rope_scaling"] == ({"rope_type": kind, "factor": factor} if factor else None)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters == config.rope_parameters


def test_over_the_shard_size_it_is_sharded(loaded, folder):
    model, params = loaded
    jaxft.save_pretrained(folder, model, params, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert difference(model, params, _load_reference(folder)) <= TOLERANCE
    assert _same(params, jaxft.load_pretrained(folder)[1])


def test_bfloat16_is_kept(folder, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    model, params = jaxft.load_pretrained(tmp_path / "source", dtype="bfloat16")
    jaxft.save_pretrained(folder, model, params)
    assert _load_reference(folder).dtype == torch.bfloat16
    assert _same(params, jaxft.load_pretrained(folder, dtype="bfloat16")[1])


def test_parameters_of_mixed_types_lose_nothing(loaded, folder):
    model, params = loaded
    params = params | {"embed": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["embed"])}
    jaxft.save_pretrained(folder, model, params)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert np.array_equal(jaxft.load_pretrained(folder)[1]["norm"]["scale"], params["norm"]["scale"])


def test_layers_in_several_segments_are_one_model(loaded, folder):
    model, params = loaded
    split = jaxft.models.segments.regroup(params, lambda layer: layer > 0)
    assert list(split["layers"]) == ["0-0", "1-2"]
    jaxft.save_pretrained(folder, model, split)
    assert _same(params, jaxft.load_pretrained(folder)[1])


def test_generation_config_survives(tmp_path, folder):
    reference = make_model("llama")
    reference.generation_config.update(eos_token_id=[3, 5], temperature=0.6, do_sample=True)
    reference.save_pretrained(tmp_path / "source")
    model, params = jaxft.load_pretrained(tmp_path / "source")
    jaxft.save_pretrained(folder, model, params)
    written = transformers.GenerationConfig.from_pretrained(folder)
    assert (written.eos_token_id, written.temperature, written.do_sample) == ([3, 5], 0.6, True)


def test_card_is_written(loaded, folder):
    jaxft.save_pretrained(folder, *loaded, card="# Measured\n")
    assert (folder / "README.md").read_text() == "# Measured\n"


def test_a_method_must_be_merged_first(loaded, folder):
    model, params = loaded
    method = jaxft.methods.LoRA(rank=2)
    params = method.init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match=r"LoRAKernel.*method\.merge"):
        jaxft.save_pretrained(folder, model, params)
    jaxft.save_pretrained(folder, model, method.merge(model, params))


def test_our_own_folder_is_replaced(loaded, folder):
    model, params = loaded
    jaxft.save_pretrained(folder, model, params, max_shard_size="20KB")
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    jaxft.save_pretrained(folder, model, changed)
    assert not list(folder.glob("model-*"))
    assert _same(changed, jaxft.load_pretrained(folder)[1])
    assert os.listdir(folder.parent).count("model") == 1
    assert not list(folder.parent.glob(".model*"))


def test_an_empty_folder_is_taken(loaded, folder):
    folder.mkdir()
    jaxft.save_pretrained(folder, *loaded)
    assert (folder / "config.json").exists()


def test_somebody_elses_folder_is_left_alone(loaded, folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't empty, and jaxft didn't write it"):
        jaxft.save_pretrained(folder, *loaded)
    assert os.listdir(folder) == ["thesis.txt"]


def test_files_that_somebody_put_into_our_folder_are_left_alone(loaded, folder):
    jaxft.save_pretrained(folder, *loaded)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that jaxft didn't write: notes.txt. Move them"):
        jaxft.save_pretrained(folder, *loaded)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "config.json").exists()


def test_a_model_does_not_replace_an_adapter(loaded, folder):
    model, params = loaded
    method = jaxft.methods.LoRA(rank=2)
    jaxft.save_adapter(folder, model, method.init(jax.random.key(0), model, params), method)
    with pytest.raises(UserError, match=r"holds an adapter, which a model doesn't replace"):
        jaxft.save_pretrained(folder, model, params)
    assert (folder / "adapter_config.json").exists()


def test_a_file_in_its_place_is_left_alone(loaded, folder):
    folder.write_text("mine")
    with pytest.raises(UserError, match="is no folder"):
        jaxft.save_pretrained(folder, *loaded)


def test_a_full_disk_leaves_the_last_export(loaded, folder, tmp_path, full_disk):
    model, params = loaded
    jaxft.save_pretrained(folder, model, params)
    with full_disk(20_000), pytest.raises(UserError, match="disk is full"):
        jaxft.save_pretrained(folder, model, jax.tree.map(lambda leaf: leaf + 1, params))
    assert _same(params, jaxft.load_pretrained(folder)[1])
    assert sorted(os.listdir(tmp_path)) == ["model", "source"]


_KILLED = """
import os, pathlib, signal, sys
from jaxft.hub.folder import written

rename, count = pathlib.Path.rename, [0]

def killed(self, target):
    count[0] += 1
    if count[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

pathlib.Path.rename = killed
with written(pathlib.Path(sys.argv[1]), "model") as temporary:
    (temporary / "new").write_text("whole")
"""


@pytest.mark.parametrize("rename", [1, 2])  # of the old folder aside, of the new one into its place
def test_what_a_killed_export_left_is_mended_by_the_next_one(rename, folder, tmp_path):
    with folders.written(folder, "model") as temporary:
        (temporary / "old").write_text("whole")
    (tmp_path / ".model.original").mkdir()  # somebody else's
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(rename)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.exists() == (rename == 1)
    assert len(os.listdir(tmp_path)) > 2
    with pytest.raises(RuntimeError, match="not today"), folders.written(folder, "model"):
        raise RuntimeError("not today")
    assert sorted(os.listdir(tmp_path)) == [".model.original", "model"]
    assert (folder / "old").exists()


def test_what_is_being_written_is_left_alone(folder, tmp_path):
    with folders.written(folder, "model") as first:
        with folders.written(folder, "model") as second:
            assert first.exists()
            assert second.exists()
        assert first.exists()


def test_numbers_that_differ_when_read_back_are_not_handed_over(loaded, folder, monkeypatch):
    monkeypatch.setattr(folders, "same_bits", lambda one, other: False)
    with pytest.raises(UserError, match="read back has other numbers"):
        jaxft.save_pretrained(folder, *loaded)
    assert not folder.exists()


def test_same_bits_tells_zeros_and_nans_apart():
    assert folders.same_bits(np.float32([np.nan]), np.float32([np.nan]))
    assert not folders.same_bits(np.float32([0.0]), np.float32([-0.0]))
    assert not folders.same_bits(np.float32([0.0]), np.int32([0]))


def test_others_may_read_it_as_the_umask_says(loaded, folder):
    old = os.umask(0o022)
    try:
        jaxft.save_pretrained(folder, *loaded)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755
