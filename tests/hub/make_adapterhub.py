"""Makes tests/hub/adapterhub: adapters that AdapterHub's library wrote, with its logits, gradients and losses.

`adapters` pins an older transformers, so it has an environment of its own, and its answers are kept:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch==2.13.0 adapters==1.3.0
    ENVIRONMENT/bin/python tests/hub/make_adapterhub.py [CASE ...]

Weights depend on their names alone, so that both libraries have the same ones without a file. To see whether the library reads
folders as jaxft does, `make_adapterhub.py read CASE FOLDER [CASE FOLDER ...]` writes `FOLDER.npy`, the logits that it gives with the
adapter of FOLDER, and `FOLDER.again`, the adapter as the library writes it again.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent / "adapterhub"
NAME = "medical"
VOCABULARY, STEPS, RATE, DECAY = 31, 20, 3e-3, 0.05
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}
OWN = {
    "bert": {"intermediate_size": 24},
    "roberta": {"intermediate_size": 24, "pad_token_id": 0},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4},
    "electra": {"intermediate_size": 24, "embedding_size": 16},
    "gpt2": {"n_inner": 24},
}
LABELS = ("no", "maybe", "yes")
ENCODERS = tuple(family for family in OWN if family != "gpt2")
CASES = {  # family, preset, what differs from it
    "bert_double_seq_bn": ("bert", "double_seq_bn", {"reduction_factor": 4}),
    "bert_seq_bn": ("bert", "seq_bn", {"reduction_factor": 4, "leave_out": [0]}),
    "roberta_par_bn": ("roberta", "par_bn", {"reduction_factor": 4, "scaling": "learned"}),
    "distilbert_seq_bn": ("distilbert", "seq_bn", {"reduction_factor": 2}),
    "electra_double_seq_bn": ("electra", "double_seq_bn", {"reduction_factor": 4, "original_ln_before": True}),
    "bert_classes": ("bert sequence_classification", "seq_bn", {"reduction_factor": 4}),
    "roberta_classes": ("roberta sequence_classification", "double_seq_bn", {"reduction_factor": 4}),
    "gpt2_double_seq_bn": ("gpt2", "double_seq_bn", {"reduction_factor": 4}),
    "gpt2_seq_bn": ("gpt2", "seq_bn", {"reduction_factor": 3, "leave_out": [1]}),
    "gpt2_par_bn": ("gpt2", "par_bn", {"reduction_factor": 4, "scaling": "learned"}),
    "double_seq_bn": ("llama", "double_seq_bn", {"reduction_factor": 4}),
    "seq_bn": ("mistral", "seq_bn", {"reduction_factor": 3, "leave_out": [1], "non_linearity": "gelu", "dropout": 0.1}),
    "par_bn": ("llama", "par_bn", {"reduction_factor": 4, "mh_adapter": True}),
    "learned": ("llama", "double_seq_bn", {"scaling": "learned", "reduction_factor": {"0": 2, "default": 8}, "non_linearity": "tanh"}),
    "channel": (
        "llama",
        "seq_bn",
        {
            "scaling": "channel",
            "reduction_factor": 5.5,
            "original_ln_after": False,
            "residual_before_ln": False,
            "non_linearity": "leakyrelu",
            "init_weights": "houlsby",
        },
    ),
}
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))


def weight(name, shape, size=0.2):
    """Returns a random tensor that depends on its name: norms about 1, nothing zero."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(shape)) * size
    about_one = "norm" in name.lower() or ".ln_" in name or name.endswith("scaling")
    return (drawn + about_one).astype(np.float32)


def base_model(family):
    """Returns a model of transformers with these weights."""
    import torch
    import transformers

    family, _, task = family.partition(" ")
    others = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "intermediate_size")}
    fields = {"llama": SHAPE, "mistral": SHAPE | {"sliding_window": 5}}.get(family, others | OWN.get(family, {}))
    made = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    if task:
        made = transformers.AutoModelForSequenceClassification
        fields |= {"id2label": dict(enumerate(LABELS)), "label2id": {label: number for number, label in enumerate(LABELS)}}
    model = made.from_config(transformers.AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weight(name, parameter.shape)))
    return model.eval()


def _logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def _make(case):
    import adapters
    import safetensors.numpy
    import torch

    family, preset, changes = CASES[case]
    model = base_model(family)
    adapters.init(model)
    model.add_adapter(NAME, config=adapters.AdapterConfig.load(preset, **changes))
    model.train_adapter(NAME)
    leaves = {name: leaf for name, leaf in model.named_parameters() if f".adapters.{NAME}." in name}  # the library trains a head too
    with torch.no_grad():
        for name, parameter in leaves.items():
            parameter.copy_(torch.tensor(weight(name, parameter.shape)))
    model.eval()
    folder = HERE / case
    model.save_adapter(str(folder), NAME, with_head=" " in family, use_safetensors=True)
    found = {"logits": _logits(model)}
    ids = torch.tensor(IDS)
    labels = ids[:, 0] % len(LABELS) if " " in family else ids
    model(ids, labels=labels).loss.backward()
    found |= {f"gradient.{name}": leaf.grad.numpy().copy() for name, leaf in leaves.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE, weight_decay=DECAY)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    found["losses"] = np.asarray(losses, np.float64)
    safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, HERE / f"{case}.safetensors")


def _read(case, folder):
    import adapters

    model = base_model(CASES[case][0])
    with_head = " " in CASES[case][0]
    adapters.init(model)
    if with_head:
        for leaf in (model.classifier, getattr(model.base_model, "pooler", None) or model.classifier):
            for parameter in leaf.parameters():
                parameter.data.zero_()
    info = {}
    name = model.load_adapter(folder, with_head=with_head, set_active=True, loading_info=info, use_safetensors=True)
    if info.get("missing_keys") or info.get("unexpected_keys"):
        sys.exit(f"{folder}: {json.dumps(info)}")
    model.eval()
    np.save(f"{folder}.npy", _logits(model))
    model.save_adapter(f"{folder}.again", name, with_head=with_head, use_safetensors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        for case, folder in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
            _read(case, folder)
    else:
        for each in sys.argv[1:] or CASES:
            _make(each)
