"""Tiny random models of transformers, the reference of this folder's tests."""

import contextlib
import re
import resource

import numpy as np
import pytest
import torch
import transformers

# float32 on both sides, logits of order 1 to 10: a wrong operation is off by far more, rounding by far less
TOLERANCE = 1e-4

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

GPT2 = {"n_inner": 56, "bos_token_id": 0, "eos_token_id": 1}

MODELS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "multi_head": ("llama", {"num_key_value_heads": 4}),
    "multi_query": ("llama", {"num_key_value_heads": 1}),
    "head_dim": ("llama", {"head_dim": 12}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, "max_position_embeddings": 8}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "untied_gpt2": ("gpt2", GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False}),
}


def make_model(family, dtype=torch.float32, **settings):
    """Returns a model of transformers whose every parameter is random: norms about 1, biases not zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **(SMALL | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (re.search(r"norm|\bln_", name) is not None))
    return model.to(dtype).eval()


def batch(side):
    """Returns ids and mask (3, 14), rows of 14, 9 and 4 tokens padded on `side`."""
    ids = np.random.default_rng(1).integers(1, SMALL["vocab_size"], (3, 14)).astype(np.int32)
    mask = (np.arange(14) < np.array([14, 9, 4])[:, None]).astype(np.int32)
    return ids, mask if side == "right" else mask[:, ::-1].copy()


def reference_logits(model, ids, mask):
    """Returns transformers' logits as an array."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions))
    return out.logits.float().numpy()


def difference(model, params, reference, side="right"):
    """Returns the largest difference of logits at real tokens between jaxft's model and transformers'."""
    ids, mask = batch(side)
    ours = np.asarray(model.apply({"params": params}, ids, attention_mask=mask).logits, np.float32)
    return float(np.abs(ours - reference_logits(reference, ids, mask))[mask == 1].max())


@pytest.fixture
def folder(tmp_path):
    """A folder that isn't there yet."""
    return tmp_path / "model"


@pytest.fixture
def full_disk():
    """A context in which no file grows over so many bytes: writes fail with an error of the system, as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limited
