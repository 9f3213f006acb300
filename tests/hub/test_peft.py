"""LoRA adapters between jaxft and peft, both ways."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import TOLERANCE, difference, make_model
from tiny_models import load, make_reference

import jaxft
from jaxft.errors import UserError
from jaxft.hub import peft_lora_config
from jaxft.models.node import is_node

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {  # settings of peft.LoraConfig
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": EVERY},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "head": {"r": 2, "lora_alpha": 3, "target_modules": ["lm_head", "down_proj"]},
    "expression": {"r": 3, "lora_alpha": 8, "target_modules": r".*\.layers\.[12]\.(mlp\.up_proj|self_attn\.k_proj)"},
    "ranks": {"r": 4, "lora_alpha": 6, "target_modules": EVERY, "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    "alphas": {"r": 4, "lora_alpha": 6, "target_modules": EVERY, "alpha_pattern": {"^model.layers.2.mlp.down_proj": 32, "v_proj": 2.5}},
    "both": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": EVERY,
        "rank_pattern": {r"layers\.0\..*": 3},
        "alpha_pattern": {r".*\.[12]\.self_attn\.q_proj": 1},
    },
    "layers": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "exclude_modules": [r"layers.1.self_attn.q_proj"]},
    "full names": {"r": 4, "lora_alpha": 6, "target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj"]},
    "dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
}
OURS = {  # settings of jaxft's LoRA
    "default": {},
    "alpha": {"rank": 3, "alpha": 7.5, "targets": ("q_proj", "down_proj")},
    "rslora": {"rank": 3, "alpha": 7.0, "rslora": True},
    "layers": {"rank": 2, "targets": ("layers/[12]/attention",)},
    "head": {"rank": 2, "alpha": 2.0, "targets": ("layers", "lm_head")},  # at alpha 16 logits are in the hundreds, beyond 1e-4 in float32
    "ranks": {"rank": 4, "rank_pattern": (("layers/0", 2), ("k_proj", 1)), "alpha_pattern": (("up_proj", 3.0), ("layers/2/mlp", 5.0))},
    "dropout": {"rank": 4, "dropout": 0.25},
}


@pytest.fixture
def base(tmp_path):
    """The reference, and the same model of jaxft with parameters."""
    reference = make_model("llama", attention_bias=True)
    reference.save_pretrained(tmp_path / "base")
    return reference, *jaxft.load_pretrained(tmp_path / "base")


def _peft_model(reference, **settings):
    torch.manual_seed(1)
    model = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def _load_in_peft(reference, folder):
    """peft only warns of keys and weights that it doesn't expect; here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(reference, folder).eval()


def _trained(method, model, params):
    """The method's parameters, with lora_b random."""
    params = method.init(jax.random.key(1), model, params)

    def moved(leaf, trains):
        return leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape) if trains else leaf

    return jax.tree.map(moved, params, method.mask(params))


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_give_its_logits(name, base, folder):
    reference, model, params = base
    tuned = _peft_model(reference, **PEFT[name])
    tuned.save_pretrained(folder)
    params, method = jaxft.load_adapter(folder, model, params)
    assert difference(model, params, tuned) <= TOLERANCE
    assert difference(model, method.merge(model, params), tuned) <= TOLERANCE


@pytest.mark.parametrize("name", PEFT)
def test_the_method_that_is_returned_gives_the_same_structure(name, base, folder):
    reference, model, params = base
    _peft_model(reference, **PEFT[name]).save_pretrained(folder)
    loaded, method = jaxft.load_adapter(folder, model, params)
    fresh = method.init(jax.random.key(3), model, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    assert jax.tree.all(jax.tree.map(lambda one, other: one.shape == other.shape, loaded, fresh))
    frozen, same = (jaxft.partition(tree, method.mask(tree))[1] for tree in (loaded, fresh))
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, same))


@pytest.mark.parametrize("name", PEFT)
def test_written_again_it_holds_the_same_bytes(name, base, folder, tmp_path):
    reference, model, params = base
    tuned = _peft_model(reference, **PEFT[name])
    tuned.save_pretrained(folder)
    params, method = jaxft.load_adapter(folder, model, params)
    jaxft.save_adapter(tmp_path / "again", model, params, method, base_model="owner/base")
    first, again = (safetensors.numpy.load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}
    assert difference(model, params, _load_in_peft(tuned.unload(), tmp_path / "again")) <= TOLERANCE


