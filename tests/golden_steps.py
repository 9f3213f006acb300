"""The first step of each experiment on its bundled data, with a tiny random model in the place of its own, and the record of its metrics.

    python tests/golden_steps.py

writes the record, golden_steps.json, anew: that is for a change that was meant to change what a recipe's first step computes.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from typing import Any

import torch
import transformers

from jaxft.hub.tokenizer import load_tokenizer
from jaxft.train import placement
from jaxft.train.loop import jitted_step
from jaxft.train.setup import set_up

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # where the experiments are

import experiments

RECORD = pathlib.Path(__file__).with_suffix(".json")
METRICS = ("loss", "gradient_norm", "scored_tokens")
_LLAMA, _BERT = "bundled:smollm2-135m-instruct", "bundled:minilm-l6"
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 520}
_LIKE = {  # by source: the tokenizer, the configuration, and the class whose weights are drawn
    _LLAMA: (_LLAMA, transformers.LlamaConfig, transformers.LlamaForCausalLM),
    _BERT: (_BERT, transformers.BertConfig, transformers.BertModel),
    "openai-community/gpt2": (_LLAMA, transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "FacebookAI/roberta-base": (_BERT, transformers.RobertaConfig, transformers.RobertaModel),
}


def names() -> list[str]:
    """Returns every experiment; all of them have bundled rows."""
    return list(experiments.names())


@functools.cache
def model(source: str) -> str:
    """Returns a folder with a tiny random model and a bundled tokenizer."""
    folder = tempfile.mkdtemp()
    tokenizer, config, kind = _LIKE[source]
    found = load_tokenizer(tokenizer)
    found.save_pretrained(folder)
    sizes = {"num_key_value_heads": 2} if source == _LLAMA else {}
    ends = {"bos_token_id": found.bos_token_id, "eos_token_id": found.eos_token_id, "pad_token_id": found.pad_token_id}
    torch.manual_seed(0)
    kind(config(vocab_size=len(found), intermediate_size=128, **_SHAPE, **sizes, **ends)).save_pretrained(folder)
    return folder


def first_step(name: str) -> dict[str, float]:
    """Returns the metrics of an experiment's first step, its rows on all devices."""
    experiment = experiments.load(name)
    found = dataclasses.replace(experiment.model, source=model(experiment.model.source))
    train = dataclasses.replace(experiment.train, data_parallel=1, fsdp_parallel=1, tensor_parallel=-1)
    data, measured = dataclasses.replace(experiment.data, test=""), dataclasses.replace(experiment.eval, split="validation")
    ready: Any = set_up(dataclasses.replace(experiment, model=found, train=train, data=data, eval=measured))
    step = jitted_step(ready.experiment, ready.model, ready.optimizer, ready.state_sharding, ready.steps)
    batch = placement.place_batch(ready.batch(0), ready.mesh, placement.BATCH)
    metrics = step(ready.state, ready.frozen, batch, ready.start)[1]
    return {name: float(metrics[name]) for name in METRICS}


if __name__ == "__main__":
    steps = {}
    for one in names():
        steps[one] = first_step(one)
        print(one, steps[one], flush=True)
    RECORD.write_text(json.dumps(steps, indent=1) + "\n")
