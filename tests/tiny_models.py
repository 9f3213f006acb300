"""Tiny random models of transformers, which are the reference, the same models in jaxft, and examples to train them on."""

import pathlib
import re
import tempfile

import jax
import numpy as np
import torch
import transformers

import jaxft
from jaxft.data.examples import NextTokens
from jaxft.hub.save import auto_class

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}


ALIKE = {  # what families say otherwise; None is left out
    "gpt2": {"n_inner": 56, "intermediate_size": None, "num_key_value_heads": None},
    **{family: {"num_key_value_heads": None} for family in ("bert", "roberta", "xlm-roberta", "camembert", "electra")},
    "distilbert": {
        "hidden_size": None,
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "dim": 32,
        "hidden_dim": 56,
        "n_layers": 3,
        "n_heads": 4,
    },
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROTARY = {  # settings of a Llama and its relatives; the last two scale beyond 16 tokens, fewer than most texts here have
    name: {"rope_parameters": scaled | {"rope_theta": 10000.0}}
    for name, scaled in {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": _LLAMA3,
    }.items()
}
LABELS = ("no", "maybe", "yes")  # of the classifications


def make_reference(family, task="causal_lm", **settings):
    """Returns a model of transformers whose every parameter is random: norms about 1, biases not zero."""
    torch.manual_seed(0)
    fields = fields_of(family)
    if task.endswith("classification"):
        names = {label: number for number, label in enumerate(LABELS)}
        fields |= {"pad_token_id": 0, "id2label": dict(enumerate(LABELS)), "label2id": names}
    made = getattr(transformers, auto_class(task)).from_config(transformers.AutoConfig.for_model(family, **(fields | settings)))
    return randomized(made)


def fields_of(family):
    """Returns the fields of a small model's configuration."""
    fields = SMALL | ALIKE.get(family, {})
    return {name: value for name, value in fields.items() if name in ("bos_token_id", "eos_token_id") or value is not None}


def randomized(model):
    """Returns a model of torch, every parameter of it drawn anew."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (re.search(r"[nN]orm|\bln_", name) is not None))
    return model.eval()


def load(reference, task="causal_lm", **options):
    """Returns jaxft's model and parameters of a model of transformers, by way of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return jaxft.load_pretrained(folder, task=task, **options)


def make_pair(family, task="causal_lm", **settings):
    """Returns the reference, jaxft's model, and its parameters."""
    reference = make_reference(family, task, **settings)
    return reference, *load(reference, task)


def with_adapter(tuned, model, params):
    """Returns parameters and method of a model of peft, by way of the adapter's folder."""
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        return jaxft.load_adapter(pathlib.Path(folder), model, params)


def moved(method, model, params, size=0.2):
    """Returns the method's parameters with every trainable leaf moved at random, so that lora_b isn't zero."""
    params = method.init(jax.random.key(1), model, params)

    def move(leaf, trains):
        return leaf + size * jax.random.normal(jax.random.key(leaf.size), leaf.shape) if trains else leaf

    return jax.tree.map(move, params, method.mask(params))


def make_examples(lengths, prefix=0, answer=3, seed=0):
    """Returns examples of random tokens after a common prefix; the last `answer` of each are scored."""
    random = np.random.default_rng(seed)
    start = random.integers(1, VOCABULARY, prefix)
    tokens = [np.concatenate([start, random.integers(1, VOCABULARY, length - prefix)]) for length in lengths]
    scored = [np.arange(length) >= length - answer for length in lengths]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    zeros = np.zeros(len(lengths), np.int32)
    return NextTokens(np.concatenate(tokens).astype(np.int32), offsets, zeros, np.concatenate(scored), zeros, ("",) * len(lengths))


def largest_difference(ours, theirs):
    """Returns the largest difference between two arrays or pytrees of one structure."""
    differences = jax.tree.map(lambda one, other: np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max(), ours, theirs)
    return max(jax.tree.leaves(differences))


def same_bits(one, other):
    """Returns whether two pytrees hold the same arrays, bit for bit."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