@pytest.mark.parametrize("name", OURS)
def test_peft_gives_our_logits(name, base, folder):
    reference, model, params = base
    method = jaxft.methods.LoRA(**OURS[name])
    params = _trained(method, model, params)
    jaxft.save_adapter(folder, model, params, method, base_model="owner/base")
    tuned = _load_in_peft(reference, folder).double()  # what float32 rounds on their side isn't ours
    try:
        assert difference(model, params, tuned) <= TOLERANCE
    finally:
        reference.float()


@pytest.mark.parametrize("name", OURS)
def test_our_own_adapters_come_back_bit_for_bit(name, base, folder):
    _, model, params = base
    method = jaxft.methods.LoRA(**OURS[name])
    tuned = _trained(method, model, params)
    jaxft.save_adapter(folder, model, tuned, method)
    back, _ = jaxft.load_adapter(folder, model, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, tuned, back))


def test_the_configuration_has_the_keys_that_peft_writes(base, folder, tmp_path):
    reference, model, params = base
    method = jaxft.methods.LoRA(rank=4, alpha=16.0, targets=("q_proj",))
    jaxft.save_adapter(folder, model, method.init(jax.random.key(0), model, params), method, base_model="owner/base")
    _peft_model(reference, r=4, lora_alpha=16, target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    ours, theirs = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "peft"))
    assert ours == theirs | {"base_model_name_or_path": "owner/base", "peft_version": peft_lora_config.VERSION}


