"""What whole runs are made of: a tiny random model with a tokenizer, a small file of rows."""

import json

import jax
import pytest
import tiny_reviews
import tokenizers
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache

from jaxft.train import run

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a tiny Llama, `model`, and forty rows, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("material")
    rows = [{"prompt": f"Name the number {i}, please.", "completion": f"number {i % 7}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A folder with a tiny BERT, `model`, and its rows, `rows.jsonl`."""
    return tiny_reviews.write(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def as_launched(tmp_path_factory):
    """Keeps programs on disk, as runs do, but for these tests alone; optax's own code promotes types."""
    kept = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in kept}
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        patch.setattr(run, "_keep_compiled", lambda: None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
