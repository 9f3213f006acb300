"""Folders of 4-bit weights, both ways, against transformers and bitsandbytes."""

import json
import shutil

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from four_bit_models import FORMATS, KINDS, by_transformers, dense, our_logits, ready_made, their_logits
from tiny_models import load, make_reference

import jaxft
from jaxft.config import TrainConfig
from jaxft.errors import UserError, UserNote
from jaxft.hub.load import describe_pretrained
from jaxft.models import segments
from jaxft.models.node import is_node, is_quantized
from jaxft.train import placement

TOLERANCE = 1e-4  # float32 on both sides, logits of order 5
UP = "model.layers.1.mlp.up_proj.weight"


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(jax.tree.map(np.array_equal, one, other))


def tensors(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in safetensors.numpy.load_file(file).items()}


def quantized_names(params):
    return {name for leaf in segments.leaves(params, is_leaf=is_node) if is_quantized(leaf.value) for name in leaf.names}


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_has_their_logits_here(kind):
    expected = their_logits(by_transformers(ready_made(kind)))
    assert np.abs(expected - their_logits(by_transformers(dense()))).max() > 0.1
    model, params = jaxft.load_pretrained(ready_made(kind))
    assert np.abs(our_logits(model, params) - expected).max() <= TOLERANCE


def test_what_they_left_is_left_here_layer_by_layer():
    _, params = jaxft.load_pretrained(ready_made("some left"))
    assert list(params["layers"]) == ["0-0", "1-1"]
    projections = {"attention": ("q_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    expected = {f"layers/{i}/{part}/{name}/kernel" for i in (0, 1) for part, names in projections.items() for name in names}
    assert quantized_names(params) == {name for name in expected if not name.startswith("layers/0/mlp")}


@pytest.mark.parametrize("kind", FORMATS)
def test_quantizing_the_original_gives_their_bits(kind):
    _, theirs = jaxft.load_pretrained(ready_made(kind))
    _, ours = jaxft.load_pretrained(dense(), quantization=FORMATS[kind])
    assert same(ours, theirs)


@pytest.mark.parametrize("kind", FORMATS)
def test_ours_is_the_folder_that_transformers_saves(kind, folder):
    model, params = jaxft.load_pretrained(dense(), quantization=FORMATS[kind])
    jaxft.save_pretrained(folder, model, params, format="bitsandbytes")
    expected, found = tensors(ready_made(kind)), tensors(folder)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if "quant_state" in name:
            assert json.loads(array.tobytes()) == json.loads(found[name].tobytes())
        else:
            assert (array.dtype, array.shape, array.tobytes()) == (found[name].dtype, found[name].shape, found[name].tobytes())
    config, theirs = (json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, ready_made(kind)))
    assert config == theirs | {"llm_int8_skip_modules": ["lm_head"]}


def test_ours_loads_in_transformers_with_equal_weights_and_logits(folder):
    model, params = jaxft.load_pretrained(dense(), quantization=jaxft.Format(), quantized=("attention", "layers/1/mlp"))
    jaxft.save_pretrained(folder, model, params, format="bitsandbytes", max_shard_size="20KB")
    assert len(list(folder.glob("model-*"))) > 2
    loaded = by_transformers(folder)
    kernel = segments.layer_slice(params, range(1, 2))["mlp"]["up_proj"]["kernel"]
    theirs = loaded.model.layers[1].mlp.up_proj
    assert isinstance(theirs, bitsandbytes.nn.Linear4bit)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert not isinstance(loaded.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    weight = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state).numpy()
    assert np.array_equal(weight.T, np.asarray(kernel.dense())[0])
    assert np.abs(their_logits(loaded) - our_logits(model, params)).max() <= TOLERANCE
    assert same(jaxft.load_pretrained(folder)[1], params)


def test_tied_embeddings_stay_dense_and_other_block_sizes_are_read(folder, tmp_path):
    make_reference("llama", tie_word_embeddings=True, hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    model, params = jaxft.load_pretrained(tmp_path, quantization=jaxft.Format(block_size=32))
    jaxft.save_pretrained(folder, model, params, format="bitsandbytes")
    assert np.abs(their_logits(by_transformers(folder)) - our_logits(model, params)).max() <= TOLERANCE
    assert same(jaxft.load_pretrained(folder)[1], params)


def test_a_quantized_model_is_written_whole_too(folder):
    model, params = jaxft.load_pretrained(dense(), quantization=jaxft.Format())
    jaxft.save_pretrained(folder, model, params)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert np.abs(their_logits(by_transformers(folder)) - our_logits(model, params)).max() <= TOLERANCE


def test_half_precision_is_quantized_as_transformers_does(folder):
    model, params = jaxft.load_pretrained(dense(), dtype="bfloat16", quantization=jaxft.Format())
    kernel = params["layers"]["0-1"]["mlp"]["up_proj"]["kernel"]
    weight = torch.tensor(tensors(dense())[UP]).to(torch.bfloat16)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert np.array_equal(np.asarray(kernel.codes[1]).reshape(-1), codes.numpy().reshape(-1))
    assert np.array_equal(np.asarray(kernel.scales[1]).reshape(-1), state.absmax.numpy())
    assert kernel.dtype == jnp.bfloat16
    jaxft.save_pretrained(folder, model, params, format="bitsandbytes")
    assert same(jaxft.load_pretrained(folder, dtype="bfloat16")[1], params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_alone_describes_it(kind):
    _, params = jaxft.load_pretrained(ready_made(kind))
    _, shapes = describe_pretrained(ready_made(kind))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda leaf, like: (leaf.shape, leaf.dtype) == (like.shape, like.dtype), params, shapes))


def test_devices_share_a_quantized_model():
    mesh = placement.make_mesh(TrainConfig(batch_size=2, data_parallel=1, fsdp_parallel=2))
    _, whole = jaxft.load_pretrained(dense(), quantization=jaxft.Format())
    _, shared = jaxft.load_pretrained(
        dense(), quantization=jaxft.Format(), placing=lambda shapes, table: placement.shardings(shapes, table, mesh)
    )
    assert same(whole, shared)
    codes = shared["layers"]["0-1"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.nbytes == codes.nbytes // 2


def test_kernels_are_quantized_anew_where_a_model_is_whole():
    model, params = jaxft.load_pretrained(dense())
    found = jaxft.quantized(params, jaxft.Format(), ("mlp",))
    assert quantized_names(found) == {f"layers/{i}/mlp/{name}_proj/kernel" for i in (0, 1) for name in ("gate", "up", "down")}
    assert same(found, jaxft.load_pretrained(dense(), quantization=jaxft.Format(), quantized=("mlp",))[1])
    assert jaxft.quantized(params, None) is params
    assert np.isfinite(our_logits(model, found)).all()


@pytest.fixture
def copy(tmp_path):
    """A copy of a ready-made folder, to be broken."""
    shutil.copytree(ready_made("nf4, double"), tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "8-bit weights of bitsandbytes"),
        ({"quant_method": "gptq"}, r"quantized \(gptq\)"),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ({"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type is 'nf5'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"bnb_4bit_quant_typ": "nf4"}, "Did you mean 'bnb_4bit_quant_type'"),
        ({"llm_int8_skip_modules": "lm_head"}, "not a list of names"),
    ],
)
def test_what_a_configuration_has_that_is_not_read_is_named(changes, words, copy):
    change_config(copy, **changes)
    for read in (jaxft.load_pretrained, describe_pretrained):
        with pytest.raises(UserError, match=words):
            read(copy)


def state_of(found, **changes):
    name = f"{UP}.quant_state.bitsandbytes__nf4"
    state = json.loads(found[name].tobytes()) | changes
    return {name: np.frombuffer(json.dumps({key: value for key, value in state.items() if value is not None}).encode(), np.uint8)}


BREAKS = {
    "absmax lost": (lambda found: {f"{UP}.absmax": None}, f"it lacks {UP}.absmax"),
    "state lost": (lambda found: {f"{UP}.quant_state.bitsandbytes__nf4": None}, "it lacks the quant_state of"),
    "nested scales lost": (lambda found: {f"{UP}.nested_absmax": None}, "nested_absmax"),
    "codes lost": (lambda found: {UP: found[UP][:-1]}, r"shapes aren't those of the quant_state: .*up_proj.weight \(4095, 1\)"),
    "another shape": (lambda found: state_of(found, shape=[64, 128]), r"shapes differ from the configuration's"),
    "another block": (lambda found: state_of(found, blocksize=128), "shapes aren't those of the quant_state"),
    "an odd block": (lambda found: state_of(found, blocksize=65), "blocksize is 65, not 32 or 64"),
    "a key too many": (lambda found: state_of(found, colour="red"), "a key that jaxft doesn't know, 'colour'"),
    "a key too few": (lambda found: state_of(found, dtype=None), "isn't what bitsandbytes writes .'dtype'"),
    "no JSON": (lambda found: {f"{UP}.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}, "isn't what bitsandbytes writes"),
    "another code book": (lambda found: {f"{UP}.quant_map": found[f"{UP}.quant_map"] + 1}, "another code book"),
    "scales of another type": (lambda found: {f"{UP}.absmax": found[f"{UP}.absmax"].astype(np.float32)}, "absmax' is float32"),
    "a tensor too many": (lambda found: {f"{UP}.colour": np.zeros(3, np.float32)}, "no place for: .*colour"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_gets_one_message(name, copy):
    change, words = BREAKS[name]
    found = tensors(copy)
    changed = {name: array for name, array in (found | change(found)).items() if array is not None}
    safetensors.numpy.save_file(changed, copy / "model.safetensors")
    with pytest.raises(UserError, match=words):
        jaxft.load_pretrained(copy)


def test_a_quantized_folder_is_not_quantized_otherwise():
    jaxft.load_pretrained(ready_made("nf4, double"), quantization=jaxft.Format())
    for read in (jaxft.load_pretrained, describe_pretrained):
        with pytest.raises(UserError, match=r"is quantized already.*nf4, blocks of 64, with double.*not fp4"):
            read(ready_made("nf4, double"), quantization=jaxft.Format("fp4"))


def test_patterns_that_match_nothing_are_named():
    for read in (jaxft.load_pretrained, describe_pretrained):
        with pytest.raises(UserError, match=r"config.model.quantized: the pattern 'upproj' matches nothing"):
            read(dense(), quantization=jaxft.Format(), quantized=("upproj",))


def test_what_bitsandbytes_has_not_is_not_written(folder):
    model, params = jaxft.load_pretrained(dense())
    with pytest.raises(UserError, match="None of these parameters is quantized"):
        jaxft.save_pretrained(folder, model, params, format="bitsandbytes")
    with pytest.raises(UserError, match="this model is in int8"):
        jaxft.save_pretrained(folder, model, jaxft.quantized(params, jaxft.Format("int8")), format="bitsandbytes")
    with pytest.raises(UserError, match="Did you mean 'bitsandbytes'"):
        jaxft.save_pretrained(folder, model, params, format="bitsandbyte")
    assert not folder.exists()


def test_blocks_of_another_size_are_described_as_they_are_asked_for(folder):
    format = jaxft.Format(block_size=128)
    jaxft.save_pretrained(folder, *jaxft.load_pretrained(dense(), quantization=format), format="bitsandbytes")
    _, params = jaxft.load_pretrained(folder, quantization=format)
    _, shapes = describe_pretrained(folder, quantization=format)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(("width", "remedy"), [(96, "Blocks of 32 fill these rows"), (80, "Leave them out of what is quantized")])
def test_rows_that_are_not_whole_blocks_are_told_where_they_are_written(width, remedy, folder):
    model, params = load(make_reference("llama", hidden_size=64, intermediate_size=width), quantization=jaxft.Format())
    told = rf"can't compute on a CPU that has AVX-512 with .*down_proj.*of {width} values in the first, aren't whole blocks of 64.*{remedy}"
    with pytest.warns(UserNote, match=told):
        jaxft.save_pretrained(folder, model, params, format="bitsandbytes")
    rows, state = bitsandbytes.functional.quantize_4bit(torch.randn(64, width), blocksize=64, quant_type="nf4")
    by_rows = bitsandbytes.functional.dequantize_4bit(rows, state)
    state.shape = torch.Size((1, 64 * width))
    right = torch.equal(by_rows.flatten(), bitsandbytes.functional.dequantize_4bit(rows, state).flatten())  # by this machine
    assert (np.abs(their_logits(by_transformers(folder)) - our_logits(model, params)).max() < 1e-4) == right


def test_what_can_not_be_quantized_as_asked_is_refused():
    model, params = jaxft.load_pretrained(dense(), quantization=jaxft.Format())
    with pytest.raises(UserError, match="is in nf4, blocks of 64, with double quantization, not int8"):
        jaxft.quantized(params, jaxft.Format("int8"))
    tuned = jaxft.methods.LoRA(rank=2).init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match=r"holds LoRAKernel, a method's. Quantize the base first"):
        jaxft.quantized(tuned, jaxft.Format())
    for read in (jaxft.load_pretrained, describe_pretrained):
        with pytest.raises(UserError, match="quantization is a jaxft.Format or None, not 'nf4'"):
            read(dense(), quantization="nf4")
    with pytest.raises(UserError, match="A block size is one of"):
        jaxft.Format(block_size=64.0)
