"""The recipe roberta_sentiment from one end to the other, with a tiny random RoBERTa; and its masked words in transformers' pipeline."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

import experiments
import jaxft
from jaxft.config import ModelConfig
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.methods import Prompt, PTuning
from jaxft.train import run

STEPS = 3
RATINGS = ("positive", "neutral", "negative")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny RoBERTa, `model`, and rows as the bundled reviews have them, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("roberta")
    rows = [{"drug": f"D{i}", "text": f"It helped {i} times.", "condition": "pain", "rating": RATINGS[i % 3]} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([row["text"] for row in rows], vocab_size=300, special_tokens=SPECIAL)
    made = made._tokenizer
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", made.token_to_id("</s>")), ("<s>", made.token_to_id("<s>")))
    transformers.RobertaTokenizerFast(tokenizer_object=made).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 130}
    config = transformers.RobertaConfig(vocab_size=made.get_vocab_size(), pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("method", [None, Prompt(virtual_tokens=3), PTuning(virtual_tokens=3)], ids=["recipe", "prompt", "ptuning"])
def test_it_trains_is_evaluated_and_peft_has_what_it_exports(folder, method):
    found, workdir = experiments.load("roberta_sentiment"), folder / f"run-{type(method).__name__}"
    found = dataclasses.replace(
        found,
        method=method or found.method,
        model=ModelConfig(source=str(folder / "model")),
        data=dataclasses.replace(found.data, train=str(folder / "rows.jsonl"), test="", split=(0.6, 0.2, 0.2), max_length=64),
        train=dataclasses.replace(found.train, steps=STEPS, batch_size=2, eval_every=0),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=0.05),  # so small a model hardly moves at the recipe's
    )
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):  # as optax's own code wants it
        patched.setattr(run, "_keep_compiled", lambda: None)  # programs on disk are for processes, not for this one
        summary = run.train(found, workdir)
    assert summary["steps"] == STEPS
    assert summary["eval"]["after"]["loss"] != pytest.approx(summary["eval"]["before"]["loss"], rel=1e-4)
    assert run.evaluate(found, workdir)["loss"] == pytest.approx(summary["eval"]["after"]["loss"], rel=1e-6)
    setup, state = run._load_best(found, workdir)
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(folder / "model"), "It helped 7 times."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    adapted = peft.PeftModel.from_pretrained(base, workdir / "export" / "peft").eval()
    with torch.no_grad():
        expected = adapted(ids).logits.numpy()
    ours = setup.model.apply({"params": setup.params(state)}, ids.numpy().astype(np.int32)).logits
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_pipeline_fills_the_mask_of_an_exported_folder_as_of_the_first(folder):
    model, params = jaxft.load_pretrained(folder / "model", task="masked_lm")
    jaxft.save_pretrained(folder / "again", model, params, load_tokenizer(str(folder / "model")))
    found, expected = (transformers.pipeline("fill-mask", str(folder / name))("It helped <mask> times.") for name in ("again", "model"))
    assert [one["token_str"] for one in found] == [one["token_str"] for one in expected]
    np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in expected], rtol=1e-5)
