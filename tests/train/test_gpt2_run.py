"""The recipe gpt2_sft from one end to the other, with a tiny random GPT-2 whose tokenizer has no chat template."""

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
from jaxft.config import EvalConfig, ModelConfig
from jaxft.data.sources import load_rows
from jaxft.errors import UserError
from jaxft.train import run

STEPS, NEW = 3, 5
PROMPT = "Drug: Zomig\nReview: It helped at once."


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The experiment on a tiny model and a few rows, and its working folder after training."""
    folder = tmp_path_factory.mktemp("gpt2")
    rows = [{"drug": f"D{i}", "text": f"It helped {i} times.", "condition": f"pain {i % 3}", "rating": "positive"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([" ".join(row.values()) for row in rows], vocab_size=300, special_tokens=["<|endoftext|>"])
    fast = transformers.GPT2TokenizerFast(tokenizer_object=tokenizer._tokenizer)
    assert fast.chat_template is None
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    end = fast.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=end, eos_token_id=end
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    found = experiments.load("gpt2_sft")
    found = dataclasses.replace(
        found,
        model=ModelConfig(source=str(folder / "model")),
        data=dataclasses.replace(found.data, train=str(folder / "rows.jsonl"), test="", split=(0.8, 0.1, 0.1), max_length=256, cache=False),
        train=dataclasses.replace(found.train, steps=STEPS, batch_size=2),  # a row a device
        eval=dataclasses.replace(found.eval, limit=2, max_new_tokens=NEW, general="bundled:general-text"),
    )
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):  # as optax's own code wants it
        patched.setattr(run, "_keep_compiled", lambda: None)  # programs on disk are for processes, not for this one
        summary = run.train(found, folder / "run")
    return found, folder, summary


def merged(found, folder):
    if not (folder / "merged").exists():
        run.export(found, folder / "run", "hf", folder / "merged")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()


def test_it_trains_and_is_evaluated(recipe):
    found, folder, summary = recipe
    assert summary["steps"] == STEPS
    assert np.isfinite(summary["train_loss"])
    measured = run.evaluate(found, folder / "run")
    assert measured["general_loss"] == pytest.approx(summary["eval"]["after"]["general_loss"], rel=1e-6)
    assert measured["loss"] == pytest.approx(summary["eval"]["after"]["loss"], rel=1e-6)
    assert measured["loss"] != pytest.approx(summary["eval"]["before"]["loss"], rel=1e-4)


def test_what_is_forgotten_is_the_change_of_transformers_loss_on_the_plain_texts(recipe):
    found, folder, summary = recipe
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    texts = [row["text"] for row in load_rows("bundled:general-text", "train").dataset]
    assert len(texts) == 24
    models = {"before": transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval(), "after": merged(found, folder)}
    for when, model in models.items():
        total = count = 0
        for text in texts:
            ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id][:256]])
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert summary["eval"][when]["general_loss"] == pytest.approx(total / count, rel=1e-4)
    assert summary["eval"]["after"]["general_loss"] != pytest.approx(summary["eval"]["before"]["general_loss"], rel=1e-5)


def test_plain_texts_are_refused_where_nothing_reads_them(recipe):
    found, folder, _ = recipe
    eval = dataclasses.replace(found.eval, general=str(folder / "rows.csv"))
    (folder / "rows.csv").write_text("words\nnone\n")
    with pytest.raises(UserError, match=r"of config.eval.general, has no column 'text', but words"):
        run.train(dataclasses.replace(found, eval=eval), folder / "other")
    with pytest.raises(UserError, match="config.eval.general measures a causal model's loss on plain texts"):
        run.train(dataclasses.replace(experiments.load("full_bert_sentiment"), eval=EvalConfig(general=eval.general)), folder / "another")


def test_the_adapter_in_peft_is_the_merged_model_in_transformers(recipe):
    found, folder, _ = recipe
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = peft.PeftModel.from_pretrained(base, folder / "run" / "export" / "peft").eval()
    whole, ids = merged(found, folder), torch.arange(2, 40)[None]
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()(ids).logits
        assert (adapted(ids).logits - whole(ids).logits).abs().max() <= 1e-4
        assert (whole(ids).logits - plain).abs().max() > 1e-3


def test_answers_are_those_of_the_exported_folder_with_its_own_template(recipe, capsys):
    found, folder, _ = recipe
    run.generate(found, folder / "run", [{"prompt": PROMPT}], None)
    printed = capsys.readouterr().out
    whole, tokenizer = merged(found, folder), transformers.AutoTokenizer.from_pretrained(folder / "merged")
    turns = [{"role": "system", "content": found.data.system}, {"role": "user", "content": PROMPT}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        f"{found.data.system}\n\n### User:\n{PROMPT}\n\n### Assistant:\n"
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    expected = whole.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0, ids.shape[1] :]
    assert printed.endswith(tokenizer.decode(expected, skip_special_tokens=True).strip() + "\n")


def test_a_prompt_beyond_the_positions_gets_one_message(recipe):
    found, folder, _ = recipe
    with pytest.raises(UserError, match=r"Prompt 2 has \d+ tokens, and its answer may have 5; the model has 256 positions. Shorten"):
        run.generate(found, folder / "run", [{"prompt": PROMPT}, {"prompt": "It helped. " * 60}], None)


def test_rows_beyond_the_positions_are_refused_before_the_weights_are_read(recipe):
    found, folder, _ = recipe
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "It helped. " * 60, "completion": "yes"}) + "\n", encoding="utf-8")
    data = dataclasses.replace(found.data, validation=str(folder / "long.jsonl"), prompt="", completion="", max_length=512)
    data = dataclasses.replace(data, train=data.validation, test=data.validation)
    with pytest.raises(UserError, match=r"The longest row has \d+ tokens; .* has 256 positions. Lower config.data.max_length"):
        run.train(dataclasses.replace(found, data=data), folder / "long")
