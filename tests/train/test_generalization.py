"""Whole runs with what holds overfitting back: resumed to the byte, the average exported, the gap told, and folds."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from stopped_runs import stop_at

import experiments
from jaxft import overrides
from jaxft.data.folds import load_sets
from jaxft.errors import UserError
from jaxft.train import placement, run, setup
from jaxft.train import workdir as workdirs
from jaxft.train.evaluate import Evaluator

pytestmark = pytest.mark.usefixtures("as_launched")


def experiment(folder, *flags):
    given = experiments.load("full_bert_sentiment")
    fixed = (f"--config.model.source={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}", "--config.data.test=")
    sizes = ("--config.data.split=0.5,0.25,0.25", "--config.data.label=label", "--config.data.max_length=64", "--config.train.batch_size=4")
    rates = ("--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=3e-3", "--config.train.steps=10")
    return overrides.parse_flags(given, [*fixed, *sizes, *rates, "--config.train.eval_every=2", *flags])


ALL_OF_IT = (
    *("--config.data.balanced", "--config.train.r_drop=0.5", "--config.train.mixout=0.2", "--config.train.average=ema"),
    *("--config.train.ema_decay=0.8", "--config.model.hidden_dropout=0.2", "--config.model.attention_dropout=0.1"),
)


def lines(workdir):
    """Returns what metrics.jsonl holds, times aside."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def exported(workdir):
    return (workdir / "export" / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory):
    """A run with all of it that nothing disturbed: its folder, and its summary."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run.train(experiment(reviews, *ALL_OF_IT), workdir)


@pytest.mark.slow
def test_a_run_with_all_of_it_that_was_stopped_ends_with_the_same_bytes(reviews, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run.train(experiment(reviews, *ALL_OF_IT), tmp_path / "run") == {}
    assert run.train(experiment(reviews, *ALL_OF_IT), tmp_path / "run")["steps"] == 10
    assert exported(tmp_path / "run") == exported(whole[0])
    assert lines(tmp_path / "run") == lines(whole[0])


@pytest.mark.slow
def test_what_is_measured_and_exported_is_the_average(reviews, whole):
    workdir, summary = whole
    found, state = run._load_best(experiment(reviews, *ALL_OF_IT), workdir, measured=True)
    assert state.trainable is None
    loss = Evaluator(found).full(state, "test", "").metrics["loss"]
    np.testing.assert_allclose(loss, summary["eval"]["after"]["loss"], rtol=1e-6)
    tensors = safetensors.numpy.load(exported(workdir))
    np.testing.assert_array_equal(tensors["classifier.weight"], np.asarray(found.params(state)["classifier"]["kernel"]).T)
    assert json.loads((workdir / "export" / "hf" / "config.json").read_text())["hidden_dropout_prob"] == 0.1  # the model's own


@pytest.mark.slow
def test_the_gap_is_validation_less_training_on_rows_drawn_once(reviews, whole):
    measured = [line for line in lines(whole[0]) if "gap" in line]
    assert [line["step"] for line in measured] == [2, 4, 6, 8, 10]
    for line in measured:
        assert line["gap"] == line["validation_loss"] - line["train_eval_loss"]
    ready = setup.set_up(experiment(reviews))
    evaluator, training = Evaluator(ready), ready.examples["train"]
    every = evaluator.measure(ready.state, training).metrics["loss"]
    np.testing.assert_allclose(evaluator.loss(ready.state, training, np.arange(24)), every, rtol=1e-6)
    parts = [evaluator.loss(ready.state, training, np.arange(24)[number::2]) for number in (0, 1)]
    np.testing.assert_allclose(np.mean(parts), every, rtol=1e-6)
    assert parts[0] != parts[1]
    short = dataclasses.replace(ready.rows["train"], dataset=ready.rows["train"].dataset.map(lambda row: {"text": row["text"].split()[0]}))
    training = ready.experiment.task.examples(short, ready.tokenizer, ready.experiment.data, ready.model)  # more of them fit a row
    ready = dataclasses.replace(ready, examples=ready.examples | {"train": training})
    evaluator = Evaluator(ready)
    evaluator.measure(ready.state, ready.examples["validation"])
    evaluator.loss(ready.state, training, evaluator.gap_sample)
    assert evaluator._program._cache_size() == 1  # one program for what is compared


@pytest.mark.slow
def test_the_rows_of_a_set_are_spread_over_its_batches(reviews, monkeypatch):
    ready = setup.set_up(experiment(reviews, "--config.data.packing=false", "--config.eval.batch_size=10", "--config.eval.gap=false"))
    sizes, original = [], placement.place_batch
    monkeypatch.setattr(placement, "place_batch", lambda batch, *given: sizes.append(len(batch["tokens"])) or original(batch, *given))
    Evaluator(ready).measure(ready.state, ready.examples["train"])
    assert sizes == [8, 8, 8]  # not 10, 10, and 4 that 6 rows of padding fill


@pytest.mark.slow
def test_a_run_that_learns_random_texts_by_heart_is_told_so_once(reviews, tmp_path, capsys):
    flags = ("--config.optimizer.learning_rate=2e-2", "--config.train.steps=40", "--config.train.eval_every=4")
    run.train(experiment(reviews, *flags), tmp_path / "run")
    assert capsys.readouterr().out.count("the model learns its rows by heart. train.patience stops there") == 1
    assert not [line for line in lines(tmp_path / "run") if line.get("gap", 0) > 0 and line["train_eval_loss"] > line["validation_loss"]]


# Folds

FOLDS = ("--config.data.folds=3", "--config.data.split=1,0,0", "--config.train.steps=3", "--config.eval.gap=false")


@pytest.mark.slow
def test_folds_are_runs_of_their_own_and_go_on_where_they_were_stopped(reviews, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # in the second fold
        assert run.train(experiment(reviews, *FOLDS), workdir) == {}
    assert (workdir / "fold-0" / "summary.json").exists()
    assert not (workdir / "summary.json").exists()
    first = (workdir / "fold-0" / "summary.json").stat().st_mtime_ns
    found = run.train(experiment(reviews, *FOLDS), workdir)
    assert (workdir / "fold-0" / "summary.json").stat().st_mtime_ns == first  # a finished fold isn't repeated
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(found))
    each = [json.loads((workdir / f"fold-{fold}" / "summary.json").read_text())["eval"]["after"] for fold in range(3)]
    for name in ("loss", "accuracy"):
        values = [one[name] for one in each]
        np.testing.assert_allclose(found["eval"]["after"][name], np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(found["deviation"]["after"][name], np.std(values, ddof=1), rtol=1e-12)
    assert "Over 3 folds, each measured on the part that it held out" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"holds a run for each of 3 folds. Name one of them, as --workdir={workdir / 'fold-0'}"):
        run.evaluate(experiment(reviews, *FOLDS), workdir)
    one = workdirs.saved_experiment(workdir / "fold-1", "full_bert_sentiment")
    assert one.data.fold == 1
    picture = (workdir / "fold-1" / "confusion.png").stat().st_mtime_ns
    np.testing.assert_allclose(run.evaluate(one, workdir / "fold-1")["loss"], each[1]["loss"], rtol=1e-6)
    assert (workdir / "fold-1" / "confusion.png").stat().st_mtime_ns == picture  # the training's own
    assert (workdir / "fold-1" / "eval-validation" / "confusion.png").exists()
    with pytest.raises(UserError, match="data.folds was 3 and is 0"):
        run.train(experiment(reviews), workdir)


def test_another_set_than_the_part_held_out_is_not_measured(reviews, tmp_path):
    with pytest.raises(UserError, match="config.eval.split is train, but each of config.data.folds is measured on the part"):
        run.train(experiment(reviews, *FOLDS, "--config.eval.split=train"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--config.eval.max_new_tokens=4", "--config.eval.temperature=0.5", "--config.data.cache=false"])
def test_settings_without_effect_are_refused(reviews, flag):
    with pytest.raises(UserError, match=f"{flag[2:].split('=')[0]} has no effect with the task SequenceClassification"):
        setup.describe_run(experiment(reviews, flag))


def test_one_fold_alone_is_a_plain_run(reviews):
    rows = load_sets(experiment(reviews, *FOLDS, "--config.data.fold=2"))
    assert {name: len(found) for name, found in rows.items()} == {"train": 32, "validation": 16}


def test_balanced_classes_are_refused_where_there_are_none(reviews, tmp_path):
    rows = [json.loads(line) | {"label": 0.5} for line in (reviews / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "numbers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ("--config.data.balanced", f"--config.data.train={tmp_path / 'numbers.jsonl'}")
    with pytest.raises(UserError, match="the examples of SequenceClassification have no single class"):
        setup.set_up(experiment(reviews, *flags))
    with pytest.raises(UserError, match="config.data.balanced and config.task.balanced would both make up for rare labels"):
        setup.set_up(experiment(reviews, "--config.data.balanced", "--config.task.balanced"))
