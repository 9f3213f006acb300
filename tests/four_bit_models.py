"""Tiny models in 4 bits, by transformers and bitsandbytes, which are the reference."""

import functools
import pathlib
import tempfile

import bitsandbytes
import jax
import numpy as np
import torch
import transformers
from tiny_models import VOCABULARY, make_reference

import jaxft

# Rows of whole blocks: bitsandbytes 0.50 dequantizes others wrongly where a CPU has AVX-512 (a mean error of 0.27 of N(0, 1), not 0.075).
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
OTHERWISE = {"gpt2": {"n_inner": SHAPE["intermediate_size"]}}
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 13)).astype(np.int32)
KINDS = {
    "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "some left": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp", "k_proj"]},
}
FORMATS = {"nf4, double": jaxft.Format(), "fp4": jaxft.Format("fp4", double_quantization=False)}


@functools.cache
def dense(family="llama"):
    """Returns the folder of a tiny model in float32, a Llama or another family's."""
    folder = pathlib.Path(tempfile.mkdtemp()) / "dense"
    make_reference(family, **SHAPE, **OTHERWISE.get(family, {})).save_pretrained(folder)
    return folder


@functools.cache
def ready_made(kind, family="llama"):
    """Returns the folder of the same model as transformers saves it in 4 bits."""
    folder = pathlib.Path(tempfile.mkdtemp()) / "four_bits"
    by_transformers(dense(family), quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **KINDS[kind])).save_pretrained(
        folder
    )
    return folder


def by_transformers(folder, **settings):
    """Returns a folder's model by transformers, in float32.

    Where a CPU has AVX-512 for bfloat16, bitsandbytes would round products to that type.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **settings)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def their_logits(model):
    """Returns a model's logits of `IDS` by torch."""
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@functools.cache
def _program(model):
    return jax.jit(lambda params: model.apply({"params": params}, IDS).logits)


def our_logits(model, params):
    """Returns a model's logits of `IDS`."""
    return np.asarray(_program(model)(params))