def test_the_file_is_marked_as_peft_marks_it(base, folder):
    _, model, params = base
    method = jaxft.methods.LoRA(rank=2)
    jaxft.save_adapter(folder, model, method.init(jax.random.key(0), model, params), method)
    with safetensors.safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_adapter_on_a_bfloat16_base_stays_float32(base, folder, tmp_path):
    _, model, params = base
    method = jaxft.methods.LoRA(rank=2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tuned = _trained(method, model, half)
    jaxft.save_adapter(folder, model, tuned, method)
    back, _ = jaxft.load_adapter(folder, model, half)
    assert jax.tree.all(jax.tree.map(lambda one, other: one.dtype == other.dtype and np.array_equal(one, other), tuned, back))


def _edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def _pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "dora": (lambda folder: _edit_config(folder, use_dora=True), "lacks .*lora_magnitude_vector"),
    "bias": (lambda folder: _edit_config(folder, bias="lora_only"), r"lacks .*q_proj\.base_layer\.bias"),
    "lora_bias": (lambda folder: _edit_config(folder, lora_bias=True), r"lacks .*q_proj\.lora_B\.bias"),
    "modules": (lambda folder: _edit_config(folder, modules_to_save=["lm_head"]), r"lacks base_model\.model\.lm_head\.weight"),
    "no module": (lambda folder: _edit_config(folder, modules_to_save=["score"]), "no module is called 'score'"),
    "replication": (lambda folder: _edit_config(folder, layer_replication=[[0, 2]]), "layer_replication is"),
    "tokens": (lambda folder: _edit_config(folder, trainable_token_indices=[1]), "trainable_token_indices is"),
    "pissa": (lambda folder: _edit_config(folder, init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "unknown": (lambda folder: _edit_config(folder, use_rsloro=True), "doesn't know, 'use_rsloro'. Did you mean 'use_rslora'"),
    "type": (lambda folder: _edit_config(folder, peft_type="POLY"), "peft_type is 'POLY'"),
    "task": (lambda folder: _edit_config(folder, task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "targets": (lambda folder: _edit_config(folder, target_modules=["query"]), r"choose none.*layers\.N\.self_attn\.q_proj"),
    "more targets": (lambda folder: _edit_config(folder, target_modules=["q_proj", "k_proj"]), r"lacks .*k_proj\.lora_A"),
    "fewer targets": (lambda folder: _edit_config(folder, target_modules=["layers.1.self_attn.q_proj"]), r"no place for: .*lora_A"),
    "expression": (lambda folder: _edit_config(folder, target_modules="q_proj("), "no regular expression"),
    "rank": (lambda folder: _edit_config(folder, r="4"), "r is '4'"),
    "missing": (lambda folder: _edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != FIRST}), "lacks " + FIRST),
    "left over": (lambda folder: _edit_tensors(folder, lambda t: t | {"more": np.ones(1, np.float32)}), "no place for: more"),
    "shape": (lambda folder: _edit_tensors(folder, lambda t: t | {FIRST: np.ones((4, 9), np.float32)}), r"\(4, 9\) for \(4, 32\)"),
    "other rank": (lambda folder: _edit_config(folder, r=5), r"\(4, 32\) for \(5, 32\)"),
    "not a number": (lambda folder: _edit_tensors(folder, lambda t: t | {FIRST: t[FIRST] * np.nan}), r"q_proj/kernel/lora_a has .* finite"),
    "pickle": (_pickled, r"pickle file,.*PeftModel\.from_pretrained\(BASE, FOLDER\)\.save_pretrained"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it is no adapter of PEFT or AdapterHub"),
    "truncated": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 30), "no whole safetensors file"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_gives_one_clear_message(fault, base, folder):
    reference, model, params = base
    _peft_model(reference, r=4, target_modules=["q_proj"]).save_pretrained(folder)
    breaks, message = BROKEN[fault]
    breaks(folder)
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(folder, model, params)


def test_another_head_beside_an_adapter_of_the_head_is_refused(base, folder):
    reference, model, params = base
    _peft_model(reference, r=4, target_modules=["lm_head"]).save_pretrained(folder)
    name = "base_model.model.lm_head.base_layer.weight"
    _edit_tensors(folder, lambda tensors: tensors | {name: tensors[name] + 1})
    with pytest.raises(UserError, match="isn't this model's lm_head.weight"):
        jaxft.load_adapter(folder, model, params)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_peft_writes_beside_an_adapter_are_those_of_the_base(tied, folder):
    reference = make_reference("llama", tie_word_embeddings=tied)
    model, params = load(reference)
    _peft_model(reference, r=4, target_modules=["q_proj"]).save_pretrained(folder, save_embedding_layers=True)
    names = {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
    assert names <= safetensors.numpy.load_file(folder / "adapter_model.safetensors").keys()
    tuned, method = jaxft.load_adapter(folder, model, params)
    shutil.rmtree(folder)
    jaxft.save_adapter(folder, model, tuned, method)
    assert not names & safetensors.numpy.load_file(folder / "adapter_model.safetensors").keys()
    _peft_model(reference, r=4, target_modules=["q_proj"]).save_pretrained(folder, save_embedding_layers=True)
    for name in names:
        _edit_tensors(folder, lambda tensors, name=name: tensors | {name: tensors[name] + 1})
        with pytest.raises(UserError, match=r"weight isn't this model's (model.embed_tokens|lm_head).weight"):
            jaxft.load_adapter(folder, model, params)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}])
def test_an_adapter_of_a_head_that_is_the_embedding_is_refused(settings, folder):
    reference = make_reference("llama", tie_word_embeddings=True)
    model, params = load(reference)
    _peft_model(reference, r=4, **settings).save_pretrained(folder)
    with pytest.raises(UserError, match=r"lm_head\..* is of the output head, which is the table of words .* without ensure_weight_tying"):
        jaxft.load_adapter(folder, model, params)


def test_options_of_newer_versions_that_are_off_are_passed_over(base, folder):
    reference, model, params = base
    _peft_model(reference, r=4, target_modules=["q_proj"]).save_pretrained(folder)
    _edit_config(folder, use_something_new=False, something_config=None)
    jaxft.load_adapter(folder, model, params)


def test_an_adapter_of_another_base_is_refused(base, folder, tmp_path):
    make_model("llama", hidden_size=48).save_pretrained(tmp_path / "other")
    _peft_model(base[0], r=4, target_modules=["q_proj"]).save_pretrained(folder)
    with pytest.raises(UserError, match="another base model"):
        jaxft.load_adapter(folder, *jaxft.load_pretrained(tmp_path / "other"))


def test_an_adapter_on_top_of_another_is_refused(base, folder):
    reference, model, params = base
    _peft_model(reference, r=4, target_modules=["q_proj"]).save_pretrained(folder)
    params, _ = jaxft.load_adapter(folder, model, params)
    with pytest.raises(UserError, match="hold LoRA at layers/0/attention/.* already"):
        jaxft.load_adapter(folder, model, params)


@pytest.mark.parametrize(
    ("other", "message"), [({"rank": 5}, "rank 2 and scale"), ({"rank": 2, "alpha": 1.0}, "this method gives it rank 2 and scale 0.5")]
)
def test_saving_with_another_method_is_refused(other, message, base, folder):
    _, model, params = base
    params = jaxft.methods.LoRA(rank=2).init(jax.random.key(0), model, params)
    with pytest.raises(UserError, match=message):
        jaxft.save_adapter(folder, model, params, jaxft.methods.LoRA(**other))
    assert not folder.exists()


def test_saving_without_an_adapter_is_refused(base, folder):
    _, model, params = base
    with pytest.raises(UserError, match="hold no LoRA"):
        jaxft.save_adapter(folder, model, params, jaxft.methods.LoRA())


def test_somebody_elses_folder_is_left_alone(base, folder):
    _, model, params = base
    folder.mkdir()
    (folder / "notes").write_text("mine")
    method = jaxft.methods.LoRA(rank=2)
    with pytest.raises(UserError, match="isn't empty"):
        jaxft.save_adapter(folder, model, method.init(jax.random.key(0), model, params), method)


def test_a_full_disk_leaves_the_last_adapter(base, folder, full_disk):
    _, model, params = base
    method = jaxft.methods.LoRA(rank=4)
    tuned = _trained(method, model, params)
    jaxft.save_adapter(folder, model, tuned, method)
    with full_disk(5_000), pytest.raises(UserError, match="disk is full"):
        jaxft.save_adapter(folder, model, _trained(method, model, jax.tree.map(jnp.zeros_like, params)), method)
    back, _ = jaxft.load_adapter(folder, model, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, tuned, back))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["base", "model"]


