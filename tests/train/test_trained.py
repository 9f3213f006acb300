"""What using a trained run needs: its checkpoint's trained leaves, and the one set that it is measured on."""

import dataclasses
import json
import shutil

import jax
import pytest
import safetensors.numpy

import experiments
from jaxft import overrides
from jaxft.data import sources
from jaxft.data import tokenize as tokenizing
from jaxft.errors import UserError
from jaxft.methods import LoRA, SparseMask
from jaxft.train import run, setup
from jaxft.train.checkpoint import Checkpoints

SETS = {"train": slice(0, 24), "validation": slice(24, 32), "test": slice(32, 40)}


def experiment(material, folder, method):
    """A run of four steps, each of its sets in a file of its own."""
    lines = (material / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, rows in SETS.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[rows]))
    return overrides.parse_flags(
        dataclasses.replace(experiments.load("lora_llama2"), method=method),
        [
            *(f"--config.data.{name}={folder / name}.jsonl" for name in SETS),
            *("--config.data.system=", "--config.data.prompt=", "--config.data.completion=", "--config.data.max_length=64"),
            *(f"--config.model.source={material / 'model'}", "--config.data.cache=false", "--config.optimizer.learning_rate=1e-2"),
            *("--config.train.steps=4", "--config.train.batch_size=4", "--config.eval.max_new_tokens=3", "--config.eval.batch_size=8"),
        ],
    )


@pytest.fixture
def read(monkeypatch):
    """Which sources are read, and of which the rows become tokens."""
    found = {"read": [], "tokenized": []}

    def load_rows(source, name, original=sources.load_rows):
        found["read"].append(name)
        return original(source, name)

    def tokenize(rows, *arguments, original=tokenizing.tokenize):
        found["tokenized"].append(rows.name.rsplit("/", 1)[-1])
        return original(rows, *arguments)

    monkeypatch.setattr(sources, "load_rows", load_rows)
    monkeypatch.setattr(tokenizing, "tokenize", tokenize)
    return found


@pytest.fixture(autouse=True)
def as_launched(monkeypatch):
    """Leaves jax's cache of programs as the other tests have it; optax's own code promotes types."""
    monkeypatch.setattr(run, "_keep_compiled", lambda: None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def train(material, folder, method):
    """Trains; returns the experiment, the run's folder, and what it measured at its end."""
    asked = experiment(material, folder, method)
    summary = run.train(asked, folder / "run")
    return asked, folder / "run", summary["eval"]["after"]


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        patch.setattr(run, "_keep_compiled", lambda: None)
        return train(material, tmp_path_factory.mktemp("trained"), LoRA(rank=2))


def test_evaluation_reads_one_set_and_finds_what_training_ended_with(trained, read):
    asked, folder, after = trained
    assert run.evaluate(asked, folder) == pytest.approx(after, rel=1e-6)
    assert read == {"read": ["test"], "tokenized": ["test.jsonl"]}


def test_generation_and_export_read_no_set_at_all(trained, read, tmp_path, capsys, monkeypatch):
    asked, folder, _ = trained
    monkeypatch.setattr(sources, "load_rows", None)
    run.generate(asked, folder, [{"prompt": "Name the number 3, please."}], None)
    assert capsys.readouterr().out.strip()
    run.export(asked, folder, "peft", tmp_path / "peft")
    run.export(asked, folder, "hf", tmp_path / "hf")
    written, own = (
        safetensors.numpy.load_file(place / "adapter_model.safetensors") for place in (tmp_path / "peft", folder / "export/peft")
    )
    assert {name: value.tolist() for name, value in written.items()} == {name: value.tolist() for name, value in own.items()}
    assert read["tokenized"] == []


def test_what_ends_an_answer_and_the_trained_leaves_come_from_the_checkpoint(trained, material):
    asked, folder, _ = trained
    checkpoints = Checkpoints(folder / "checkpoints")
    progress = checkpoints.progress(4)
    made, trainable = setup.set_up_trained(asked, progress, measured=False)
    state = checkpoints.restore_trained(4, trainable)
    checkpoints.close()
    of_its_files = json.loads((material / "model" / "config.json").read_text())["eos_token_id"]
    assert setup.end_tokens(made) == (made.tokenizer.convert_tokens_to_ids("<|im_end|>"), of_its_files)
    assert progress.answer_end in setup.end_tokens(made)
    assert int(state.step) == 4
    assert jax.tree.leaves(state.optimizer) == []
    for restored, first in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(trainable), strict=True):
        assert restored.sharding == first.sharding
        assert (restored != first).any()


def test_a_method_that_chose_by_training_batches_reads_them_again(material, tmp_path, read):
    asked, folder, after = train(material, tmp_path, SparseMask(rank=1, choice="fisher"))
    read["read"].clear()
    assert run.evaluate(asked, folder)["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert sorted(set(read["read"])) == ["test", "train", "validation"]
    shutil.rmtree(folder)


def test_a_run_does_not_go_on_with_other_rows(material, tmp_path):
    asked = experiment(material, tmp_path, LoRA(rank=2))
    often = dataclasses.replace(asked.train, checkpoint_every=2)
    asked = dataclasses.replace(asked, train=often, eval=dataclasses.replace(asked.eval, generate=False))
    run.train(asked, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as if it had been stopped before
    (tmp_path / "run" / "summary.json").unlink()
    for name in ("train", "validation"):
        kept = (tmp_path / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(kept.replace("number 3", "number 5"))
        with pytest.raises(UserError, match=f"The {name} set isn't the one that this run began with: its rows, from .*{name}.jsonl"):
            run.train(asked, tmp_path / "run")
        (tmp_path / f"{name}.jsonl").write_text(kept)
    run.train(asked, tmp_path / "run")
