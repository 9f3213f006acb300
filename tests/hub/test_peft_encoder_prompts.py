"""Prompts and P-tuning on encoders against peft: files both ways, rows with padding, packed rows, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from method_checks import base
from peft_checks import TOLERANCE, load_in_peft, tuned_by_peft
from tiny_models import moved

import jaxft
from jaxft.data.batches import Layout, Room
from jaxft.data.examples import Labelled, Slots
from jaxft.methods import Partial, Prompt, PTuning

COUNT = 3
LENGTHS = (9, 6)
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 9)).astype(np.int32)
MASK = (np.arange(9) < np.array(LENGTHS)[:, None]).astype(np.int32)
CLASSES, TAGS, SPANS = "sequence_classification", "token_classification", "question_answering"
KINDS = {CLASSES: "SEQ_CLS", TAGS: "TOKEN_CLS", SPANS: "QUESTION_ANS"}
NAMES = [f"bert {CLASSES}", f"roberta {CLASSES}", f"distilbert {CLASSES}", f"bert {TAGS}", f"roberta {SPANS}"]


def ours_of(name, params):
    """Returns the outputs of rows padded on the right, and those of the same rows in one packed row."""
    model, _ = base(name)

    def run(params):
        out = model.apply({"params": params}, TOKENS, attention_mask=MASK)
        hidden = model.apply({"params": params}, **packed(name), method="features")[0]
        return (out.logits if out.start_logits is None else jnp.stack([out.start_logits, out.end_logits], -1)), model.apply(
            {"params": params}, hidden, method="logits"
        )

    whole, flat = jax.jit(run)(params)
    return np.asarray(whole), np.asarray(flat)


def packed(name):
    """Returns both texts in one row, with room before each, as the trainer lays it out."""
    row = layout(name).fill([0])
    return {"input_ids": row["tokens"], "segment_ids": row["segment_ids"], "positions": row["positions"]}


def layout(name):
    offsets = np.array([0, *np.cumsum(LENGTHS)])
    reads = np.zeros(2, np.int64)
    slots = Slots(np.array([0, 1, 2]), reads, np.zeros(2, np.int32), np.ones(2, np.float32))
    tokens = np.concatenate([row[:size] for row, size in zip(TOKENS, LENGTHS, strict=True)])
    held = Labelled(tokens, offsets, np.zeros(2, np.int32), slots, np.arange(2))
    return Layout(held, [[0, 1]], 0, 24, 2, 0, Room(COUNT, CLASSES in name))


def theirs_of(name, tuned):
    out = tuned(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK))
    found = torch.stack([out.start_logits, out.end_logits], -1) if SPANS in name else out.logits
    return found if CLASSES in name else found[:, COUNT:]


def check(name, params, tuned):
    """Padded and packed rows have peft's outputs."""
    with torch.no_grad():
        expected = theirs_of(name, tuned).numpy()
    whole, flat = ours_of(name, params)
    if CLASSES in name:
        assert np.abs(whole - expected).max() <= TOLERANCE
        assert np.abs(flat[layout(name).fill([0])["scored"][0]] - expected).max() <= TOLERANCE
        return
    assert np.abs(whole - expected)[MASK == 1].max() <= TOLERANCE
    starts = layout(name).fill([0])["scored"][0]
    for start, size, row in zip(starts, LENGTHS, expected, strict=True):
        assert np.abs(flat[start : start + size] - row[:size]).max() <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_peft_has_our_outputs_padded_and_packed(name, tmp_path):
    model, params = base(name)
    method = (PTuning(COUNT, hidden_size=8) if "roberta" in name else Prompt(COUNT)) + Partial(targets=model.head)
    tuned = moved(method, model, params)
    jaxft.save_adapter(tmp_path, model, tuned, method, base_model="owner/base")
    check(name, tuned, load_in_peft(tmp_path, name))


@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:])
def test_adapters_of_peft_give_its_outputs_and_gradients(name, tmp_path):
    model, params = base(name)
    theirs = tuned_by_peft(peft.PromptTuningConfig(task_type=KINDS[name.split()[1]], num_virtual_tokens=COUNT), "", family=name)
    theirs.save_pretrained(tmp_path)
    tuned, _ = jaxft.load_adapter(tmp_path, model, params)
    check(name, tuned, theirs)
    found = theirs_of(name, theirs)
    weight = np.float32(MASK if CLASSES not in name else np.ones(2))
    ((found**2).sum(-1) * torch.tensor(weight)).sum().backward()
    expected = theirs.prompt_encoder.default.embedding.weight.grad.numpy()

    def loss(prompt):
        out = model.apply({"params": {**tuned, "prompt": prompt}}, TOKENS, attention_mask=MASK)
        found = jnp.stack([out.start_logits, out.end_logits], -1) if SPANS in name else out.logits
        return jnp.sum(jnp.sum(found**2, -1) * weight)

    ours = np.asarray(jax.jit(jax.grad(loss))(tuned["prompt"]).embedding)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