@pytest.mark.slow
def test_an_adapter_of_the_bundled_model_in_peft(tmp_path):
    model, params = jaxft.load_pretrained("bundled:smollm2-135m-instruct")
    method = jaxft.methods.LoRA(rank=4)
    jaxft.save_pretrained(tmp_path / "base", model, params)
    fresh = method.init(jax.random.key(0), model, params)
    tuned = jax.tree.map(lambda leaf, trains: leaf + 0.003 if trains else leaf, fresh, method.mask(fresh))
    jaxft.save_adapter(tmp_path / "adapter", model, tuned, method)
    jaxft.save_pretrained(tmp_path / "merged", model, method.merge(model, tuned))
    ids = np.arange(100, 124, dtype=np.int32)[None]
    ours = np.asarray(model.apply({"params": tuned}, ids).logits)
    load = transformers.AutoModelForCausalLM.from_pretrained
    for theirs in (load(tmp_path / "merged"), _load_in_peft(load(tmp_path / "base"), tmp_path / "adapter")):
        with torch.no_grad():
            logits = theirs.double()(torch.tensor(ids)).logits  # its own float32 rounding, at logits of 20, isn't ours
            assert np.abs(logits.numpy() - ours).max() <= TOLERANCE


def test_nothing_but_the_adapter_is_written(base, folder):
    _, model, params = base
    method = jaxft.methods.LoRA(rank=2)
    tuned = method.init(jax.random.key(0), model, params)
    jaxft.save_adapter(folder, model, tuned, method, card="# Card")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "jaxft.json"]
    kernels = sum(len(leaf.layers) for leaf in jaxft.models.segments.leaves(tuned, is_leaf=is_node) if is_node(leaf.value))
    assert len(safetensors.numpy.load_file(folder / "adapter_model.safetensors")) == 2 * kernels == 2 * 7 * 3
