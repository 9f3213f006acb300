"""The page of methods: its examples run."""

import pathlib
import re

import jax
import numpy as np
import pytest
from tiny_models import VOCABULARY, make_pair, moved

import jaxft
from jaxft.methods import IA3, LoRA
from jaxft.methods.partition import check_patterns, names_of

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"


def test_its_examples_run(tmp_path, monkeypatch):
    _, model, base = make_pair("llama", num_hidden_layers=2)
    for name, method in (("adapter", LoRA(2)), ("french", LoRA(2, targets=("q_proj",))), ("german", LoRA(3, targets=("v_proj",)))):
        jaxft.save_adapter(tmp_path / name, model, moved(method, model, base), method)
    monkeypatch.chdir(tmp_path)
    input_ids = np.random.default_rng(0).integers(1, VOCABULARY, (3, 7)).astype(np.int32)
    given = {"jaxft": jaxft, "model": model, "base": base, "key": jax.random.key(0), "input_ids": input_ids, "prompts": list(input_ids)}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, given)
    assert given["logits"].shape == (3, 7, VOCABULARY)
    assert [len(text) for text in given["texts"]] == [8, 8, 8]


@pytest.mark.parametrize(("family", "row", "task"), [("llama", 0, "causal_lm"), ("gpt2", 1, "causal_lm"), ("bert", 2, "masked_lm")])
def test_the_names_of_each_family_are_its_models(family, row, task):
    _, model, base = make_pair(family, task, num_hidden_layers=2)
    text = PAGE.with_name("models.md").read_text(encoding="utf-8").partition("| `IA3()` |")[2]
    cells = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")][row]
    named = [re.findall(r"`(.+?)`", cell) for cell in cells]
    assert len(named) == 5
    for patterns in named:
        check_patterns(patterns, names_of(base), family)
    expected = IA3(tuple(named[-1]), tuple(named[-1][-1:])).init(jax.random.key(0), model, base)
    assert jax.tree.structure(IA3().init(jax.random.key(0), model, base)) == jax.tree.structure(expected)
