"""A whole run with dynamic masking: stopped and gone on with to the byte, its figures, its picture, and what is exported."""

import json
import os
import signal

import jax
import matplotlib.image
import numpy as np
import pytest
import safetensors
import tokenizers
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache
from tiny_models import same_bits

import experiments
from jaxft import overrides
from jaxft.train import plan, run, setup
from jaxft.train.logs import Logs

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A folder with a tiny BERT without a head, `model`, and 32 rows of random words, some of them tagged, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("reviews")
    random = np.random.default_rng(0)
    rows = [{"tokens": random.choice(WORDS, random.integers(4, 12)).tolist()} for _ in range(32)]
    rows = [row | {"tags": ["B-DRUG" if word in WORDS[:9] else "O" for word in row["tokens"]]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True, scope="module")
def as_launched(tmp_path_factory):
    """Keeps programs on disk, as runs do, but for these tests alone; optax's own code promotes types."""
    kept = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in kept}
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(run, "_keep_compiled", lambda: None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def experiment(folder, *flags):
    source, rows = f"--config.model.source={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}"
    sizes = ("--config.data.test=", "--config.data.split=0.5,0.25,0.25", "--config.data.max_length=64", "--config.train.batch_size=4")
    loop = ("--config.train.steps=6", "--config.train.eval_every=2", "--config.method=Full()", "--config.optimizer.learning_rate=1e-2")
    masking = 'DynamicMask(policy="mix", mix=(("tags", 0.5), ("words", 0.5)), rate=0.2, final_rate=0.6, schedule="validation")'
    given = experiments.load("lora_bert_tags")
    return overrides.parse_flags(given, [source, rows, *sizes, *loop, f"--config.objective={masking}", *flags])


def lines(workdir):
    """Returns what metrics.jsonl holds, times aside."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run.train(experiment(reviews), workdir)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(reviews, whole, tmp_path, monkeypatch):
    count = iter(range(1, 100))

    def advance(self, *arguments, original=Logs.advance):
        original(self, *arguments)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Logs, "advance", advance)
        assert run.train(experiment(reviews), tmp_path / "run") == {}
    assert run.train(experiment(reviews), tmp_path / "run")["steps"] == 6
    assert lines(tmp_path / "run") == lines(whole[0])
    for name in ("export/hf/model.safetensors", "masks.png"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()


def test_figures_of_the_mask_are_logged(whole):
    steps = [line for line in lines(whole[0]) if "mask_rate" in line]
    assert len(steps) == 6
    assert all(0 <= line[name] <= 1 for line in steps for name in ("hidden", "hidden_DRUG", "hidden_O", "restoration_accuracy"))
    np.testing.assert_allclose(steps[0]["restoration_loss"], np.log(45), rtol=0.05)  # it knows no word yet
    validation = [line["validation_loss"] for line in lines(whole[0]) if "validation_loss" in line]
    worse = [loss >= min(validation[:i], default=np.inf) for i, loss in enumerate(validation)]
    expected = np.repeat([0.2, *(0.2 + 0.1 * np.cumsum(worse)[:2])], 2)
    np.testing.assert_allclose([line["mask_rate"] for line in steps], expected, rtol=1e-5)


def test_what_is_exported_is_the_tagger_alone(reviews, whole):
    workdir, summary = whole
    with safetensors.safe_open(workdir / "export" / "hf" / "model.safetensors", "numpy") as file:
        assert not [name for name in file.keys() if name.startswith("cls.")]  # noqa: SIM118  # no dictionary
    np.testing.assert_allclose(run.evaluate(experiment(reviews), workdir)["loss"], summary["eval"]["after"]["loss"], rtol=1e-6)


def test_masks_through_training_are_a_picture(whole):
    image = matplotlib.image.imread(whole[0] / "masks.png")
    assert image.shape[0] > 500
    assert image.shape[1] > 1000
    kept = sorted(int(path.stem) for path in (whole[0] / "observed").iterdir())
    assert kept == list(range(7))
    looks = [np.load(whole[0] / "observed" / f"{step}.npz") for step in kept]
    assert len({look["hidden"].tobytes() for look in looks}) > 3
    assert all((look["entities"] == looks[0]["entities"]).all() for look in looks)


def test_a_method_that_looks_at_gradients_first_sees_whole_rows(reviews):
    method = "--config.method=SparseMask(rank=1, choice='gradient', score_batches=1)"
    made, plain = (setup.set_up(experiment(reviews, *flags, method)) for flags in ((), ("--config.objective=none",)))
    assert same_bits(made.params(made.state), plain.params(plain.state))  # the places of its weights among them


def test_its_plan_counts_the_new_head(reviews, whole):
    assert plan.plan(experiment(reviews)).trainable_parameters == whole[1]["trainable_parameters"]
