"""Values of somebody's adapter_config.json that are of no use: one message each, with the file and its key."""

import json
import shutil

import jax
import pytest
from method_checks import base

import jaxft
from jaxft.errors import UserError
from jaxft.hub import adapter_keys
from jaxft.hub.adapterhub import _DEFAULTS, _WITHOUT_EFFECT
from jaxft.methods import IA3, AdaLoRA, Bottleneck, LoRA, NormTuning, Prefix, PTuning, SparseMask, VeRA

METHODS = {
    "LORA": LoRA(rank=2),
    "ADALORA": AdaLoRA(init_rank=3, target_rank=2),
    "IA3": IA3(),
    "VERA": VeRA(rank=4),
    "SHIRA": SparseMask(rank=1),
    "LN_TUNING": NormTuning(),
    "PREFIX_TUNING": Prefix(virtual_tokens=3),
    "P_TUNING": PTuning(virtual_tokens=3),
    "adapterhub": Bottleneck(size=2),
}
WRONG = [
    ("LORA", "r", None),
    ("LORA", "r", "8"),
    ("LORA", "r", 0),
    ("LORA", "r", True),
    ("LORA", "lora_alpha", None),
    ("LORA", "lora_alpha", "16"),
    ("LORA", "lora_alpha", 0),
    ("LORA", "lora_dropout", "x"),
    ("LORA", "lora_dropout", 1.5),
    ("LORA", "bias", 3),
    ("LORA", "bias", ["none"]),
    ("LORA", "use_rslora", "yes"),
    ("LORA", "layers_to_transform", "1"),
    ("LORA", "layers_to_transform", [0, "1"]),
    ("LORA", "layers_pattern", ["("]),
    ("LORA", "layers_pattern", 3),
    ("LORA", "peft_type", ["LORA"]),
    ("LORA", "peft_type", None),
    ("LORA", "rank_pattern", [4]),
    ("LORA", "rank_pattern", {"q_proj": "4"}),
    ("LORA", "rank_pattern", {"(": 4}),
    ("LORA", "alpha_pattern", {"q_proj": None}),
    ("LORA", "target_modules", "q_proj("),
    ("LORA", "target_modules", [3]),
    ("LORA", "target_modules", {"q_proj": 1}),
    ("LORA", "exclude_modules", "*"),
    ("LORA", "modules_to_save", "lm_head"),
    ("LORA", "init_lora_weights", [1]),
    ("ADALORA", "init_r", None),
    ("ADALORA", "target_r", "8"),
    ("ADALORA", "target_r", 4),
    ("ADALORA", "beta1", 1.0),
    ("ADALORA", "deltaT", 0),
    ("ADALORA", "rank_pattern", {"q_proj.lora_E": 3.5}),
    ("IA3", "feedforward_modules", "("),
    ("IA3", "feedforward_modules", 3),
    ("VERA", "projection_prng_key", -1),
    ("VERA", "d_initial", "0.1"),
    ("VERA", "vera_dropout", "x"),
    ("VERA", "layers_to_transform", 1.5),
    ("SHIRA", "r", None),
    ("LN_TUNING", "target_modules", 3),
    ("PREFIX_TUNING", "num_virtual_tokens", None),
    ("PREFIX_TUNING", "prefix_projection", "no"),
    ("P_TUNING", "encoder_hidden_size", "64"),
    ("P_TUNING", "encoder_num_layers", 0),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    model, params = base()
    for name, method in METHODS.items():
        jaxft.save_adapter(made / name, model, method.init(jax.random.key(0), model, params), method)
    return made


def refused(folder, config):
    """The message that loading a folder with this configuration gives."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        jaxft.load_adapter(folder, *base())
    return str(error.value), str(path)


@pytest.mark.parametrize(("kind", "key", "value"), WRONG, ids=str)
def test_a_value_of_pefts_keys_that_is_of_no_use_is_named(kind, key, value, folders, tmp_path):
    shutil.copytree(folders / kind, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    message, path = refused(tmp_path / "a", config | {key: value})
    assert message.startswith(f"{path}: {key}")
    assert "method." not in message


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LORA", {"r": 10**9}),
        ("LORA", {"rank_pattern": {"q_proj": 10**9}}),
        ("ADALORA", {"init_r": 10**6, "rank_pattern": None}),
        ("PREFIX_TUNING", {"num_virtual_tokens": 10**9}),
    ],
    ids=str,
)
def test_a_size_that_the_tensors_do_not_have_takes_no_memory(kind, changes, folders, tmp_path):
    shutil.copytree(folders / kind, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    message, _ = refused(tmp_path / "a", config | changes)
    assert "doesn't fit" in message


def test_a_key_that_peft_always_has_is_missed(folders, tmp_path):
    shutil.copytree(folders / "PREFIX_TUNING", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config.pop("num_virtual_tokens")
    message, path = refused(tmp_path / "a", config)
    assert message == f"{path} has no 'num_virtual_tokens': it is a whole number, 1 or more."


def test_the_layer_is_the_number_behind_an_expression_with_groups(folders, tmp_path):
    """peft itself takes what the expression's first group holds for the layer, and fails."""
    shutil.copytree(folders / "LORA", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    message, _ = refused(tmp_path / "a", config | {"layers_pattern": "(layers|h)", "layers_to_transform": [7]})
    assert "choose none of the model's" in message


WRONG_HUB = [
    ("reduction_factor", None),
    ("reduction_factor", "16"),
    ("reduction_factor", 0),
    ("reduction_factor", {"default": 2, "x": 4}),
    ("reduction_factor", {"default": 2, "99": 4}),
    ("reduction_factor", {"default": "2"}),
    ("non_linearity", None),
    ("non_linearity", 3),
    ("leave_out", 1),
    ("leave_out", ["1"]),
    ("leave_out", [99]),
    ("mh_adapter", "yes"),
    ("scaling", None),
    ("scaling", "large"),
    ("dropout", "x"),
    ("init_weights", 3),
    ("init_weights", "xavier"),
    ("residual_before_ln", None),
    ("original_ln_before", "x"),
    ("ln_before", True),
    ("ln_after", True),
    ("use_gating", True),
    ("phm_layer", True),
    ("cross_adapter", True),
    ("stochastic_depth", 0.1),
    ("inv_adapter", "glow"),
]


@pytest.mark.parametrize(("key", "value"), WRONG_HUB, ids=str)
def test_a_value_of_adapterhubs_keys_that_is_of_no_use_is_named(key, value, folders, tmp_path):
    shutil.copytree(folders / "adapterhub", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    message, path = refused(tmp_path / "a", config | {"config": config["config"] | {key: value}})
    assert message.startswith(f"{path}: {key}")
    assert "method." not in message


@pytest.mark.parametrize("key", ["reduction_factor", "non_linearity", "mh_adapter", "output_adapter"])
def test_a_key_that_adapterhub_always_has_is_missed(key, folders, tmp_path):
    shutil.copytree(folders / "adapterhub", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["config"].pop(key)
    message, path = refused(tmp_path / "a", config)
    assert message == f"{path} has no '{key}': it is {adapter_keys.ADAPTERHUB[key].words}."


def test_every_option_of_adapterhub_is_read_refused_or_without_effect():
    """Those without effect are settings of what is refused: PHM layers, inverses, the norm behind an adapter."""
    without = {key for key in _WITHOUT_EFFECT if "phm" not in key.lower()}
    assert without == {"init_weights_seed", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity", "adapter_residual_before_ln"}
    assert {"ln_before", "ln_after", "use_gating", "phm_layer", "inv_adapter"} <= set(_DEFAULTS) - _WITHOUT_EFFECT
