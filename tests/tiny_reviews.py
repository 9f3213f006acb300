"""A tiny BERT and a file of reviews for it: what a whole run of a classification is made of, in a second."""

import json

import numpy as np
import tokenizers
import torch
import transformers

WORDS = [f"w{number}" for number in range(40)]
LABELS = ("bad",) * 8 + ("good",) * 3 + ("so",)


def write(folder):
    """Writes `model`, and 48 rows of random texts, `rows.jsonl`, whose label is rarely anything but bad; returns the folder."""
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(WORDS, random.integers(3, 12))), "label": LABELS[i % 12]} for i in range(48)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder / "model")
    return folder
