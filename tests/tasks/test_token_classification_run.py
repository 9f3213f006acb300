"""Token classification, whole runs: to transformers' pipeline, to peft, and the look at its data."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from tasks.test_token_classification import tokenizer
from tiny_models import fields_of

from jaxft.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, TrainConfig
from jaxft.inspect.look import look
from jaxft.methods import Full, LoRA
from jaxft.tasks import TokenClassification
from jaxft.train import run


def write_rows(folder):
    """Writes sets in which a word that begins with "b" is a drug, and what follows it, with "c", goes on."""
    random = np.random.default_rng(0)
    for name, count in (("train", 24), ("test", 8)):
        lines = []
        for _ in range(count):
            words = ["".join([kind, *random.choice(list("defg"), 2)]) for kind in random.choice(list("aab"), 6)]
            words = [part for word in words for part in ([word, "cde"] if word[0] == "b" else [word])]
            tags = [{"a": "O", "b": "B-DRUG", "c": "I-DRUG"}[word[0]] for word in words]
            lines.append(json.dumps({"words": words, "ner": tags}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def experiment(folder, method):
    """A short run of a tiny BERT on such rows, in windows."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**fields_of("bert"))).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_rows(folder)
    data = DataConfig(
        train=str(folder / "train.jsonl"),
        test=str(folder / "test.jsonl"),
        split=(1.0, 0.0, 0.0),
        tokens="words",
        tags="ner",
        max_length=20,
    )
    train, optimizer = TrainConfig(steps=40, batch_size=8), OptimizerConfig(learning_rate=1e-2)
    return Experiment("lora_bert_tags", ModelConfig(str(folder / "model")), data, method, TokenClassification(stride=4), train, optimizer)


@pytest.mark.usefixtures("as_launched")
def test_a_run_ends_with_a_folder_for_transformers_pipeline(tmp_path, capsys):
    asked = experiment(tmp_path, Full())
    after = run.train(asked, tmp_path / "run")["eval"]["after"]
    out = capsys.readouterr().out
    assert after["f1"] > 0.9  # the first letter says all
    for text in ("By type", "DRUG", "majority answer", "true:  DRUG b", 'pipeline("token-classification"'):
        assert text in out
    tagger = transformers.pipeline("token-classification", str(tmp_path / "run/export/hf"), aggregation_strategy="first")
    assert tagger.model.config.id2label == {0: "B-DRUG", 1: "I-DRUG", 2: "O"}
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    drugs = right = 0
    for row in test:
        text = " ".join(row["words"])
        found = {(text[entity["start"] : entity["end"]], entity["entity_group"]) for entity in tagger(text)}
        wanted = {f"{word} {row['words'][i + 1]}" for i, word in enumerate(row["words"]) if row["ner"][i] == "B-DRUG"}
        drugs, right = drugs + len(wanted), right + sum((word, "DRUG") in found for word in wanted)
    assert drugs > 3
    assert right >= 0.8 * drugs  # there a text is read whole, here in windows
    assert run.evaluate(asked, tmp_path / "run") == pytest.approx(after, rel=1e-6)


@pytest.mark.usefixtures("as_launched")
def test_loras_adapter_with_the_head_is_read_by_peft(tmp_path):
    asked = dataclasses.replace(experiment(tmp_path, LoRA(rank=2)), train=TrainConfig(steps=2, batch_size=8))
    run.train(asked, tmp_path / "run")
    base = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model", num_labels=3)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "run/export/peft")
    run.export(asked, tmp_path / "run", "hf", tmp_path / "hf")
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf")
    tokens = torch.tensor([[2, 5, 30, 8, 9, 3]])
    with torch.no_grad():
        np.testing.assert_allclose(tuned.eval()(tokens).logits, merged.eval()(tokens).logits, atol=1e-4)


def test_inspection_reads_the_configured_columns_and_encodes_the_words_as_the_task_does(tmp_path):
    asked = experiment(tmp_path, Full())
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"words": ["a", "b"], "ner": ["O"]}\n{"words": ["a", "cde"], "ner": ["O", "I-DRUG"]}')
    found = look(asked, asked.task.fit_tokenizer(tokenizer()))
    examples = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    del examples[-2]
    for row, tokens, scored in zip(examples, found.encoded[0].tokens, found.encoded[0].scored, strict=True):
        whole = tokenizer()(row["words"], is_split_into_words=True)
        assert tokens.tolist() == whole["input_ids"]
        assert scored.sum() == len(row["words"])
    assert found.encoded[0].cut.sum() == 0  # long ones are read in windows
    (refused,) = [one for one in found.findings if one.kind == "refused"]
    notes = [case.note for case in refused.cases]
    assert notes[0] == "2 words in 'words', but 1 tags in 'ner'. Give each word one tag."
    assert notes[1].startswith("tag 2 is 'I-DRUG' after O, which is not IOB2: 'B-DRUG' would be.")
    mending = dataclasses.replace(asked, task=TokenClassification(mend_tags=True))
    assert [len(one.cases) for one in look(mending, tokenizer()).findings if one.kind == "refused"] == [1]
    assert found.sets[0].labels[0].name == "ner"
