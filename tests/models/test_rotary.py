"""Rotary angles against transformers', type by type."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxft.errors import UserError
from jaxft.models.llama import LlamaConfig
from jaxft.models.rotary import Rotary, angles, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
TYPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": LLAMA3 | {"rope_theta": 500000.0},
    "yarn": YARN,
    "yarn, no truncation": YARN | {"truncate": False},
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention factor": YARN | {"attention_factor": 1.3},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
}
LIMIT = 256  # max_position_embeddings


def configs(settings, head_dim):
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=LIMIT, rope_parameters=dict(settings)
    )
    ours = LlamaConfig.from_hf(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    return ours, theirs


def difference(settings, head_dim, positions):
    ours, theirs = configs(settings, head_dim)
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions))
    found = angles(ours.rotary, ours.head_dim, ours.max_position_embeddings, positions)
    halves = [part.numpy()[..., : head_dim // 2] for part in expected]
    return max(np.abs(np.asarray(one)[:, :, 0] - other).max() for one, other in zip(found, halves, strict=True))


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("name", TYPES)
def test_angles_are_those_of_transformers(name, head_dim):
    positions = np.stack([np.arange(LIMIT), np.arange(LIMIT)[::-1]]).astype(np.int32)
    # an angle up to 255 in float32 is good to 255 * 2**-24, and one frequency rounded otherwise to twice that
    assert difference(TYPES[name], head_dim, positions) <= 5e-5


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, 3 * LIMIT])
def test_dynamic_grows_beyond_the_models_positions(length):
    positions = np.arange(length, dtype=np.int32)[None]
    assert difference(TYPES["dynamic"], 16, positions) <= 2e-4  # angles up to 767


def test_dynamic_is_the_default_up_to_the_models_positions():
    positions = np.arange(LIMIT, dtype=np.int32)[None]
    dynamic, plain = (angles(configs(TYPES[name], 16)[0].rotary, 16, LIMIT, positions) for name in ("dynamic", "default"))
    np.testing.assert_allclose(dynamic, plain, atol=5e-5)  # one frequency rounded otherwise, times 255


def test_rotation_is_that_of_transformers():
    ours, theirs = configs(TYPES["default"], 16)
    x = np.random.default_rng(0).standard_normal((2, 9, 4, 16)).astype(np.float32)
    positions = np.stack([np.arange(9), np.arange(9) + 30]).astype(np.int32)
    cosine, sine = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cosine, sine, unsqueeze_dim=2)
    found = rotate(jax.numpy.asarray(x), *angles(ours.rotary, 16, LIMIT, positions))
    assert np.abs(np.asarray(found) - expected.numpy()).max() <= 1e-5  # angles up to 38


def test_older_files_name_the_scaling_rope_scaling():
    hf = configs(TYPES["default"], 16)[1].to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0}
    del hf["rope_parameters"]
    hf["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert LlamaConfig.from_hf(hf).rotary == Rotary("linear", 500000.0, 2.0)


def test_an_unknown_type_is_named():
    with pytest.raises(UserError, match="no rotary type 'yarm'. Did you mean 'yarn'"):
        Rotary(rope_type="yarm")
